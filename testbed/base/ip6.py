"""The companion IPv6 address of each IPv4 address of the data network: its last 32 bits are the IPv4 address.

Where one of both is added, moved or removed, the other is, too.
"""

from __future__ import annotations

import ipaddress
from typing import Final

NETWORK: Final = ipaddress.IPv6Network("fd4d::/64")
"""Network of the companion addresses, a unique local one (RFC 4193)."""


def companion(ip: str) -> str:
    """Return the companion of an IPv4 address: 10.0.0.2 → fd4d::a00:2."""
    return str(NETWORK[int(ipaddress.IPv4Address(ip))])


def both(ip: str) -> list[str]:
    """Return an IPv4 address and its companion."""
    return [ip, companion(ip)]
