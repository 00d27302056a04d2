"""Frames in and out of a network interface, and what stands between the wire and the engine.

What lives here: the port (`packet_socket`) with its sockets (`sockets`, `filters`) and batches of frames (`batch`); the
declared places before and behind it (`interfaces`), which the sending stages (`egress`), the seeded impairment of a
link (`impairment`) and the capture of frames to a pcap file (`capture`) fill; and the kernel's view of the
interface: its speed (`ethtool`), its addresses and carrier (`interface`), its neighbours (`neighbours`).

May import: `softroce_ext.wire`, `softroce_ext.device`.
"""
