"""What the host's network stack does for rdma_cm: source addresses by its routes, group memberships by its sockets."""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from collections import Counter
from typing import Final

from softroce_ext.cm.ids import Endpoint
from softroce_ext.device.errors import VerbsError
from softroce_ext.wire.path import ROCE_PORT


class Sources:
    """Finds the host's address that a packet to a destination would have, by the kernel's routing table."""

    def __init__(self, interface: int) -> None:
        """interface: its index."""
        self._interface = interface

    def __call__(self, destination: Endpoint, source: bytes | None) -> bytes:
        """source: the address that the packet must have, if any. Raises VerbsError with the kernel's errno."""
        family = socket.AF_INET if len(destination.ip) == 4 else socket.AF_INET6
        local = destination.ip[:2] in (b"\xfe\x80", b"\xff\x02")
        # A packet from an address of the device leaves over its interface.
        index = self._interface if source is not None else destination.scope or self._interface
        scope = (0, index if local else 0) if family == socket.AF_INET6 else ()
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                if source is not None:
                    with contextlib.suppress(OSError):  # an address of the device that the host does not have
                        probe.bind((socket.inet_ntop(family, source), 0, *scope))
                probe.connect((socket.inet_ntop(family, destination.ip), ROCE_PORT, *scope))
                found = socket.inet_pton(family, probe.getsockname()[0].partition("%")[0])
        except OSError as error:
            raise VerbsError(error.errno or errno.ENETUNREACH, "no route to the destination") from None
        return source or found


class Memberships:
    """Announces groups to the network (IGMP, MLD): ordinary sockets join them, and the kernel does the rest."""

    SHARED: Final = 20
    """Groups of one socket: the kernel's default limit for IPv4."""

    def __init__(self, interface: int) -> None:
        """interface: its index."""
        self._interface = interface
        self._joined: dict[bytes, socket.socket] = {}
        self._used: Counter[socket.socket] = Counter()

    def __call__(self, address: bytes, member: bool) -> None:
        """Join or leave a group. When the kernel refuses, the group is not announced."""
        with contextlib.suppress(OSError):
            if member:
                self._join(address)
            elif address in self._joined:
                self._leave(address, self._joined.pop(address))

    def _join(self, address: bytes) -> None:
        family = socket.AF_INET if len(address) == 4 else socket.AF_INET6
        known = next((sock for sock, used in self._used.items() if sock.family == family and used < self.SHARED), None)
        joined = known or socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._joined[address] = joined
        self._used[joined] += 1
        self._set_option(joined, address, socket.IP_ADD_MEMBERSHIP, socket.IPV6_JOIN_GROUP)

    def _leave(self, address: bytes, joined: socket.socket) -> None:
        self._used[joined] -= 1
        if not self._used[joined]:
            del self._used[joined]
            joined.close()
        else:
            self._set_option(joined, address, socket.IP_DROP_MEMBERSHIP, socket.IPV6_LEAVE_GROUP)

    def _set_option(self, joined: socket.socket, address: bytes, option: int, option6: int) -> None:
        interface = struct.pack("=i", self._interface)
        if len(address) == 4:
            joined.setsockopt(socket.IPPROTO_IP, option, address + bytes(4) + interface)
        else:
            joined.setsockopt(socket.IPPROTO_IPV6, option6, address + interface)

    def close(self) -> None:
        """Leave all groups."""
        for joined in self._used:
            joined.close()
        self._used.clear()
        self._joined.clear()
