"""CRIU: which one to use, and how an application's processes are dumped and restored.

What lives here: finding and installing CRIU (`criu_binary`, `install_criu`), the dump and restore runners with their
hooks (`dump`, `restore`, `hooks`), the errors in CRIU's log (`criu_log`), the inventory image (`inventory`), the
process tree that is dumped (`tree`), and the netfilter table that a dump leaves (`network_lock`). It runs inside the
agents and starts fast. It knows nothing of topologies, the phases of a migration or the virtual NIC, which the agent's
operations combine with it.

May import: `softroce_ext.native`, `testbed.base`.
"""
