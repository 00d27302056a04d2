"""The first of CRIU's images, inventory.img, and the one thing in it that differs between the two ends of a move.

At the source CRIU locks established TCP connections with a netfilter table and notes that in the inventory. At the
destination there is nothing to unlock, yet `criu restore` would look for that table in the destination's namespace for
some 15 ms of blackout. So the note is changed to "nothing was locked" on the way (CRIU: enum NETWORK_LOCK_METHOD).

Layout, as CRIU's image documentation gives it: a magic number (u32), then the size (u32) of one protobuf message
`inventory_entry`, both little-endian.
"""

from __future__ import annotations

import struct

_HEADER = struct.Struct("<II")
_NETWORK_LOCK_METHOD = 11
"""Number of the field in inventory.proto, a varint."""
_SKIP = 2
"""NETWORK_LOCK_SKIP."""


class BadImage(Exception):
    """The bytes are no inventory image; what CRIU would say about them comes later and is worse."""


def nothing_locked(image: bytes) -> bytes:
    """The inventory with its network lock method set to "skip"; unchanged if it has none. Raises BadImage."""
    if len(image) < _HEADER.size:
        raise BadImage(f"inventory.img has only {len(image)} bytes")
    size = _HEADER.unpack_from(image)[1]
    if _HEADER.size + size > len(image):
        raise BadImage(f"inventory.img is cut off: {len(image)} bytes, its message alone has {size}")
    result = bytearray(image)
    at, end = _HEADER.size, _HEADER.size + size
    while at < end:
        key, at = _varint(image, at, end)
        field, kind = key >> 3, key & 7
        if kind == 0:
            start = at
            _, at = _varint(image, at, end)
            if field == _NETWORK_LOCK_METHOD and at == start + 1:
                result[start] = _SKIP
        elif kind == 2:
            length, at = _varint(image, at, end)
            at += length
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise BadImage(f"inventory.img holds an unknown kind of field ({kind}) at byte {at}")
    if at != end:
        raise BadImage("the fields of inventory.img do not end where its message does")
    return bytes(result)


def _varint(image: bytes, at: int, end: int) -> tuple[int, int]:
    """A base-128 number at `at`, and the place after it."""
    value = shift = 0
    while at < end and shift < 70:
        byte = image[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if not byte & 0x80:
            return value, at
        shift += 7
    raise BadImage("a number in inventory.img does not end")
