"""The IPv6 address beside each IPv4 address of the data network: its last 32 bits are the IPv4 address.

Both belong together: where one is added, moved or removed, the other is.
"""

from __future__ import annotations

import ipaddress
from typing import Final

NETWORK: Final = ipaddress.IPv6Network("fd4d::/64")
"""Of local meaning only (RFC 4193)."""


def companion(ip: str) -> str:
    """10.0.0.2 → fd4d::a00:2."""
    return str(NETWORK[int(ipaddress.IPv4Address(ip))])


def both(ip: str) -> list[str]:
    """An address and the one beside it."""
    return [ip, companion(ip)]
