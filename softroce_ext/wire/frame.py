"""Whole RoCEv2 frames: Ethernet + IPv4 + UDP + transport headers + payload + pad + ICRC.

`Path` is everything that stays the same between two ends, precomputed; `build` writes one frame, `parse` checks and
takes one apart. Both are hot. IPv6 will be a second template in Path and a second branch on the Ethertype.
"""

from __future__ import annotations

from struct import Struct
from typing import Any, NamedTuple

from softroce_ext.wire.headers import PSN_MASK
from softroce_ext.wire.icrc import SEED_IPV4, crc32
from softroce_ext.wire.opcodes import FLAGS, HEADERS_LENGTH, UNKNOWN, OpFlag

Buffer = bytes | bytearray | memoryview

ROCE_PORT = 4791
"""UDP destination port of RoCEv2 (IANA)."""

FRAME_OVERHEAD = 14 + 20 + 8 + 4
"""Bytes of a frame besides transport headers, payload and pad: Ethernet, IPv4, UDP, ICRC."""

MAX_FRAME = FRAME_OVERHEAD + 12 + 28 + 4096 + 3
"""The longest frame that this NIC sends, bytes."""

# What `build` writes before the BTH: Ethernet .. TOS | length | identification | DF, TTL, UDP | checksum | addresses,
# ports | UDP length | UDP checksum (0: none).
_HEAD = Struct(">16sHHIH12sHH")
# The same as the ICRC sees it, after the seed's ten bytes.
_MASKED = Struct(">HHIH12sHH")
_ICRC = Struct("<I")
# What `parse` reads: MACs, Ethertype, version/IHL, (TOS), IPv4 .. UDP, and the BTH's three words.
_FRAME = Struct(">6x6sHBxHHHxBH8sHHHHIII")
_MASKED_BTH = Struct(">HHHHH8sHHHHII")
_SHORTEST = 14 + 20 + 8 + 12 + 4
_BTH_AT = 42
_HEADERS_AT = 54
_IPV4 = 0x0800
_DF = 0x4000 << 16
_PADS = (b"", b"\0", b"\0\0", b"\0\0\0")
_PAYLOAD = int(OpFlag.PAYLOAD)


class Path:
    """One direction between two addresses: MACs, IPs, UDP source port, traffic class and hop limit, as templates.

    Addresses are packed bytes (6 for a MAC, 4 for IPv4). `ip_id` is the IPv4 identification that the next frame gets
    (u16); whoever builds a frame takes it and stores the next one. Everything else is fixed: a changed path is a new
    one. Paths compare equal when their addresses, port, traffic class and hop limit do, whatever their `ip_id`.
    """

    __slots__ = (
        "_checksum",
        "_flags_ttl",
        "_flags_ttl_masked",
        "_head",
        "_tail",
        "answers_from",
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
        if len(source_mac) != 6 or len(destination_mac) != 6:
            raise ValueError("a MAC address has 6 bytes")
        if len(source_ip) != 4 or len(destination_ip) != 4:
            raise ValueError("an IPv4 address has 4 bytes")
        if not (0 <= udp_source_port <= 0xFFFF and 0 <= ip_id <= 0xFFFF):
            raise ValueError("UDP port and IP identification are 16 bits")
        if not (0 <= traffic_class <= 0xFF and 0 <= hop_limit <= 0xFF):
            raise ValueError("traffic class and hop limit are 8 bits")
        self.source_mac = bytes(source_mac)
        self.destination_mac = bytes(destination_mac)
        self.source_ip = bytes(source_ip)
        self.destination_ip = bytes(destination_ip)
        self.udp_source_port = udp_source_port
        self.traffic_class = traffic_class
        self.hop_limit = hop_limit
        self.ip_id = ip_id
        self.answers_from = self.destination_ip + self.source_ip
        """What `Packet.addresses` is for a packet that comes back along this path."""
        self._head = self.destination_mac + self.source_mac + b"\x08\x00\x45" + bytes((traffic_class,))
        self._flags_ttl = _DF | hop_limit << 8 | 17
        self._flags_ttl_masked = _DF | 0xFF11
        self._tail = (
            self.source_ip + self.destination_ip + udp_source_port.to_bytes(2, "big") + ROCE_PORT.to_bytes(2, "big")
        )
        # The IPv4 checksum is a sum of 16-bit words: all but length and identification are known here.
        words = self.source_ip + self.destination_ip
        self._checksum = (
            0x4500
            + traffic_class
            + 0x4000
            + (hop_limit << 8 | 17)
            + sum(words[i] << 8 | words[i + 1] for i in range(0, 8, 2))
        )

    def _key(self) -> tuple[object, ...]:
        return (self._head, self._tail, self.hop_limit)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Path) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        source, destination = (".".join(map(str, ip)) for ip in (self.source_ip, self.destination_ip))
        return f"<Path {source}:{self.udp_source_port} → {destination}>"

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
        return Path(
            self.source_mac if source_mac is None else source_mac,
            self.destination_mac if destination_mac is None else destination_mac,
            self.source_ip if source_ip is None else source_ip,
            self.destination_ip if destination_ip is None else destination_ip,
            self.udp_source_port if udp_source_port is None else udp_source_port,
            self.traffic_class,
            self.hop_limit,
            self.ip_id,
        )

    def to_plain(self) -> dict[str, int | str]:
        """Plain JSON-able data (addresses in hexadecimal)."""
        return {
            "source_mac": self.source_mac.hex(),
            "destination_mac": self.destination_mac.hex(),
            "source_ip": self.source_ip.hex(),
            "destination_ip": self.destination_ip.hex(),
            "udp_source_port": self.udp_source_port,
            "traffic_class": self.traffic_class,
            "hop_limit": self.hop_limit,
            "ip_id": self.ip_id,
        }

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Path:
        """The inverse of `to_plain`. Raises ValueError when `plain` is not one."""
        try:
            return cls(
                bytes.fromhex(plain["source_mac"]),
                bytes.fromhex(plain["destination_mac"]),
                bytes.fromhex(plain["source_ip"]),
                bytes.fromhex(plain["destination_ip"]),
                int(plain["udp_source_port"]),
                int(plain["traffic_class"]),
                int(plain["hop_limit"]),
                int(plain["ip_id"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a dumped path: {error!r}") from None


class Packet(NamedTuple):
    """A frame that passed all checks of `parse`. `payload` and `raw` are views, valid as long as the frame's buffer."""

    opcode: int
    first_word: int
    """BTH: opcode, flags, P_Key."""
    destination_qpn: int
    ack_byte: int
    """BTH byte 8: bit 0x80 AckReq, the rest reserved (`headers.MIGROS_CAPABLE`, `MIGROS_RESUMED`)."""
    psn: int
    headers_at: int
    """Offset in `raw` of the headers after the BTH; they are as long as the opcode table says."""
    payload: memoryview
    """Without pad and ICRC."""
    addresses: bytes
    """Source then destination IP address (4 + 4 bytes)."""
    source_mac: bytes
    raw: memoryview
    """The whole frame."""

    @property
    def source_ip(self) -> bytes:
        """4 bytes."""
        return self.addresses[: len(self.addresses) // 2]


def udp_source_port(flow_label: int, local_qpn: int, remote_qpn: int) -> int:
    """The UDP source port of an RC or UC connection, as Linux rxe chooses it (the same from both ends).

    A flow label of 0 is first made from both QPNs; then its 20 bits are folded to 14 under 0xC000.
    """
    if flow_label == 0:
        flow_label = local_qpn * remote_qpn
        flow_label ^= flow_label >> 20
        flow_label ^= flow_label >> 40
    flow_label &= 0xFFFFF
    return 0xC000 | ((flow_label & 0x3FFF) ^ (flow_label >> 14))


def build(
    path: Path,
    ip_id: int,
    headers: bytes,
    payload: Buffer,
    pad: int,
    out: memoryview,
    # Bound once, looked up as locals: this function runs once per packet.
    _head: Any = _HEAD.pack_into,
    _masked: Any = _MASKED.pack,
    _icrc: Any = _ICRC.pack_into,
    _crc32: Any = crc32,
) -> int:
    """HOT. Write one frame at the beginning of `out` and return its length in bytes.

    headers: BTH and extended headers; payload: bytes, may be empty; pad: 0..3 zero bytes that the BTH announces. `out`
    is writable, format B, at least FRAME_OVERHEAD + len(headers) + len(payload) + pad long.
    """
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
    # The ICRC sees the BTH's fifth byte as ones: set it for the moment of the calculation.
    out[46] = 0xFF
    masked = _masked(total, ip_id, path._flags_ttl_masked, 0xFFFF, tail, udp_length, 0xFFFF)
    crc = _crc32(out[42:stop], _crc32(masked, SEED_IPV4))
    out[46] = headers[4]
    _icrc(out, stop, crc)
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
    """HOT. Check a received frame; return its Packet, or the reason for refusing it (a counter's name).

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
        return "not_roce"
    if version != 0x45:
        return "ip_header"
    if protocol != 17 or port != ROCE_PORT:
        return "not_roce"
    if fragment & 0x3FFF:
        return "ip_fragment"
    end = total + 10  # where the ICRC begins
    if end + 4 > size or udp_length != total - 20 or total & 3:
        return "length"
    # A right header is a multiple of 0xffff, as its one's-complement sum says.
    if int.from_bytes(frame[14:34]) % 0xFFFF:
        return "ip_header"
    if udp_checksum and not _udp_checksum_right(frame, addresses, udp_length):
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


def _udp_checksum_right(frame: memoryview, addresses: bytes, udp_length: int) -> bool:
    """Whether the UDP checksum is right. Rare: RoCEv2 senders leave it 0, so this need not be fast."""
    datagram = bytes(frame[34 : 34 + udp_length])
    pseudo = addresses + b"\x00\x11" + udp_length.to_bytes(2, "big")
    return int.from_bytes(pseudo + datagram + b"\0" * (udp_length & 1)) % 0xFFFF == 0
