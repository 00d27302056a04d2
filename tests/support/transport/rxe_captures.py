"""The captures of Linux rxe under tests/data/vectors, and a reader for classic pcap files."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

from softroce_ext.wire.frame import Packet, parse
from softroce_ext.wire.path import Path as WirePath

VECTORS = Path(__file__).parents[2] / "data" / "vectors"
SIDE_A = bytes((10, 77, 0, 1))
SIDE_B = bytes((10, 77, 0, 2))


class Captured(NamedTuple):
    """One frame: seconds since the first one, and its bytes from the Ethernet header on."""

    time: float
    frame: bytes

    @property
    def ipv6(self) -> bool:
        return self.frame[12:14] == b"\x86\xdd"

    @property
    def bth_at(self) -> int:
        return 62 if self.ipv6 else 42

    @property
    def source(self) -> bytes:
        return self.frame[22:38] if self.ipv6 else self.frame[26:30]

    @property
    def destination(self) -> bytes:
        return self.frame[38:54] if self.ipv6 else self.frame[30:34]

    @property
    def traffic_class(self) -> int:
        return int.from_bytes(self.frame[14:16], "big") >> 4 & 0xFF if self.ipv6 else self.frame[15]

    @property
    def hop_limit(self) -> int:
        return self.frame[21] if self.ipv6 else self.frame[22]

    @property
    def udp_source_port(self) -> int:
        return int.from_bytes(self.frame[self.bth_at - 8 : self.bth_at - 6], "big")

    @property
    def ip_id(self) -> int:
        return 0 if self.ipv6 else int.from_bytes(self.frame[18:20], "big")

    @property
    def opcode(self) -> int:
        return self.frame[self.bth_at]

    @property
    def destination_qpn(self) -> int:
        return int.from_bytes(self.frame[self.bth_at + 5 : self.bth_at + 8], "big")

    @property
    def psn(self) -> int:
        return int.from_bytes(self.frame[self.bth_at + 9 : self.bth_at + 12], "big")


def read(name: str) -> list[Captured]:
    """All frames of a capture, in its order (which is by time)."""
    raw = (VECTORS / f"{name}.pcap").read_bytes()
    magic, *_, link_type = struct.unpack_from("<IHHiIII", raw)
    assert magic == 0xA1B2C3D4 and link_type == 1, "not a little-endian Ethernet pcap with microseconds"
    at = 24
    frames = []
    while at < len(raw):
        seconds, micros, captured, original = struct.unpack_from("<IIII", raw, at)
        assert captured == original, "a frame was cut off"
        frames.append(Captured(seconds + micros / 1e6, raw[at + 16 : at + 16 + captured]))
        at += 16 + captured
    return [frame._replace(time=frame.time - frames[0].time) for frame in frames]


def names() -> list[str]:
    """The names of all captures."""
    return sorted(path.stem for path in VECTORS.glob("*.pcap"))


def parsed(frame: bytes) -> Packet:
    packet = parse(memoryview(frame))
    assert not isinstance(packet, str), packet
    return packet


def path_of(captured: Captured) -> WirePath:
    return WirePath(
        captured.frame[6:12], captured.frame[0:6], captured.source, captured.destination, captured.udp_source_port,
        captured.traffic_class, captured.hop_limit,
    )  # fmt: skip
