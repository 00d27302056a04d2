"""Checkpoint and restore of an application's processes, and the way of an image from host to host.

What lives here: which CRIU to use and how to get one (`criu_binary`, `install_criu`), the dump and restore runners with
their hooks (`dump`, `restore`, `hooks`), the stream that carries images between agents (`transfer`), and what CRIU
leaves to be done around it (`processes`, `network_lock`).

It runs inside the agents, so it imports the standard library, `testbed.errors` and `softroce_ext.native` only, and
starts fast. It knows nothing of topologies, migrations' phases or the virtual NIC: `testbed.agent.migrate_ops` joins
those.
"""
