"""Independent judges of a capture: tshark's dissector, scapy's ICRC, and an ICRC written here from the specification.

Nothing of the NIC is imported: a check of the NIC's frames must not share its code.
"""

from __future__ import annotations

import struct
import subprocess
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ACKNOWLEDGE, RESUME = 0x11, 0x19
NAK_STOPPED = 0x65
ACK_REQ, SPEAKS_MIGROS, RESUME_ANSWER = 0x80, 0x40, 0x20

GUESSED_PAYLOADS = (
    "smc", "smb_direct", "rpcordma", "nvme-rdma", "lnet", "iser", "infiniband.eoib", "infiniband_sdp", "fcoib",
)  # fmt: skip
"""Protocols that tshark guesses from an RDMA payload; our payloads are test patterns, so no guess is right."""

_MAGIC = {
    b"\x4d\x3c\xb2\xa1": ("<", 1e-9),
    b"\xa1\xb2\x3c\x4d": (">", 1e-9),
    b"\xd4\xc3\xb2\xa1": ("<", 1e-6),
    b"\xa1\xb2\xc3\xd4": (">", 1e-6),
}


@dataclass(frozen=True, slots=True)
class Frame:
    """One captured Ethernet frame; `cut` if the capture kept only its beginning."""

    number: int
    """From 1, as tshark counts."""
    time: float
    data: bytes
    cut: bool

    @property
    def opcode(self) -> int:
        return self.data[42]

    @property
    def destination_qpn(self) -> int:
        return int.from_bytes(self.data[47:50])

    @property
    def flags(self) -> int:
        """BTH byte 8: AckReq and the reserved bits beside it."""
        return self.data[50]

    @property
    def psn(self) -> int:
        return int.from_bytes(self.data[51:54])

    @property
    def syndrome(self) -> int:
        """Of an ACKNOWLEDGE or RESUME."""
        return self.data[54]

    @property
    def source(self) -> str:
        return ".".join(str(byte) for byte in self.data[26:30])

    @property
    def destination(self) -> str:
        return ".".join(str(byte) for byte in self.data[30:34])


def frames(path: Path) -> Iterator[Frame]:
    """Every frame of a classic pcap of Ethernet frames. Raises ValueError for anything else or a torn file."""
    data = path.read_bytes()
    if data[:4] not in _MAGIC:
        raise ValueError(f"{path}: no pcap")
    order, tick = _MAGIC[data[:4]]
    if struct.unpack_from(order + "I", data, 20)[0] & 0xFFFF != 1:
        raise ValueError(f"{path}: not Ethernet")
    at, number = 24, 0
    while at < len(data):
        seconds, fraction, kept, length = struct.unpack_from(order + "IIII", data, at)
        at += 16
        if at + kept > len(data):
            raise ValueError(f"{path}: the last frame is torn")
        number += 1
        yield Frame(number, seconds + fraction * tick, data[at : at + kept], kept < length)
        at += kept


def icrc_is_right(frame: bytes) -> bool:
    """IBA volume 1 annex A17.3.3: CRC-32 over 64 ones and IPv4 … pad, variant fields as ones, stored little-endian."""
    end = 14 + int.from_bytes(frame[16:18])
    seen = bytearray(b"\xff" * 8) + frame[14 : end - 4]
    for offset in (1, 8, 10, 11, 26, 27, 32):  # TOS, TTL, IPv4 checksum, UDP checksum, BTH byte 4
        seen[8 + offset] = 0xFF
    return zlib.crc32(seen) == int.from_bytes(frame[end - 4 : end], "little")


def scapy_icrc_is_right(frame: bytes) -> bool:
    """The same by scapy's contrib module."""
    from scapy.contrib.roce import BTH
    from scapy.layers.l2 import Ether

    bth = Ether(frame)[BTH]
    return bool(bth.compute_icrc(b"") == bth.icrc.to_bytes(4, "big"))  # read as a number, whatever its order


def tshark(path: Path, *fields: str) -> list[list[str]]:
    """The given fields of every frame, as tshark prints them."""
    command = ["tshark", "-n", "-r", str(path), "-T", "fields", "-E", "separator=|", "-E", "occurrence=f"]
    for name in GUESSED_PAYLOADS:
        command += ["--disable-protocol", name]
    for field in fields:
        command += ["-e", field]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    return [line.split("|") for line in answer.stdout.splitlines()]


def complaints(path: Path) -> list[str]:
    """Frames that tshark cannot decode as InfiniBand or calls malformed, in words; empty when all are well.

    RESUME is no opcode that tshark knows (it shows the BTH and what follows as data), and that is all it may not know.
    """
    found = []
    rows = tshark(
        path, "frame.number", "frame.protocols", "infiniband.bth.opcode", "_ws.malformed", "_ws.expert.message"
    )
    for number, protocols, opcode, malformed, message in rows:
        if "infiniband" not in protocols.split(":"):
            found.append(f"frame {number}: not InfiniBand but {protocols}")
        elif malformed or "malformed" in message.lower():
            found.append(f"frame {number}, opcode {opcode}: {malformed or message}")
        elif int(opcode, 0) not in KNOWN and int(opcode, 0) != RESUME:
            found.append(f"frame {number}: unknown opcode {opcode}")
    return found


KNOWN = frozenset(range(0x15)) | {0x16, 0x17}
"""RC opcodes of the specification (table 38): 0x15 and those from 0x18 on are reserved."""
