"""ARP for IPv4 over Ethernet (RFC 826): read a request, build the answer. Bytes in, bytes out."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

_FRAME: Final = struct.Struct("!6s6sH HHBBH 6sI6sI")
"""Ethernet header; hardware and protocol type, their lengths, operation; sender MAC and IP, target MAC and IP."""
_SHORTEST: Final = 60
"""Bytes of the smallest Ethernet frame, without its check sequence."""
_ETHERTYPE: Final = 0x0806
_ETHERNET, _IPV4, _REQUEST, _REPLY = 1, 0x0800, 1, 2


@dataclass(frozen=True, slots=True)
class ArpFrame:
    """One ARP frame. MACs as bytes, addresses as integers."""

    operation: int
    sender_mac: bytes
    sender_ip: int
    target_ip: int

    @property
    def is_request(self) -> bool:
        """Whether the frame asks for a MAC."""
        return self.operation == _REQUEST

    @classmethod
    def parse(cls, frame: bytes) -> ArpFrame | None:
        """Parse a frame; returns None for anything but ARP for IPv4 over untagged Ethernet."""
        if len(frame) < _FRAME.size:
            return None
        _, _, *kind, operation, mac, ip, _, target = _FRAME.unpack_from(frame)
        if tuple(kind) != (_ETHERTYPE, _ETHERNET, _IPV4, 6, 4):
            return None
        return cls(operation, mac, ip, target)


def reply_to(request: ArpFrame, mac: str) -> bytes | None:
    """The frame "`target_ip` is at `mac`", addressed to the sender of the request.

    None if the sender has that MAC itself: its request is then duplicate address detection or a gratuitous
    announcement, and a reply would look like a conflict.
    """
    answer = bytes.fromhex(mac.replace(":", ""))
    if answer == request.sender_mac:
        return None
    return _FRAME.pack(
        request.sender_mac,
        answer,
        _ETHERTYPE,
        _ETHERNET,
        _IPV4,
        6,
        4,
        _REPLY,
        answer,
        request.target_ip,
        request.sender_mac,
        request.sender_ip,
    ).ljust(_SHORTEST, b"\0")
