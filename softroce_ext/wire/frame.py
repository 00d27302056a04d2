"""Whole RoCEv2 frames: Ethernet + IPv4 + UDP + transport headers + payload + pad + ICRC.

`Path` is everything that stays the same between two ends, precomputed; `build` writes one frame, `parse` checks and
takes one apart. Both are hot. IPv6 will be a second Path template and a second branch on the Ethertype.
"""

from __future__ import annotations

from typing import NamedTuple

Buffer = bytes | bytearray | memoryview


class Path:
    """One direction between two addresses: MACs, IPs, UDP source port, traffic class and hop limit, as templates.

    Addresses are packed bytes (6 for a MAC, 4 for IPv4). `ip_id` is the IPv4 identification that the next frame gets
    (u16); whoever builds a frame takes it and stores the next one. Paths compare equal when their addresses, ports and
    traffic class do, whatever their `ip_id`.
    """

    __slots__ = (
        "destination_ip",
        "destination_mac",
        "hop_limit",
        "ip_id",
        "source_ip",
        "source_mac",
        "traffic_class",
        "udp_source_port",
    )

    def __init__(
        self,
        source_mac: bytes,
        destination_mac: bytes,
        source_ip: bytes,
        destination_ip: bytes,
        udp_source_port: int,
        traffic_class: int = 0,
        hop_limit: int = 64,
        ip_id: int = 0,
    ) -> None:
        """Raises ValueError for an address of the wrong length or a number out of its range."""
        raise NotImplementedError

    def replace(
        self,
        *,
        source_mac: bytes | None = None,
        destination_mac: bytes | None = None,
        source_ip: bytes | None = None,
        destination_ip: bytes | None = None,
        udp_source_port: int | None = None,
    ) -> Path:
        """A copy with some fields changed (`ip_id` goes on where it was)."""
        raise NotImplementedError

    def to_plain(self) -> dict[str, int | str]:
        """Plain JSON-able data (addresses in hexadecimal)."""
        raise NotImplementedError

    @classmethod
    def from_plain(cls, plain: dict[str, int | str]) -> Path:
        """The inverse of `to_plain`. Raises ValueError or KeyError when `plain` is not one."""
        raise NotImplementedError


class Packet(NamedTuple):
    """A frame that passed every check of `parse`. Views into the frame: valid as long as the frame's buffer is."""

    opcode: int
    solicited: bool
    ack_byte: int
    """BTH byte 8: bit 0x80 AckReq, the rest reserved (MigrOS uses 0x40 and 0x20)."""
    pkey: int
    destination_qpn: int
    psn: int
    headers: memoryview
    """The extended transport headers after the BTH (RETH, AETH, …), as long as the opcode table says."""
    payload: memoryview
    """Without pad and ICRC."""
    source_ip: bytes
    destination_ip: bytes
    source_mac: bytes
    raw: memoryview
    """The whole frame."""


def udp_source_port(flow_label: int, local_qpn: int, remote_qpn: int) -> int:
    """The UDP source port of an RC or UC connection, as Linux rxe chooses it (the same from both ends).

    0xC000 | fold14(flow label); a flow label of 0 is first made from both QPNs.
    """
    raise NotImplementedError


def build(path: Path, ip_id: int, headers: bytes, payload: Buffer, pad: int, out: memoryview) -> int:
    """HOT. Write one frame into `out` (at offset 0) and return its length in bytes.

    headers: BTH and extended headers; payload: may be empty; pad: 0..3 zero bytes that the BTH announces. `out` must be
    writable, format B, and at least `FRAME_OVERHEAD + len(headers) + len(payload) + pad` long (else ValueError).
    """
    raise NotImplementedError


FRAME_OVERHEAD = 14 + 20 + 8 + 4
"""Bytes of a frame besides transport headers, payload and pad: Ethernet, IPv4, UDP, ICRC."""

MAX_FRAME = FRAME_OVERHEAD + 12 + 28 + 4096 + 3
"""The longest frame that this NIC sends."""


def parse(frame: memoryview) -> Packet | str:
    """HOT. Check a received frame; return its Packet, or the reason for refusing it (a counter's name).

    Reasons: not_roce, ip_header, ip_fragment, length, udp_checksum, bth_version, opcode, icrc.
    """
    raise NotImplementedError
