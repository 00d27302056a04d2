"""The command line: one file per verb, each a thin shell around the part that does the work.

What lives here: reading options, choosing what is printed where, exit codes, and the trials of `testbed doctor`
(`probe`). Verbs import the rest of the testbed inside their functions: `testbed validate` must not wait for paramiko,
Mininet or matplotlib to load. Results go to standard output, everything else to standard error.

May import: `softroce_ext.native`, `testbed.base`, `testbed.cleanup`, `testbed.record`, `testbed.view`,
`testbed.topology`, `testbed.controller`, `testbed.network`, `testbed.checkpoint`, `testbed.diagram`, `testbed.lab`,
`testbed.run`.
"""
