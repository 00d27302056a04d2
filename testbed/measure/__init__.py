"""Measuring commands and runs, for benchmarks and experiments.

What lives here: running commands inside a lab (`bench`), and reading numbers from their output (`numbers`).

May import: `testbed.base`, `testbed.record`, `testbed.topology`, `testbed.lab`, `testbed.run`.
"""
