"""The agent: what acts on one host, virtual or real. `python -m testbed.agent`, one per host, started over SSH.

What lives here: the channel (`channel`: JSON lines), the loop (`service`), what an agent knows of its host (`records`),
and one file per group of operations (`nic`, `apps`, `addresses`, `files`, `move_source`, `move_destination`), all
listed in `table`. The two ends of a migration share `move_stages` and send files by `transfer`. Whatever an agent
starts ends with it, and it ends when its SSH channel does.

Nothing here imports what has to be installed, so an agent starts in a few milliseconds and runs on a host where only
these files are.

May import: `softroce_ext.control`, `softroce_ext.native`, `testbed.base`, `testbed.checkpoint`.
"""
