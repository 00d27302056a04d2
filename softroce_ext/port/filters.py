"""Classic BPF programs for the port's sockets: which frames the kernel hands to them."""

from __future__ import annotations

import ctypes
import socket
import struct
from typing import Final

from softroce_ext.wire.path import ROCE_PORT

ETH_P_IP: Final = 0x0800
ETH_P_IPV6: Final = 0x86DD
_SO_ATTACH_FILTER: Final = 26
_PKTTYPE: Final = 0xFFFFF000 + 4  # SKF_AD_OFF + SKF_AD_PKTTYPE

Program = tuple[tuple[int, int, int, int], ...]
"""Instructions: (code, jump true, jump false, operand)."""

ROCE_IPV4: Final[Program] = (
    (0x20, 0, 0, _PKTTYPE),
    (0x15, 1, 0, 0),  # PACKET_HOST
    (0x15, 0, 9, 2),  # PACKET_MULTICAST
    (0x28, 0, 0, 12),
    (0x15, 0, 7, ETH_P_IP),
    (0x30, 0, 0, 23),
    (0x15, 0, 5, socket.IPPROTO_UDP),
    (0x28, 0, 0, 20),
    (0x45, 3, 0, 0x1FFF),
    (0xB1, 0, 0, 14),
    (0x48, 0, 0, 16),
    (0x15, 1, 0, ROCE_PORT),
    (0x06, 0, 0, 0),
    (0x06, 0, 0, 0x40000),
)
"""For this host or for a group, IPv4, UDP to port 4791, not a later fragment."""
ROCE_IPV6: Final[Program] = (
    (0x20, 0, 0, _PKTTYPE),
    (0x15, 1, 0, 0),
    (0x15, 0, 6, 2),
    (0x28, 0, 0, 12),
    (0x15, 0, 4, ETH_P_IPV6),
    (0x30, 0, 0, 20),
    (0x15, 0, 2, socket.IPPROTO_UDP),
    (0x28, 0, 0, 56),
    (0x15, 1, 0, ROCE_PORT),
    (0x06, 0, 0, 0),
    (0x06, 0, 0, 0x40000),
)
"""The same for IPv6 without extension headers."""
DROP_ALL: Final[Program] = ((0x06, 0, 0, 0),)


def attach(sock: socket.socket, program: Program) -> None:
    """Attach a program to a socket."""
    code = b"".join(struct.pack("=HBBI", *line) for line in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    fprog = struct.pack("=HxxxxxxQ", len(program), ctypes.addressof(buffer))
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, fprog)
