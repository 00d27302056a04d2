"""The agent: the harness's hands on one host, virtual or real. `python -m testbed.agent`, one per host, over SSH.

What lives here: the channel (`channel`: JSON lines), the loop (`service`), and one file per group of operations (`nic`,
`apps`, `addresses`, `files`), each entered in the table `operations.OPS`. Whatever an agent starts ends with it, and it
ends when its SSH channel does.

May import: the standard library, `testbed.errors`, `testbed.state`, and of the network card its control client and
`softroce_ext.native.build`. Must never import: the rest of the harness, or anything that has to be installed, so that
an agent starts in a few milliseconds and runs on a host where only these files are.

A further group of operations (CRIU's, for instance) is a module that fills `OPS` when imported; its name goes into
`operations.MODULES`.
"""
