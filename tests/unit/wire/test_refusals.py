"""Invariant: a frame with one fault is refused, with that fault's name; whatever rxe tolerates is accepted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softroce_ext.wire.frame import MAX_FRAME, Packet, Path, build, parse
from softroce_ext.wire.headers import BTH, BTH_AETH
from softroce_ext.wire.icrc import crc32
from tests.support.transport import rxe_captures as captures

GOOD = captures.read("rc_send")[0].frame
PATH = Path(b"\2\0\0\0\0\1", b"\2\0\0\0\0\2", b"\n\0\0\1", b"\n\0\0\2", 50000)


def reseal(frame: bytearray, size: int | None = None) -> bytearray:
    """Make the IPv4 checksum and the ICRC right again after a change."""
    end = 14 + int.from_bytes(frame[16:18]) if size is None else size
    frame[24:26] = b"\0\0"
    total = int.from_bytes(frame[14:34]) % 0xFFFF
    frame[24:26] = (0xFFFF - total).to_bytes(2)
    covered = bytearray(b"\xff" * 8 + frame[14 : end - 4])
    for at in (9, 16, 18, 19, 34, 35, 40):
        covered[at] = 0xFF
    frame[end - 4 : end] = crc32(bytes(covered)).to_bytes(4, "little")
    return frame


def changed(at: int, value: int | bytes, seal: bool = True) -> bytearray:
    frame = bytearray(GOOD)
    frame[at : at + (1 if isinstance(value, int) else len(value))] = (
        bytes((value,)) if isinstance(value, int) else value
    )
    return reseal(frame) if seal else frame


REFUSED = {
    "another Ethertype": (changed(12, b"\x88\xb5", False), "not_roce"),
    "IPv4 called IPv6": (changed(12, b"\x86\xdd", False), "ip_header"),
    "TCP": (changed(23, 6), "not_roce"),
    "another UDP port": (changed(36, b"\x12\xb8"), "not_roce"),
    "IPv4 options": (changed(14, 0x46, False), "ip_header"),
    "IPv4 checksum": (changed(24, b"\x00\x01", False), "ip_header"),
    "fragment: more to come": (changed(20, 0x20), "ip_fragment"),
    "fragment: not the first": (changed(20, b"\x00\x05"), "ip_fragment"),
    "UDP length": (changed(38, b"\x00\x50"), "length"),
    "IP length beyond the frame": (changed(16, b"\x00\xff", False), "length"),
    "wrong UDP checksum": (changed(40, b"\x12\x34"), "udp_checksum"),
    "transport version 1": (changed(43, 0x01), "bth_version"),
    "reserved opcode 0x15": (changed(42, 0x15), "opcode"),
    "reserved opcode 0x18": (changed(42, 0x18), "opcode"),
    "CNP": (changed(42, 0x81), "opcode"),
    "an acknowledge with data": (changed(42, 0x11), "length"),
    "ICRC": (bytearray(GOOD[:-1] + bytes((GOOD[-1] ^ 1,))), "icrc"),
    "payload": (changed(60, GOOD[60] ^ 0x10, False), "icrc"),
    "identification": (changed(18, b"\x00\x00", False), "ip_header"),
    "empty": (bytearray(), "length"),
    "one byte short of the shortest": (bytearray(GOOD[:57]), "length"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case: str) -> None:
    frame, reason = REFUSED[case]
    assert parse(memoryview(frame)) == reason


TOLERATED = {
    "MigReq": changed(43, 0x40),
    "FECN, BECN, reserved 6": changed(46, 0xFF),
    "reserved 7 beside AckReq": changed(50, 0xFF),
    "UDP source port 4791": changed(34, b"\x12\xb7"),
    "DF clear": changed(20, 0),
    "identification 0": changed(18, b"\0\0"),
    "TTL 1": changed(22, 1),
    "ECN CE": changed(15, 3),
    "Ethernet padding": reseal(bytearray(GOOD + b"\xa5" * 18)),
    "pad count 2 on 64 bytes": changed(43, 0x20),
}


@pytest.mark.parametrize("case", TOLERATED)
def test_tolerated_as_by_rxe(case: str) -> None:
    assert isinstance(parse(memoryview(TOLERATED[case])), Packet)


def test_headers_longer_than_the_frame() -> None:
    """A RETH is announced, and the datagram ends before it."""
    out = memoryview(bytearray(MAX_FRAME))
    length = build(PATH, 1, BTH.pack(0x0C00FFFF, 17, 5), b"", 0, out)
    assert parse(out[:length]) == "length"


def test_right_udp_checksum_is_accepted() -> None:
    frame = bytearray(GOOD)
    datagram = frame[26:34] + b"\0\x11" + frame[38:40] + frame[34:]
    frame[40:42] = (0xFFFF - int.from_bytes(datagram) % 0xFFFF).to_bytes(2)
    assert isinstance(parse(memoryview(frame)), Packet)


@given(
    st.integers(0, 4096).flatmap(lambda n: st.binary(min_size=n, max_size=n)),
    st.integers(0, 0xFFFF),
    st.integers(0, 0xFF),
    st.integers(0, 0xFFFFFF),
)
def test_build_and_parse_are_inverse(payload: bytes, ip_id: int, tos: int, psn: int) -> None:
    path = Path(PATH.source_mac, PATH.destination_mac, PATH.source_ip, PATH.destination_ip, 49152, tos)
    out = memoryview(bytearray(MAX_FRAME))
    pad = -len(payload) & 3
    length = build(path, ip_id, BTH.pack(0x0400FFFF | pad << 20, 0xABCDEF, 0xC0 << 24 | psn), payload, pad, out)
    packet = parse(out[:length])
    assert isinstance(packet, Packet)
    assert (packet.payload, packet.psn, packet.ack_byte, packet.destination_qpn) == (payload, psn, 0xC0, 0xABCDEF)
    assert packet.addresses == path.source_ip + path.destination_ip


@given(st.binary(max_size=200))
def test_random_bytes_never_raise(noise: bytes) -> None:
    assert isinstance(parse(memoryview(noise)), str)


@given(st.integers(0, len(GOOD) * 8 - 1))
def test_one_flipped_bit_is_refused_or_harmless(bit: int) -> None:
    """Whatever the bit: refused, or one of those that routers may change (or that are not read), and data intact."""
    frame = bytearray(GOOD)
    frame[bit // 8] ^= 1 << bit % 8
    packet = parse(memoryview(frame))
    if not isinstance(packet, str):
        assert bit // 8 < 12 or bit // 8 == 46  # MACs; FECN, BECN and reserved
        assert packet.payload == GOOD[54:-4]


def test_paths_survive_json_and_reject_nonsense() -> None:
    assert Path.from_plain(PATH.to_plain()) == PATH
    assert PATH.replace(destination_ip=b"\n\0\0\3") != PATH
    assert BTH_AETH.size == 16
    with pytest.raises(ValueError):
        Path.from_plain({"source_mac": "00"})
    with pytest.raises(ValueError):
        Path(b"\0" * 5, b"\0" * 6, b"\0" * 4, b"\0" * 4, 1)
    with pytest.raises(ValueError):
        PATH.replace(udp_source_port=0x10000)
