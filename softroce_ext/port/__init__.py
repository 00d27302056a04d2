"""Frames in and out of a network interface, and what stands between the wire and the engine.

What lives here: the packet sockets (`packet_socket`), the seeded impairment of a link (`impairment`), the capture of
frames to a pcap file (`capture`), and what the kernel tells of the interface: its speed (`ethtool`), its addresses and
carrier (`interface`), its neighbours (`neighbours`).

May import: `softroce_ext.wire`, `softroce_ext.device`.
"""
