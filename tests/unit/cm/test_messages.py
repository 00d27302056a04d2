"""Invariant: every MAD of Linux rxe's connection manager is read, and built again from its fields byte by byte."""

from __future__ import annotations

import pytest

from softroce_ext.cm import messages as m
from tests.support.cm.mads import CAPTURES, mads
from tests.support.transport import rxe_captures as captures


@pytest.mark.parametrize("name", CAPTURES)
def test_mad_is_read_and_rebuilt(name: str) -> None:
    taken = mads(name)
    assert len(taken) >= 2
    for mad in taken:
        assert m.unpack(mad).pack() == mad


def test_fields_of_rping() -> None:
    request, reply, ready, disconnect, gone = (m.unpack(mad) for mad in mads("cm_rping"))
    kinds = [message.kind for message in (request, reply, ready, disconnect, gone)]
    assert kinds == [m.Kind.REQ, m.Kind.REP, m.Kind.RTU, m.Kind.DREQ, m.Kind.DREP]
    assert request["service_id"] == m.service_id(0x0106, 7174)
    assert (request["path_mtu"], request["retry_count"], request["rnr_retry_count"]) == (5, 7, 7)
    assert (request["primary_ack_timeout"], request["max_cm_retries"], request["pkey"]) == (19, 15, 0xFFFF)
    header = m.IpHeader.unpack(request.private)
    assert (header.source, header.destination) == (captures.SIDE_A, captures.SIDE_B)
    assert header.pack() == request.private[: m.IP_HEADER_BYTES]
    # The flow label follows from the ports, which is where the UDP source port of the connection comes from.
    assert request["primary_flow_label"] == (header.source_port * 31 + 7174) & 0xFFFFF
    assert reply["remote_comm_id"] == request["local_comm_id"]
    assert (reply["target_ack_delay"], reply["rnr_retry_count"]) == (15, 7)


def test_ipv6_header() -> None:
    header = m.IpHeader.unpack(m.unpack(mads("cm_rping_ipv6")[0]).private)
    assert header.destination == bytes.fromhex("fd770000000000000000000000000002")


def test_reject_says_why() -> None:
    assert m.unpack(mads("cm_reject")[1])["reason"] == m.Reason.INVALID_SERVICE_ID


def test_sidr() -> None:
    request, reply = (m.unpack(mad) for mad in mads("cm_sidr")[:2])
    assert request["service_id"] == reply["service_id"] == m.service_id(0x0111, 7174)
    assert (reply["status"], reply["qkey"], reply["qpn"]) == (0, 0x01234567, 0x40)


def test_what_is_no_message_is_refused() -> None:
    right = bytearray(mads("cm_reject")[0])
    for at, value in ((0, 2), (1, 1), (2, 1), (3, 0x81), (17, 0x30)):
        wrong = bytearray(right)
        wrong[at] = value
        with pytest.raises(m.MessageError):
            m.unpack(bytes(wrong))
    for length in (0, 24, 255, 257):
        with pytest.raises(m.MessageError):
            m.unpack(bytes(right[:1]) * length)


def test_too_much_is_refused() -> None:
    with pytest.raises(ValueError, match="bits"):
        m.Message(m.Kind.RTU, 0, {"local_comm_id": 1 << 32}).pack()
    with pytest.raises(ValueError, match="private"):
        m.Message(m.Kind.RTU, 0, {}, bytes(225)).pack()


def test_fields_do_not_overlap() -> None:
    for kind, layout in m.LAYOUTS.items():
        taken: set[int] = set()
        at, room = layout.private
        spans = [*layout.fields.values(), (8 * at, 8 * room)]
        for first, width in spans:
            bits = set(range(first, first + width))
            assert not bits & taken, kind
            taken |= bits
        assert max(taken) < 8 * m.DATA_BYTES
