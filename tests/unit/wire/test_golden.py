"""Invariant: every frame that Linux rxe sent is read without refusal, and built again from its parts byte by byte."""

from __future__ import annotations

import zlib

import pytest
import rxe_captures as captures

from softroce_ext.wire import icrc, opcodes
from softroce_ext.wire.frame import MAX_FRAME, Path, build, parse, udp_source_port
from softroce_ext.wire.opcodes import OpFlag


@pytest.mark.parametrize("name", captures.names())
def test_capture_is_parsed_and_rebuilt(name: str) -> None:
    frames = captures.read(name)
    assert frames
    out = memoryview(bytearray(MAX_FRAME))
    for captured in frames:
        frame = captured.frame
        packet = parse(memoryview(frame))
        assert not isinstance(packet, str), f"refused: {packet}"
        path = Path(
            frame[6:12], frame[0:6], frame[26:30], frame[30:34], int.from_bytes(frame[34:36]), frame[15], frame[22]
        )
        headers_end = 54 + opcodes.HEADERS_LENGTH[packet.opcode]
        pad = packet.first_word >> 20 & 3
        length = build(path, captured.ip_id, frame[42:headers_end], packet.payload, pad, out)
        assert bytes(out[:length]) == frame


@pytest.mark.parametrize("name", [name for name in captures.names() if name.startswith("rc_")])
def test_source_port_rule(name: str) -> None:
    """Both ends of an RC connection use the port that follows from both QPNs."""
    frames = captures.read(name)
    for source in (captures.SIDE_A, captures.SIDE_B):
        own = next(frame for frame in frames if frame.source == source)
        qpn_there = own.destination_qpn
        qpn_here = next(frame.destination_qpn for frame in frames if frame.source != source)
        assert udp_source_port(0, qpn_here, qpn_there) == int.from_bytes(own.frame[34:36])


def test_icrc_of_a_whole_frame_by_the_specification() -> None:
    """The ICRC as the specification words it (masks on a copy), against what rxe put there."""
    frame = captures.read("rc_write")[0].frame
    covered = bytearray(b"\xff" * 8 + frame[14:-4])
    for at in (8 + 1, 8 + 8, 8 + 10, 8 + 11, 8 + 26, 8 + 27, 8 + 28 + 4):  # TOS, TTL, checksums, BTH byte 4
        covered[at] = 0xFF
    assert zlib.crc32(covered) == int.from_bytes(frame[-4:], "little")
    assert icrc.crc32(bytes(covered)) == zlib.crc32(covered)


def test_opcode_table_is_consistent() -> None:
    for code, row in opcodes.TABLE.items():
        flags = row.flags
        assert row.code == code
        assert bool(flags & OpFlag.REQUEST) != bool(flags & OpFlag.RESPONSE), row.name
        assert bool(flags & OpFlag.MIDDLE) != bool(flags & (OpFlag.START | OpFlag.END)), row.name
        assert opcodes.HEADERS_LENGTH[code] == sum(header.length for header in row.headers)
        assert bool(flags & OpFlag.IMM) == (opcodes.IMM_DT in row.headers)
        assert bool(flags & OpFlag.INVALIDATE) == (opcodes.IETH in row.headers)
    assert opcodes.name_of(opcodes.RESUME) == "RC_RESUME"
    assert opcodes.name_of(0xC4) == "opcode 0xc4"
