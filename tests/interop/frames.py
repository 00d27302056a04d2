"""Judges what our NIC has sent: frames of a capture against what Linux rxe sends.

What rxe sends was taken from captures of two rxe guests (tests/data/vectors): the opcodes of its requester, responder
and connection manager, no reserved bit, no MigReq, transport version 0, the full P_Key, DF set and a hop limit of 64,
no UDP checksum, a pad that is zero and a right ICRC. A NIC that speaks MigrOS sets one reserved bit besides,
0x40 beside AckReq, in the packets of reliable connections (docs/wire-protocol.md).
"""

from __future__ import annotations

import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from softroce_ext.wire.headers import MIGROS_CAPABLE
from softroce_ext.wire.opcodes import TABLE, name_of

RESUME = 0x19
RXE_OPCODES = frozenset(TABLE) - {RESUME}
"""Every opcode of RC, UC and UD that rxe's table has and its requester or responder can send."""


def frames(path: Path) -> Iterator[bytes]:
    """The frames of a pcap as the relay writes it."""
    data = path.read_bytes()
    at = 24
    while at + 16 <= len(data):
        (length,) = struct.unpack_from("<I", data, at + 8)
        yield data[at + 16 : at + 16 + length]
        at += 16 + length


def faults(frame: bytes, migros: bool) -> list[str]:
    """What in a RoCE frame rxe would not have sent; empty if nothing."""
    four = frame[12:14] == b"\x08\x00"
    udp = 34 if four else 54
    bth = udp + 8
    opcode, flags, pkey, word, psn = struct.unpack_from(">BBHII", frame, bth)
    found = []
    if opcode not in RXE_OPCODES:
        found.append(f"opcode {name_of(opcode)}")
    reserved = psn >> 24 & 0x7F
    if migros and opcode < 0x20:
        reserved &= ~MIGROS_CAPABLE
    if reserved:
        found.append(f"reserved bits {reserved:#04x} beside AckReq")
    if word >> 24:
        found.append(f"FECN, BECN or reserved bits {word >> 24:#04x}")
    if flags & 0x4F:
        found.append(f"MigReq or transport version in {flags:#04x}")
    if pkey != 0xFFFF:
        found.append(f"P_Key {pkey:#06x}")
    (length,) = struct.unpack_from(">H", frame, 16 if four else 18)
    end = 14 + length + (0 if four else 40)
    if len(frame) != end:
        found.append(f"{len(frame)} bytes, the IP header says {end}")
    if struct.unpack_from(">HH", frame, udp + 4) != (end - udp, 0):
        found.append("UDP length or checksum")
    if frame[22 if four else 21] != 64:
        found.append("hop limit")
    if four and struct.unpack_from(">H", frame, 20)[0] != 0x4000:
        found.append("not DF alone")
    pad = flags >> 4 & 3
    if any(frame[end - 4 - pad : end - 4]):
        found.append("pad is not zero")
    if _icrc(frame[14:end], four) != frame[end - 4 : end]:
        found.append("ICRC")
    return found


def _icrc(packet: bytes, four: bool) -> bytes:
    """IBA annex A17.3.3: what routers may change is read as ones. Computed apart from the NIC's own code."""
    masked = bytearray(packet[:-4])
    udp = 20 if four else 40
    if four:
        masked[1] = masked[8] = 0xFF
        masked[10:12] = b"\xff\xff"
    else:
        masked[0] |= 0x0F
        masked[1:4] = b"\xff\xff\xff"
        masked[7] = 0xFF
    masked[udp + 6 : udp + 8] = b"\xff\xff"
    masked[udp + 12] = 0xFF
    return zlib.crc32(b"\xff" * 8 + bytes(masked)).to_bytes(4, "little")


def judge(path: Path, source_mac: bytes, migros: bool) -> tuple[Counter[str], list[str]]:
    """(frames from this MAC by opcode, faults as `number opcode: fault: hex of the frame's beginning`)."""
    seen: Counter[str] = Counter()
    wrong: list[str] = []
    for number, frame in enumerate(frames(path), 1):
        if frame[6:12] != source_mac:
            continue
        bth = 42 if frame[12:14] == b"\x08\x00" else 62
        name = name_of(frame[bth])
        seen[name] += 1
        wrong += [f"frame {number} {name}: {fault}: {frame[:96].hex()}" for fault in faults(frame, migros)]
    return seen, wrong
