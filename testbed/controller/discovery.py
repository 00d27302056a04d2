"""Neighbour discovery for IPv6 over Ethernet (RFC 4861): read a solicitation, build the advertisement.

Bytes in, bytes out.
"""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import dataclass
from typing import Final

_ETHERNET: Final = struct.Struct("!6s6sH")
_IPV6: Final = struct.Struct("!IHBB16s16s")
"""Version, traffic class and flow label; payload length, next header, hop limit, source, destination."""
_MESSAGE: Final = struct.Struct("!BBHI16s")
"""Type, code, checksum, flags, target."""
_OPTION: Final = struct.Struct("!BB6s")
_ETHERTYPE: Final = 0x86DD
_ICMPV6: Final = 58
SOLICITATION: Final = 135
_ADVERTISEMENT: Final = 136
_SOLICITED_OVERRIDE: Final = 0x60000000
_TARGET_LINK_ADDRESS: Final = 2
_HOPS: Final = 255
"""Hop limit of every valid message of neighbour discovery; one that a router has forwarded has a lower one."""


@dataclass(frozen=True, slots=True)
class Solicitation:
    """One neighbour solicitation. MAC as bytes, addresses as text."""

    sender_mac: bytes
    sender_ip: str
    target_ip: str

    @classmethod
    def parse(cls, frame: bytes) -> Solicitation | None:
        """Parse a frame; returns None for anything else, and for duplicate address detection (from the address ::)."""
        if len(frame) < _ETHERNET.size + _IPV6.size + _MESSAGE.size:
            return None
        _, sender_mac, kind = _ETHERNET.unpack_from(frame)
        first, _, following, hops, sender, _ = _IPV6.unpack_from(frame, _ETHERNET.size)
        if kind != _ETHERTYPE or first >> 28 != 6 or following != _ICMPV6 or hops != _HOPS or not any(sender):
            return None
        message, code, _, _, target = _MESSAGE.unpack_from(frame, _ETHERNET.size + _IPV6.size)
        if message != SOLICITATION or code != 0:
            return None
        return cls(sender_mac, str(ipaddress.IPv6Address(sender)), str(ipaddress.IPv6Address(target)))


def advertise(question: Solicitation, mac: str) -> bytes | None:
    """The frame "`target_ip` is at `mac`", addressed to the sender; None if the sender has that MAC itself."""
    answer = bytes.fromhex(mac.replace(":", ""))
    if answer == question.sender_mac:
        return None
    target = ipaddress.IPv6Address(question.target_ip).packed
    asker = ipaddress.IPv6Address(question.sender_ip).packed
    option = _OPTION.pack(_TARGET_LINK_ADDRESS, 1, answer)
    body = _MESSAGE.pack(_ADVERTISEMENT, 0, 0, _SOLICITED_OVERRIDE, target) + option
    total = _checksum(target + asker + struct.pack("!II", len(body), _ICMPV6) + body)
    body = _MESSAGE.pack(_ADVERTISEMENT, 0, total, _SOLICITED_OVERRIDE, target) + option
    header = _IPV6.pack(6 << 28, len(body), _ICMPV6, _HOPS, target, asker)
    return _ETHERNET.pack(question.sender_mac, answer, _ETHERTYPE) + header + body


def _checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
