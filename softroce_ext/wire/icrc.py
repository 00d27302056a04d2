"""The invariant CRC (IBA 7.8.1, RoCEv2 annex A17.3.3).

CRC-32 of Ethernet over everything that no router may change: eight bytes of ones in place of the LRH, the IP header
with its traffic class, hop limit and checksum as ones, the UDP header with its checksum as ones, the BTH with its
fifth byte (FECN, BECN, reserved) as ones, and the rest up to the pad. It is stored little-endian.

ISA-L's CRC is used where the `isal` package is installed (0.6 us for 4 KiB), zlib's otherwise (about four times that).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

try:
    from isal import isal_zlib
except ImportError:  # a platform without ISA-L: slower, same numbers
    crc32: Callable[..., int] = zlib.crc32
else:
    crc32 = isal_zlib.crc32

SEED_IPV4 = zlib.crc32(b"\xff" * 8 + b"\x45\xff")
"""The CRC's state after the eight bytes of ones and the first two bytes (version 4, length 20; masked TOS) of IPv4."""

SEED_IPV6 = zlib.crc32(b"\xff" * 8 + b"\x6f\xff\xff\xff")
"""The same after the first four bytes of IPv6 (version 6; masked traffic class and flow label)."""
