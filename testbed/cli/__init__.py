"""The command line: one file per verb, each a thin shell around the part that does the work.

What lives here: reading options, choosing what is printed where, exit codes. It may import everything of the harness,
but inside the verbs' functions only: `testbed validate` must not wait for paramiko, Mininet or matplotlib to load.
Nothing may import it but `testbed.__main__`. Results go to standard output, everything else to standard error.
"""
