"""The NIC as a process: every layer joined, driven by one event loop, managed through one socket.

What lives here: the NIC with all its parts (`nic`), the event loop (`loop`), the programs that have opened verbs
(`user_contexts`), and the commands of the management socket (`management` and `arguments`, described in
docs/nic-control.md). `softroce_ext.__main__` starts it.

May import: `softroce_ext.wire`, `softroce_ext.transport`, `softroce_ext.device`, `softroce_ext.uverbs`,
`softroce_ext.cm`, `softroce_ext.port`, `softroce_ext.trace`, `softroce_ext.control`.
"""
