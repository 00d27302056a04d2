"""The MAC of the next hop to an IP address, from the kernel's routing and neighbour tables by rtnetlink.

The kernel answers a query from its tables at once, so a look-up takes some microseconds and never waits. When the
neighbour is unknown, the kernel is asked to resolve it (NTF_USE) and the caller tries again later.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import Final

RTM_NEWNEIGH, RTM_GETNEIGH, RTM_GETROUTE, RTM_NEWROUTE = 28, 30, 26, 24
NLM_F_REQUEST, NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE = 1, 4, 0x400, 0x100
NLMSG_ERROR: Final = 2
NDA_DST, NDA_LLADDR = 1, 2
RTA_DST, RTA_OIF, RTA_GATEWAY = 1, 4, 5
NTF_USE: Final = 1
NUD_NONE: Final = 0
NUD_USABLE: Final = 0x02 | 0x04 | 0x08 | 0x10 | 0x40 | 0x80
"""REACHABLE, STALE, DELAY, PROBE, NOARP, PERMANENT."""

HEADER = struct.Struct("=IHHII")
_NDMSG = struct.Struct("=BxxxiHBB")
_RTMSG = struct.Struct("=BBBBBBBBI")
_ATTRIBUTE = struct.Struct("=HH")
_ERROR = struct.Struct("=i")


def _attribute(kind: int, data: bytes) -> bytes:
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(data), kind) + data + bytes(-len(data) % 4)


def attributes(data: bytes) -> dict[int, bytes]:
    """The attributes of an rtnetlink message, by their kind."""
    found = {}
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size:
            break
        found[kind & 0x3FFF] = data[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3
    return found


def _family(address: bytes) -> int:
    return socket.AF_INET if len(address) == 4 else socket.AF_INET6


class Neighbours:
    """Look-ups for the interface with index `interface` (an ifindex)."""

    def __init__(self, interface: int) -> None:
        self._interface = interface
        self._sequence = 0
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._socket.bind((0, 0))
        self._socket.settimeout(0.2)

    def mac(self, address: bytes) -> bytes | None:
        """Return the next hop's MAC for an IP address (4 or 16 bytes), or None: not known yet, and being resolved."""
        try:
            return self._mac(address)
        except OSError:  # no route, the interface is down: the caller tries again until its timeout
            return None

    def _mac(self, address: bytes) -> bytes | None:
        hop = self._next_hop(address)
        if hop is None:
            return None
        family = _family(hop)
        answer = self._ask(RTM_GETNEIGH, 0, self._neighbour(family, 0, 0) + _attribute(NDA_DST, hop))
        if answer is not None and len(answer) >= _NDMSG.size:
            _, _index, state, _flags, _kind = _NDMSG.unpack_from(answer)
            mac = attributes(answer[_NDMSG.size :]).get(NDA_LLADDR)
            if state & NUD_USABLE and mac is not None and len(mac) == 6:
                return mac
        self._ask(
            RTM_NEWNEIGH,
            NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE,
            self._neighbour(family, NUD_NONE, NTF_USE) + _attribute(NDA_DST, hop),
        )
        return None

    def _neighbour(self, family: int, state: int, flags: int) -> bytes:
        return _NDMSG.pack(family, self._interface, state, flags, 0)

    def _next_hop(self, address: bytes) -> bytes | None:
        """The gateway towards `address`, or the address itself; None when there is no route over this interface."""
        message = _RTMSG.pack(_family(address), 8 * len(address), 0, 0, 0, 0, 0, 0, 0) + _attribute(RTA_DST, address)
        message += _attribute(RTA_OIF, struct.pack("=I", self._interface))
        answer = self._ask(RTM_GETROUTE, 0, message)
        if answer is None or len(answer) < _RTMSG.size:
            return None
        return attributes(answer[_RTMSG.size :]).get(RTA_GATEWAY, address)

    def _ask(self, kind: int, flags: int, body: bytes) -> bytes | None:
        """One request, one answer: its body, b"" for a bare acknowledgement, None for an error."""
        self._sequence += 1
        length = HEADER.size + len(body)
        try:
            self._socket.send(HEADER.pack(length, kind, NLM_F_REQUEST | flags, self._sequence, 0) + body)
            while True:
                data = self._socket.recv(65536)
                total, answer, _, sequence, _ = HEADER.unpack_from(data)
                if sequence != self._sequence:
                    continue  # the late answer to a query that timed out
                payload = data[HEADER.size : total]
                if answer == NLMSG_ERROR:
                    code = -_ERROR.unpack_from(payload)[0]
                    if code not in (0, errno.ENOENT, errno.ENETUNREACH, errno.EHOSTUNREACH):
                        raise OSError(code, f"rtnetlink: {os.strerror(code)}")
                    return None if code else b""
                return payload
        except (TimeoutError, struct.error):
            return None

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
