"""The agent: what acts on one host, virtual or real. `python -m testbed.agent`, one per host, started over SSH.

What lives here: the channel (`channel`: JSON lines), the loop (`service`), and one file per group of operations (`nic`,
`apps`, `addresses`, `files`, `moves`), each entered in the table `operations.OPS`. A migration's two ends are
`move_source` and `move_destination`, which share `move_stages` and send files by `transfer`. Whatever an agent starts
ends with it, and it ends when its SSH channel does.

Nothing here imports what has to be installed, so an agent starts in a few milliseconds and runs on a host where only
these files are.

May import: `softroce_ext.control`, `softroce_ext.native`, `testbed.base`, `testbed.checkpoint`.
"""
