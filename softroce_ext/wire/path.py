"""The path of a connection's frames: addresses, ports and every other field that is the same in all of its packets.

This module also has the rules by which Linux rxe chooses UDP source ports (`docs/wire-protocol.md`).
"""

from __future__ import annotations

from typing import Any

ROCE_PORT = 4791
"""UDP destination port of RoCEv2 (IANA)."""

_DF = 0x4000 << 16


class Path:
    """One direction between two addresses: MACs, IPs, UDP source port, traffic class and hop limit, as templates.

    Addresses are packed bytes (6 for a MAC, 4 for IPv4, 16 for IPv6; both ends are of one family). `ip_id` is the IPv4
    identification of the next frame (u16; IPv6 has none); the caller of `build` takes it and stores the next one.
    Everything else is immutable: a changed path is a new object. Paths compare equal when their addresses, port,
    traffic class and hop limit do, regardless of `ip_id`. IPv6's flow label is 0, as Linux rxe sends it.
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
        "ipv6",
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
        """Raises ValueError for an address of the wrong length or a number that is out of range."""
        if len(source_mac) != 6 or len(destination_mac) != 6:
            raise ValueError(f"MAC addresses of {len(source_mac)} and {len(destination_mac)} bytes; allowed: 6")
        if len(source_ip) != len(destination_ip) or len(source_ip) not in (4, 16):
            raise ValueError(
                f"IP addresses of {len(source_ip)} and {len(destination_ip)} bytes; allowed: 4 (IPv4) or 16 (IPv6), "
                "the same at both ends"
            )
        if not (0 <= udp_source_port <= 0xFFFF and 0 <= ip_id <= 0xFFFF):
            raise ValueError(f"UDP source port {udp_source_port}, IP identification {ip_id}; allowed: 0 to 65535")
        if not (0 <= traffic_class <= 0xFF and 0 <= hop_limit <= 0xFF):
            raise ValueError(f"traffic class {traffic_class}, hop limit {hop_limit}; allowed: 0 to 255")
        self.source_mac = bytes(source_mac)
        self.destination_mac = bytes(destination_mac)
        self.source_ip = bytes(source_ip)
        self.destination_ip = bytes(destination_ip)
        self.udp_source_port = udp_source_port
        self.traffic_class = traffic_class
        self.hop_limit = hop_limit
        self.ip_id = ip_id
        self.answers_from = self.destination_ip + self.source_ip
        """Value of `Packet.addresses` in a packet that comes from this path's destination."""
        self.ipv6 = len(self.source_ip) == 16
        ethernet = self.destination_mac + self.source_mac
        self._tail = (
            self.source_ip + self.destination_ip + udp_source_port.to_bytes(2, "big") + ROCE_PORT.to_bytes(2, "big")
        )
        self._flags_ttl = self._flags_ttl_masked = self._checksum = 0
        if self.ipv6:
            self._head = ethernet + b"\x86\xdd" + (6 << 28 | traffic_class << 20).to_bytes(4, "big")
            return
        self._head = ethernet + b"\x08\x00\x45" + bytes((traffic_class,))
        self._flags_ttl = _DF | hop_limit << 8 | 17
        self._flags_ttl_masked = _DF | 0xFF11
        # The IPv4 checksum is a sum of 16-bit words, of which only length and identification are not yet known.
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
        source, destination = (address_text(ip) for ip in (self.source_ip, self.destination_ip))
        return f"<Path {source} port {self.udp_source_port} → {destination}>"

    def replace(
        self,
        *,
        source_mac: bytes | None = None,
        destination_mac: bytes | None = None,
        source_ip: bytes | None = None,
        destination_ip: bytes | None = None,
        udp_source_port: int | None = None,
    ) -> Path:
        """A copy of this path with some fields changed; it continues this path's `ip_id`."""
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
        """This path as data that JSON can represent (addresses in hexadecimal)."""
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
        """The inverse of `to_plain`. Raises ValueError when `plain` does not describe a path."""
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


def address_text(address: bytes) -> str:
    """An IP address of 4 or 16 bytes as text; IPv6 uncompressed, as eight groups without leading zeros."""
    if len(address) == 4:
        return ".".join(map(str, address))
    return ":".join(f"{address[at] << 8 | address[at + 1]:x}" for at in range(0, 16, 2))


def udp_source_port(flow_label: int, local_qpn: int, remote_qpn: int) -> int:
    """The UDP source port of an RC or UC connection, as Linux rxe chooses it (the same at both ends).

    A flow label of 0 is first replaced by one derived from both QPNs; then its 20 bits are folded to 14, above 0xC000.
    """
    if flow_label == 0:
        flow_label = local_qpn * remote_qpn
        flow_label ^= flow_label >> 20
        flow_label ^= flow_label >> 40
    flow_label &= 0xFFFFF
    return 0xC000 | ((flow_label & 0x3FFF) ^ (flow_label >> 14))


def datagram_source_port(qpn: int) -> int:
    """The UDP source port of a UD queue pair or of QP1, as Linux rxe chooses it: a hash of its QPN."""
    return 0xC000 + ((qpn * 0x61C88647 & 0xFFFFFFFF) >> 18)
