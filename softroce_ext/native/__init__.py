"""The few C sources and what compiles them.

Here live the programs that cannot be Python: the preload bridge (`bridge/`), an application's first process and the
CRIU plug-ins.

May import: nothing.
"""
