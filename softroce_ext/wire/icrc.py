"""The invariant CRC (IBA 7.8.1, RoCEv2 annex A17.3.3).

It is Ethernet's CRC-32 over everything that a router may not change: eight bytes of ones in place of the LRH, the IP
header with its traffic class, hop limit and checksum as ones, the UDP header with its checksum as ones, the BTH with
its fifth byte (FECN, BECN, reserved) as ones, and the rest including the pad. It is stored little-endian.

The CRC of ISA-L is used where the `isal` package is installed (0.6 us for 4 KiB), otherwise zlib's (about four times
as slow).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

try:
    from isal import isal_zlib
except ImportError:  # A platform without ISA-L: slower, with the same results.
    crc32: Callable[..., int] = zlib.crc32
else:
    crc32 = isal_zlib.crc32

SEED_IPV4 = zlib.crc32(b"\xff" * 8 + b"\x45\xff")
"""CRC state after the eight bytes of ones and the first two bytes of IPv4 (version 4, length 20; masked TOS)."""

SEED_IPV6 = zlib.crc32(b"\xff" * 8 + b"\x6f\xff\xff\xff")
"""CRC state after the eight bytes of ones and the first four bytes of IPv6 (version 6; masked traffic class and flow
label)."""
