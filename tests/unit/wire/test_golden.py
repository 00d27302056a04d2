"""Invariant: every frame that Linux rxe sent is read without refusal, and built again from its parts byte by byte."""

from __future__ import annotations

import zlib

import pytest

from softroce_ext.wire import icrc, opcodes
from softroce_ext.wire.frame import MAX_FRAME, Path, build, datagram_source_port, parse, udp_source_port
from softroce_ext.wire.opcodes import OpFlag
from tests.support.transport import rxe_captures as captures


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
            frame[6:12], frame[0:6], captured.source, captured.destination, captured.udp_source_port,
            captured.traffic_class, captured.hop_limit,
        )  # fmt: skip
        assert (packet.source_ip, packet.destination_ip) == (captured.source, captured.destination)
        bth_at = captured.bth_at
        headers_end = bth_at + 12 + opcodes.HEADERS_LENGTH[packet.opcode]
        pad = packet.first_word >> 20 & 3
        length = build(path, captured.ip_id, frame[bth_at:headers_end], packet.payload, pad, out)
        assert bytes(out[:length]) == frame


FLOW_LABEL_ASKED_FOR = "rc_ipv6_tos"


@pytest.mark.parametrize(
    "name", [name for name in captures.names() if name.startswith("rc_") and name != FLOW_LABEL_ASKED_FOR]
)
def test_source_port_rule(name: str) -> None:
    """Both ends of an RC connection use the port that follows from both QPNs."""
    frames = captures.read(name)
    for source in {frame.source for frame in frames}:
        own = next(frame for frame in frames if frame.source == source)
        qpn_there = own.destination_qpn
        qpn_here = next(frame.destination_qpn for frame in frames if frame.source != source)
        assert udp_source_port(0, qpn_here, qpn_there) == own.udp_source_port


def test_source_port_follows_the_flow_label() -> None:
    assert captures.read(FLOW_LABEL_ASKED_FOR)[0].udp_source_port == udp_source_port(0x12345, 1, 2)


@pytest.mark.parametrize("name", ["ud_send", "ud_ipv6", "cm_sidr", "cm_rping", "ud_mcast"])
def test_source_port_rule_of_datagrams(name: str) -> None:
    """UD and QP1 use the port that follows from the sender's own QPN, which the DETH carries."""
    datagrams = [frame for frame in captures.read(name) if frame.opcode in (0x64, 0x65)]
    assert datagrams
    for captured in datagrams:
        deth_at = captured.bth_at + 12
        source_qpn = int.from_bytes(captured.frame[deth_at + 5 : deth_at + 8])
        assert captured.udp_source_port == datagram_source_port(source_qpn)


def test_grh_is_what_rxe_put_before_the_data() -> None:
    """The GRH that the program at the other end saw (vectors' README)."""
    for name, seen in (
        ("ud_send", "00000000000000000000000000000000000000004500007413484000401112950a4d00010a4d0002"),
        ("ud_ipv6", "6000000000601140fd770000000000000000000000000001fd770000000000000000000000000002"),
    ):
        packet = parse(memoryview(captures.read(name)[0].frame))
        assert not isinstance(packet, str)
        assert packet.grh().hex() == seen


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
