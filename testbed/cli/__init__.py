"""The command line: one file per verb, each a thin layer over the package that does the work.

What lives here: options, output, exit codes, and the checks of `testbed doctor` (`probe`). Verbs import the rest of the
testbed inside their functions, so that `testbed validate` does not wait for paramiko, Mininet or matplotlib to load.
Results go to standard output, everything else to standard error.

May import: `softroce_ext.native`, `testbed.base`, `testbed.cleanup`, `testbed.record`, `testbed.view`,
`testbed.topology`, `testbed.controller`, `testbed.network`, `testbed.checkpoint`, `testbed.diagram`, `testbed.lab`,
`testbed.run`.
"""
