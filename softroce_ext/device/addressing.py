"""The device's GIDs, and from a GID to the path of a packet: addresses, MACs, paths (RoCEv2 annex A17.3 to A17.4).

A GID is an IPv6 address; an IPv4 address is the GID ::ffff:a.b.c.d. Row 0 of the table is the link-local address that
follows from the MAC, as in Linux.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Final

from softroce_ext.device.address_handle import Destination
from softroce_ext.device.errors import NotYet, StateError, VerbsError
from softroce_ext.device.limits import GID_TABLE_LENGTH
from softroce_ext.wire.path import Path, address_text, udp_source_port

V4_PREFIX: Final = bytes(10) + b"\xff\xff"
LINK_LOCAL: Final = bytes.fromhex("fe80000000000000")
PORT: Final = 1

Resolver = Callable[[bytes], bytes | None]
"""IP address (4 or 16 bytes) → MAC of the next hop (6 bytes), or None while it is being asked for."""


def gid_of(address: bytes) -> bytes:
    """The GID (16 bytes) of an IP address of 4 or 16 bytes."""
    return address if len(address) == 16 else V4_PREFIX + address


def address_of(gid: bytes) -> bytes:
    """The IP address of a GID: 4 bytes when it is an IPv4 address, else 16."""
    return gid[12:] if gid[:12] == V4_PREFIX else gid


def is_multicast(address: bytes) -> bool:
    """Whether an IP address of 4 or 16 bytes is a multicast group's."""
    return address[0] & 0xF0 == 0xE0 if len(address) == 4 else address[0] == 0xFF


def group_mac(address: bytes) -> bytes:
    """The MAC of a multicast group (RFC 1112 section 6.4, RFC 2464 section 7)."""
    if len(address) == 4:
        return bytes((1, 0, 0x5E, address[1] & 0x7F, address[2], address[3]))
    return b"\x33\x33" + address[12:]


def guid_of(mac: bytes) -> bytes:
    """The EUI-64 of a MAC, as rxe makes its node GUID."""
    return bytes([mac[0] ^ 2, mac[1], mac[2], 0xFF, 0xFE, mac[3], mac[4], mac[5]])


class Addressing:
    """The GID table of one port, and the paths that begin at its GIDs."""

    def __init__(self, mac: bytes, resolve: Resolver, changed: Callable[[int], None]) -> None:
        """mac: 6 bytes; changed: called with the index of each row that has changed."""
        self.mac = mac
        self.resolve = resolve
        self.gids: list[bytes | None] = [LINK_LOCAL + guid_of(mac)]
        """By GID index; None: an empty row."""
        self._changed = changed

    def addresses(self) -> list[bytes]:
        """Return the IP addresses of the GID table, 4 or 16 bytes each, without the link-local one of row 0."""
        return [address_of(gid) for gid in self.gids[1:] if gid is not None]

    def own(self) -> set[bytes]:
        """Return every IP address that is this device's."""
        return {address_of(gid) for gid in self.gids if gid is not None}

    def add(self, address: bytes) -> int:
        """Put an address (4 or 16 bytes) into the first free row; returns its index. A known one stays in its row."""
        gid = gid_of(address)
        if gid in self.gids:
            return self.gids.index(gid)
        if None in self.gids:
            index = self.gids.index(None)
            self.gids[index] = gid
        else:
            if len(self.gids) >= GID_TABLE_LENGTH:
                raise StateError("the GID table is full")
            index = len(self.gids)
            self.gids.append(gid)
        self._changed(index)
        return index

    def remove(self, address: bytes) -> None:
        """Remove an address; queue pairs that use it keep it. Raises StateError when it is not in the table."""
        gid = gid_of(address)
        index = self.gids.index(gid) if gid in self.gids else 0
        if index == 0:  # row 0 follows from the MAC and stays
            raise StateError(f"{address_text(address)} is not an address of this device")
        self.gids[index] = None
        self._changed(index)

    def source(self, sgid_index: int) -> bytes:
        """The IP address of a GID index. Raises VerbsError(EINVAL) for an empty row."""
        gid = self.gids[sgid_index] if sgid_index < len(self.gids) else None
        if gid is None:
            raise VerbsError(errno.EINVAL, f"GID index {sgid_index} is empty")
        return address_of(gid)

    def ends(self, destination: Destination) -> tuple[bytes, bytes]:
        """(source, destination) addresses of an address vector. Raises VerbsError for one that RoCEv2 cannot carry."""
        if not destination.is_global:
            raise VerbsError(errno.EINVAL, "RoCE needs a global route (is_global)")
        if destination.port_num != PORT:
            raise VerbsError(errno.EINVAL, f"port {destination.port_num}")
        here, there = self.source(destination.sgid_index), address_of(destination.dgid)
        if len(here) != len(there):
            raise VerbsError(errno.EINVAL, f"{address_text(here)} cannot send to {address_text(there)}")
        return here, there

    def path(self, destination: Destination, udp_port: int) -> Path:
        """The resolved path to a destination. Raises VerbsError, or NotYet while the MAC is being asked for."""
        here, there = self.ends(destination)
        mac: bytes | None
        if is_multicast(there):
            mac = group_mac(there)
        elif gid_of(there) in self.gids:
            mac = self.mac
        else:
            mac = self.resolve(there)
        if mac is None:
            raise NotYet(there)
        return Path(self.mac, mac, here, there, udp_port, destination.traffic_class)

    def connection_path(self, destination: Destination, local_qpn: int, remote_qpn: int) -> Path:
        """`path` with the UDP source port of a connection between two queue pairs."""
        return self.path(destination, udp_source_port(destination.flow_label, local_qpn, remote_qpn))
