"""Measured commands and runs, for benchmarks and experiments.

What lives here: commands run inside a lab (`bench`), and the numbers read from what they print (`numbers`).

May import: `testbed.base`, `testbed.record`, `testbed.topology`, `testbed.lab`, `testbed.run`.
"""
