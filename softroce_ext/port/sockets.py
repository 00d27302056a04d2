"""The sockets of a port: packet sockets for IPv4 and IPv6, and those that keep the kernel silent on port 4791."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
from typing import Final

from softroce_ext.device.addressing import group_mac
from softroce_ext.port import filters
from softroce_ext.wire.path import ROCE_PORT

RECEIVE_BUFFER: Final = 64 << 20
SEND_BUFFER: Final = 4 << 20

_SOL_PACKET, _PACKET_ADD_MEMBERSHIP, _PACKET_DROP_MEMBERSHIP, _PACKET_MR_MULTICAST = 263, 1, 2, 0
_SIOCGIFHWADDR, _SIOCGIFMTU = 0x8927, 0x8921
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33


def hardware(name: str) -> tuple[bytes, int]:
    """(MAC, MTU in bytes) of an interface, by ioctl: /sys may show another network namespace. Raises OSError."""
    request = struct.pack("=16s24x", name.encode())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        mac = fcntl.ioctl(any_socket, _SIOCGIFHWADDR, request)[18:24]
        (mtu,) = struct.unpack_from("=i", fcntl.ioctl(any_socket, _SIOCGIFMTU, request), 16)
    return mac, mtu


class RoceSockets:
    """Everything that a port opens on an interface."""

    def __init__(self, name: str, index: int) -> None:
        """index: of the interface. Raises OSError when packet sockets are not allowed."""
        self._name = name
        self._index = index
        self.ipv4 = self._open(filters.ETH_P_IP, filters.ROCE_IPV4)
        self.ipv6 = self._open(filters.ETH_P_IPV6, filters.ROCE_IPV6)
        # A socket must be bound to UDP port 4791, else the kernel answers each frame with ICMP port unreachable.
        self._silencers = [self._silencer(socket.AF_INET, "")]
        with contextlib.suppress(OSError):  # a kernel without IPv6
            self._silencers.append(self._silencer(socket.AF_INET6, "::"))

    def _open(self, protocol: int, program: filters.Program) -> socket.socket:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
        for plain, forced, size in (
            (socket.SO_RCVBUF, _SO_RCVBUFFORCE, RECEIVE_BUFFER),
            (socket.SO_SNDBUF, _SO_SNDBUFFORCE, SEND_BUFFER),
        ):
            try:
                sock.setsockopt(socket.SOL_SOCKET, forced, size)
            except PermissionError:
                sock.setsockopt(socket.SOL_SOCKET, plain, size)
        filters.attach(sock, program)
        # Bound last: before that, no frame that the filter would refuse can get in.
        sock.bind((self._name, protocol))
        return sock

    def _silencer(self, family: int, anywhere: str) -> socket.socket:
        sock = socket.socket(family, socket.SOCK_DGRAM)
        filters.attach(sock, filters.DROP_ALL)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((anywhere, ROCE_PORT))
        return sock

    def set_group(self, address: bytes, member: bool) -> None:
        """Whether the interface must receive the frames of a multicast group."""
        change = _PACKET_ADD_MEMBERSHIP if member else _PACKET_DROP_MEMBERSHIP
        request = struct.pack("=iHH8s", self._index, _PACKET_MR_MULTICAST, 6, group_mac(address))
        with contextlib.suppress(OSError):  # the interface may be gone
            self.ipv4.setsockopt(_SOL_PACKET, change, request)

    def close(self) -> None:
        """Close every socket."""
        for sock in (self.ipv4, self.ipv6, *self._silencers):
            sock.close()
