"""The first of CRIU's images, inventory.img: what a migration reads in it, and the one field that it changes.

At the source CRIU locks established TCP connections with a netfilter table and notes that in the inventory. At the
destination there is nothing to unlock, but `criu restore` would look for the table for some 15 ms of blackout.
Therefore the field is changed to "nothing was locked" before the restore (CRIU: enum NETWORK_LOCK_METHOD).

Layout, as CRIU's image documentation gives it: a magic number (u32), then the size (u32) of one protobuf message
`inventory_entry`, both little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

_HEADER = struct.Struct("<II")
_NETWORK_LOCK_METHOD = 11
"""Number of a field in inventory.proto, a varint."""
_DUMP_RUN_ID = 13
"""Number of a field with CRIU's name for the dump, a string; its netfilter table is "inet CRIU-<run id>"."""
_SKIP = 2
"""NETWORK_LOCK_SKIP."""
_VARINT, _BYTES = 0, 2
_FIXED = {1: 8, 5: 4}
"""Wire types of protobuf; the fixed ones with their sizes."""


class BadImage(Exception):
    """The bytes are not an inventory image. CRIU would fail later, and with a worse message."""


def nothing_locked(image: bytes) -> bytes:
    """Return the inventory with its network lock method set to "skip", or unchanged if it has none. Raises BadImage."""
    result = bytearray(image)
    for field, kind, start, end in _fields(image):
        if field == _NETWORK_LOCK_METHOD and kind == _VARINT and end == start + 1:
            result[start] = _SKIP
    return bytes(result)


def lock_table(image: bytes) -> str | None:
    """Return the name of the dump's netfilter table, "inet CRIU-…"; None if the image has none. Raises BadImage."""
    for field, kind, start, end in _fields(image):
        if field == _DUMP_RUN_ID and kind == _BYTES:
            # CRIU truncates the name to 31 characters (the buffer of nftables_get_table).
            return f"inet CRIU-{image[start:end].decode('ascii', 'replace')}"[:31]
    return None


def _fields(image: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Yield every field of the message: number, wire type, start and end of its value. Raises BadImage."""
    if len(image) < _HEADER.size:
        raise BadImage(f"inventory.img has only {len(image)} bytes")
    size = _HEADER.unpack_from(image)[1]
    at, end = _HEADER.size, _HEADER.size + size
    if end > len(image):
        raise BadImage(f"inventory.img is truncated: it has {len(image)} bytes, its message alone {size}")
    while at < end:
        key, at = _varint(image, at, end)
        kind = key & 7
        if kind == _VARINT:
            start, (_, at) = at, _varint(image, at, end)
        elif kind == _BYTES:
            length, start = _varint(image, at, end)
            at = start + length
        elif kind in _FIXED:
            start, at = at, at + _FIXED[kind]
        else:
            raise BadImage(f"inventory.img has a field of unknown wire type {kind} at byte {at}")
        if at > end:
            raise BadImage("the fields of inventory.img do not end where its message does")
        yield key >> 3, kind, start, at


def _varint(image: bytes, at: int, end: int) -> tuple[int, int]:
    """Parse the base-128 number at `at`; return it and the position after it."""
    value = shift = 0
    while at < end and shift < 70:
        byte = image[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if not byte & 0x80:
            return value, at
        shift += 7
    raise BadImage("a number in inventory.img has no end")
