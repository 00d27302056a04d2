"""Leaving nothing behind: each thing is recorded before it is created, and what is recorded can be removed.

What lives here: the state file of a run (`state`), child processes that are recorded in it (`child`), and the removal
of what a run that was killed has left (`clean`).

May import: `testbed.base`.
"""
