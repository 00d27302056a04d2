"""Whole RoCEv2 frames: Ethernet + IPv4 or IPv6 + UDP + transport headers + payload + pad + ICRC.

A `Path` holds everything that is constant between two ends, precomputed; `build` writes one frame, `parse` validates
one and splits it into its parts. Both are on the hot path for IPv4; IPv6 is a branch on the Path's family and on the
Ethertype.
"""

from __future__ import annotations

from struct import Struct
from typing import Any, NamedTuple

from softroce_ext.wire.headers import PSN_MASK
from softroce_ext.wire.icrc import SEED_IPV4, SEED_IPV6, crc32
from softroce_ext.wire.opcodes import FLAGS, HEADERS_LENGTH, UNKNOWN, OpFlag
from softroce_ext.wire.path import ROCE_PORT, Path, address_text, datagram_source_port, udp_source_port

__all__ = [
    "FRAME_OVERHEAD",
    "FRAME_OVERHEAD_IPV6",
    "MAX_FRAME",
    "ROCE_PORT",
    "Buffer",
    "Packet",
    "Path",
    "address_text",
    "build",
    "datagram_source_port",
    "parse",
    "udp_source_port",
]

Buffer = bytes | bytearray | memoryview

FRAME_OVERHEAD = 14 + 20 + 8 + 4
"""Bytes of an IPv4 frame other than transport headers, payload and pad: Ethernet, IPv4, UDP, ICRC."""

FRAME_OVERHEAD_IPV6 = 14 + 40 + 8 + 4
"""Bytes of an IPv6 frame other than transport headers, payload and pad: Ethernet, IPv6, UDP, ICRC."""

MAX_FRAME = FRAME_OVERHEAD_IPV6 + 12 + 28 + 4096 + 3
"""Length in bytes of the longest frame that this NIC sends."""

# What `build` writes before the BTH: Ethernet .. TOS | length | identification | DF, TTL, UDP | checksum | addresses,
# ports | UDP length | UDP checksum (0: none).
_HEAD = Struct(">16sHHIH12sHH")
# The same fields as they enter the ICRC, after the ten bytes that the seed covers.
_MASKED = Struct(">HHIH12sHH")
_ICRC = Struct("<I")
# What `parse` reads: MACs, Ethertype, version/IHL, (TOS), IPv4 .. UDP, and the BTH's three words.
_FRAME = Struct(">6x6sHBxHHHxBH8sHHHHIII")
_MASKED_BTH = Struct(">HHHHH8sHHHHII")
_SHORTEST = 14 + 20 + 8 + 12 + 4
_HEADERS_AT = 54
_IPV4 = 0x0800
_IPV6 = 0x86DD
# IPv6: Ethernet, version/class/label | payload length, next header, hop limit | addresses, ports | UDP length, sum.
_HEAD6 = Struct(">18sHBB36sHH")
_MASKED6 = Struct(">HH36sHH")
# What `_parse_ipv6` reads: version/class/label, length, next header, addresses, UDP, and the BTH's three words.
_FRAME6 = Struct(">6x6s2xIHBx32sHHHHIII")
_MASKED_BTH6 = Struct(">HH32sHHHHII")
_SHORTEST6 = 14 + 40 + 8 + 12 + 4
_HEADERS_AT6 = 74
_PADS = (b"", b"\0", b"\0\0", b"\0\0\0")
_PAYLOAD = int(OpFlag.PAYLOAD)


class Packet(NamedTuple):
    """A frame that passed every check of `parse`. `payload` and `raw` are views that share the frame's buffer."""

    opcode: int
    first_word: int
    """First word of the BTH: opcode, flags, P_Key."""
    destination_qpn: int
    ack_byte: int
    """BTH byte 8: bit 0x80 is AckReq, the others are reserved (`headers.MIGROS_CAPABLE`, `MIGROS_RESUMED`)."""
    psn: int
    headers_at: int
    """Offset in `raw` of the headers after the BTH; the opcode table gives their length."""
    payload: memoryview
    """The payload, without pad and ICRC."""
    addresses: bytes
    """Source IP address followed by the destination's (4 + 4 or 16 + 16 bytes)."""
    source_mac: bytes
    raw: memoryview
    """A view of the whole frame."""

    @property
    def source_ip(self) -> bytes:
        """The source IP address, packed: 4 or 16 bytes."""
        return self.addresses[: len(self.addresses) // 2]

    @property
    def destination_ip(self) -> bytes:
        """The destination IP address, packed: 4 or 16 bytes."""
        return self.addresses[len(self.addresses) // 2 :]

    def grh(self) -> bytes:
        """The 40 bytes that precede a datagram's data (RoCEv2 annex A17.4.5.1): IPv6 header, or 20 zeros and IPv4's."""
        return bytes(self.raw[14:54]) if len(self.addresses) == 32 else bytes(20) + self.raw[14:34]


def build(
    path: Path,
    ip_id: int,
    headers: bytes,
    payload: Buffer,
    pad: int,
    out: memoryview,
    # Bound once and looked up as locals, because this function runs once per packet.
    _head: Any = _HEAD.pack_into,
    _masked: Any = _MASKED.pack,
    _icrc: Any = _ICRC.pack_into,
    _crc32: Any = crc32,
) -> int:
    """HOT. Write one frame to the beginning of `out` and return its length in bytes.

    headers: BTH and extended headers; payload: may be empty; pad: the number of zero bytes (0 to 3) that the BTH
    announces. `out` must be writable, of format B, and hold at least FRAME_OVERHEAD (FRAME_OVERHEAD_IPV6) +
    len(headers) + len(payload) + pad bytes.
    """
    if path.ipv6:
        return _build_ipv6(path, headers, payload, pad, out)
    end = 42 + len(headers)
    stop = end + len(payload)
    udp_length = stop + pad - 30
    total = udp_length + 20
    checksum = path._checksum + total + ip_id
    checksum = (checksum & 0xFFFF) + (checksum >> 16)
    checksum = (checksum & 0xFFFF) + (checksum >> 16)
    tail = path._tail
    _head(out, 0, path._head, total, ip_id, path._flags_ttl, checksum ^ 0xFFFF, tail, udp_length, 0)
    out[42:end] = headers
    if stop > end:
        out[end:stop] = payload
    if pad:
        out[stop : stop + pad] = _PADS[pad]
        stop += pad
    # The ICRC covers the BTH's fifth byte as ones, so it is set to ones during the calculation.
    out[46] = 0xFF
    masked = _masked(total, ip_id, path._flags_ttl_masked, 0xFFFF, tail, udp_length, 0xFFFF)
    crc = _crc32(out[42:stop], _crc32(masked, SEED_IPV4))
    out[46] = headers[4]
    _icrc(out, stop, crc)
    return stop + 4


def _build_ipv6(path: Path, headers: bytes, payload: Buffer, pad: int, out: memoryview) -> int:
    """HOT. `build` for IPv6; the UDP checksum is 0 (rxe sends none on IPv6 either)."""
    end = 62 + len(headers)
    stop = end + len(payload)
    udp_length = stop + pad - 50
    tail = path._tail
    _HEAD6.pack_into(out, 0, path._head, udp_length, 17, path.hop_limit, tail, udp_length, 0)
    out[62:end] = headers
    if stop > end:
        out[end:stop] = payload
    if pad:
        out[stop : stop + pad] = _PADS[pad]
        stop += pad
    out[66] = 0xFF
    crc = crc32(out[62:stop], crc32(_MASKED6.pack(udp_length, 0x11FF, tail, udp_length, 0xFFFF), SEED_IPV6))
    out[66] = headers[4]
    _ICRC.pack_into(out, stop, crc)
    return stop + 4


def parse(
    frame: memoryview,
    _unpack: Any = _FRAME.unpack_from,
    _masked: Any = _MASKED_BTH.pack,
    _icrc: Any = _ICRC.unpack_from,
    _crc32: Any = crc32,
    _lengths: bytes = HEADERS_LENGTH,
    _flags: tuple[int, ...] = FLAGS,
    _new: Any = tuple.__new__,
) -> Packet | str:
    """HOT. Validate a received frame and return its Packet, or the reason for rejecting it (the name of a counter).

    Reasons: not_roce, ip_header, ip_fragment, length, udp_checksum, bth_version, opcode, icrc. Bytes after the IP
    datagram (Ethernet padding) are allowed.
    """
    size = len(frame)
    if size < _SHORTEST:
        return "length"
    # fmt: off
    (source_mac, ethertype, version, total, ip_id, fragment, protocol, _, addresses, source_port, port,
     udp_length, udp_checksum, first, second, third) = _unpack(frame)
    # fmt: on
    if ethertype != _IPV4:
        return _parse_ipv6(frame) if ethertype == _IPV6 else "not_roce"
    if version != 0x45:
        return "ip_header"
    if protocol != 17 or port != ROCE_PORT:
        return "not_roce"
    if fragment & 0x3FFF:
        return "ip_fragment"
    end = total + 10  # offset of the ICRC
    if end + 4 > size or udp_length != total - 20 or total & 3:
        return "length"
    # The header of a valid datagram is a multiple of 0xffff, because its one's-complement sum is.
    if int.from_bytes(frame[14:34]) % 0xFFFF:
        return "ip_header"
    if udp_checksum and not _udp_checksum_valid(frame, addresses, udp_length):
        return "udp_checksum"
    if first & 0x0F0000:
        return "bth_version"
    opcode = first >> 24
    headers_length = _lengths[opcode]
    if headers_length == UNKNOWN:
        return "opcode"
    payload_at = _HEADERS_AT + headers_length
    payload_end = end - (first >> 20 & 3)
    if payload_at > payload_end or (payload_at != end and not _flags[opcode] & _PAYLOAD):
        return "length"
    masked = _masked(
        total, ip_id, fragment, 0xFF11, 0xFFFF, addresses, source_port, port, udp_length, 0xFFFF, first,
        second | 0xFF000000,
    )  # fmt: skip
    if _icrc(frame, end)[0] != _crc32(frame[50:end], _crc32(masked, SEED_IPV4)):
        return "icrc"
    packet: Packet = _new(
        Packet,
        (
            opcode,
            first,
            second & 0xFFFFFF,
            third >> 24,
            third & PSN_MASK,
            _HEADERS_AT,
            frame[payload_at:payload_end],
            addresses,
            source_mac,
            frame,
        ),
    )
    return packet


def _parse_ipv6(frame: memoryview) -> Packet | str:
    """HOT. `parse` for IPv6. Extension headers are rejected, as RoCEv2 has none (RoCEv2 annex A17.3.1)."""
    # The checks from the UDP checksum on repeat those of `parse`: a shared function would cost a call per packet.
    size = len(frame)
    if size < _SHORTEST6:
        return "length"
    # fmt: off
    (source_mac, version, udp_total, next_header, addresses, source_port, port, udp_length, udp_checksum, first,
     second, third) = _FRAME6.unpack_from(frame)
    # fmt: on
    if version >> 28 != 6:
        return "ip_header"
    if next_header != 17 or port != ROCE_PORT:
        return "not_roce"
    end = udp_total + 50  # offset of the ICRC
    if end + 4 > size or udp_length != udp_total or udp_total & 3 or udp_total < 24:
        return "length"
    if udp_checksum and not _udp_checksum_valid(frame, addresses, udp_length):
        return "udp_checksum"
    if first & 0x0F0000:
        return "bth_version"
    opcode = first >> 24
    headers_length = HEADERS_LENGTH[opcode]
    if headers_length == UNKNOWN:
        return "opcode"
    payload_at = _HEADERS_AT6 + headers_length
    payload_end = end - (first >> 20 & 3)
    if payload_at > payload_end or (payload_at != end and not FLAGS[opcode] & _PAYLOAD):
        return "length"
    masked = _MASKED_BTH6.pack(
        udp_total, 0x11FF, addresses, source_port, port, udp_length, 0xFFFF, first, second | 0xFF000000
    )
    if _ICRC.unpack_from(frame, end)[0] != crc32(frame[70:end], crc32(masked, SEED_IPV6)):
        return "icrc"
    return Packet(
        opcode, first, second & 0xFFFFFF, third >> 24, third & PSN_MASK, _HEADERS_AT6, frame[payload_at:payload_end],
        addresses, source_mac, frame,
    )  # fmt: skip


def _udp_checksum_valid(frame: memoryview, addresses: bytes, udp_length: int) -> bool:
    """Whether the UDP checksum is correct. Rarely called, since RoCEv2 senders leave the field 0."""
    begin = 34 if len(addresses) == 8 else 54
    datagram = bytes(frame[begin : begin + udp_length])
    pseudo = addresses + b"\x00\x11" + udp_length.to_bytes(2, "big")
    return int.from_bytes(pseudo + datagram + b"\0" * (udp_length & 1)) % 0xFFFF == 0
