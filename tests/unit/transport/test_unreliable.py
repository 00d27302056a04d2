"""UC and UD. Invariants: a message is delivered whole, intact and once, or not at all; nothing is answered; what cannot
be delivered is counted, costs no receive and disturbs no other queue pair. Against rxe's captures, byte for byte.
"""

from __future__ import annotations

from typing import Any

import pytest

from softroce_ext.simulation.hosts import (
    ALL_ACCESS,
    BASE,
    ByteSink,
    Cq,
    End,
    Events,
    Host,
    Pd,
    Ram,
    Region,
    WorkQueue,
    path_between,
)
from softroce_ext.transport.engine import EngineConfig
from softroce_ext.transport.interfaces import ProtectionError, SendWqe, Sge
from softroce_ext.transport.services import make_queue_pair
from softroce_ext.transport.state.attributes import Attributes
from softroce_ext.transport.state.queue_pair import QueuePairState
from softroce_ext.transport.states import InvalidTransition
from softroce_ext.transport.verbs import QpState, QpType, SendFlag, WcOpcode, WcStatus, WrOpcode
from softroce_ext.wire.frame import Path
from softroce_ext.wire.headers import DETH
from tests.support.transport import rxe_captures as captures
from tests.support.transport.rxe_captures import parsed, path_of

QKEY = 0x11111111
MEMORY = 1 << 16
GUARD = b"\xa5"


class UdPd(Pd):
    """A protection domain with address handles."""

    def __init__(self, ram: Ram) -> None:
        super().__init__(ram)
        self.paths: dict[int, Path] = {}

    def address(self, ah_number: int) -> Path:
        if ah_number not in self.paths:
            raise ProtectionError("no such address handle")
        return self.paths[ah_number]


def make(number: int, qpn: int, kind: QpType, migros: bool = True) -> End:
    host = Host(number, EngineConfig(migros=migros))
    host.engine.port_mtu = 1024
    ram = Ram(MEMORY)
    ram.data[:] = GUARD * MEMORY
    pd = UdPd(ram)
    pd.regions[1] = Region(BASE, MEMORY, ALL_ACCESS)
    sq, rq, scq, rcq, events = WorkQueue(), WorkQueue(), Cq(), Cq(), Events()
    qp = make_queue_pair(QueuePairState(Attributes(qpn, kind)), sq, rq, scq, rcq, pd, events)
    host.engine.add_qp(qp)
    return End(qp, ram, pd, sq, rq, scq, rcq, events, host)


def uc_to_rts(here: End, path: Path, remote: int, psn: int, rq_psn: int, mtu: int = 1024) -> None:
    modify = here.qp.modify
    modify({"qp_state": 1, "pkey_index": 0, "port_num": 1, "qp_access_flags": ALL_ACCESS})
    modify({"qp_state": 2, "path": path, "path_mtu": mtu, "destination_qpn": remote, "rq_psn": rq_psn})
    modify({"qp_state": 3, "sq_psn": psn})


def ud_to_rts(here: End, psn: int = 0, qkey: int = QKEY) -> None:
    here.qp.modify({"qp_state": 1, "pkey_index": 0, "port_num": 1, "qkey": qkey})
    here.qp.modify({"qp_state": 2})
    here.qp.modify({"qp_state": 3, "sq_psn": psn})


def uc_pair(mtu: int = 256) -> tuple[End, End]:
    a, b = make(1, 0x11, QpType.UC), make(2, 0x22, QpType.UC)
    uc_to_rts(a, path_between(a, b), 0x22, 0xFFFFFE, 7, mtu)
    uc_to_rts(b, path_between(b, a), 0x11, 7, 0xFFFFFE, mtu)
    return a, b


def ud_pair() -> tuple[End, End]:
    a, b = make(1, 0x11, QpType.UD), make(2, 0x22, QpType.UD)
    ud_to_rts(a)
    ud_to_rts(b)
    a.pd.paths[5] = path_between(a, b)  # type: ignore[attr-defined]
    return a, b


def post_datagram(
    end: End, wr_id: int, length: int, ah: int = 5, qpn: int = 0x22, qkey: int = QKEY, **more: Any
) -> None:
    flags, imm = more.pop("flags", int(SendFlag.SIGNALED)), more.pop("imm", 0)
    opcode = more.pop("opcode", WrOpcode.SEND_WITH_IMM if imm else WrOpcode.SEND)
    sges = more.pop("sges", (Sge(BASE, length, 1),))
    end.sq.posted.append(SendWqe(wr_id, opcode, flags, imm, length, sges, None, 0, 0, 0, 0, (ah, qpn, qkey)))
    end.host.engine.ring(end.qp)


def emitted(end: End, identifications: list[int], path: Path) -> list[bytes]:
    """What the engine sends, one frame at a time, with rxe's IPv4 identifications on `path`."""
    out: list[bytes] = []
    for ip_id in [*identifications, 0]:
        path.ip_id = ip_id
        sink = ByteSink(1)
        if not end.host.engine.frames_to_send(0.0, sink):
            return out
        out += sink.frames
    raise AssertionError("more frames than rxe sent")


# -- against rxe ---------------------------------------------------------------------------------------------------


def test_uc_sends_what_rxe_sends() -> None:
    """The capture's five messages: SEND, SEND with imm, SEND of 3 packets, WRITE of 3, WRITE with imm of 3."""
    frames = captures.read("uc_ops")
    first = frames[0]
    end = make(1, 0x39, QpType.UC, migros=False)
    path = path_of(first)
    uc_to_rts(end, path, first.destination_qpn, first.psn, 0)
    at = BASE
    message = b""
    for captured in frames:
        packet = parsed(captured.frame)
        message += packet.payload
        low = packet.opcode & 0x1F
        if low in (0x00, 0x01, 0x06, 0x07):
            if low == 0x06:
                target = int.from_bytes(captured.frame[54:62]), int.from_bytes(captured.frame[62:66])
            continue
        end.ram.data[at - BASE : at - BASE + len(message)] = message
        kind = {2: WrOpcode.SEND, 4: WrOpcode.SEND, 3: WrOpcode.SEND_WITH_IMM, 5: WrOpcode.SEND_WITH_IMM,
                8: WrOpcode.RDMA_WRITE, 9: WrOpcode.RDMA_WRITE_WITH_IMM}[low]  # fmt: skip
        imm = int.from_bytes(captured.frame[54:58], "little") if "IMM" in kind.name else 0
        more = {"remote_address": target[0], "rkey": target[1]} if "WRITE" in kind.name else {}
        end.post(kind, at, at, len(message), imm=imm, **more)
        at += len(message)
        message = b""
    assert [f.hex() for f in emitted(end, [c.ip_id for c in frames], path)] == [c.frame.hex() for c in frames]
    assert [wc.status for wc in end.scq.entries] == [0] * 5


@pytest.mark.parametrize("name", ["ud_send", "ud_ipv6"])
def test_ud_sends_what_rxe_sends(name: str) -> None:
    frames = captures.read(name)
    first = parsed(frames[0].frame)
    source_qpn = DETH.unpack_from(first.raw, first.headers_at)[1]
    end = make(1, source_qpn, QpType.UD, migros=False)
    ud_to_rts(end, first.psn)
    path = path_of(frames[0]).replace(udp_source_port=0)
    end.pd.paths[5] = path  # type: ignore[attr-defined]
    at = BASE
    for captured in frames:
        packet = parsed(captured.frame)
        data = bytes(packet.payload)
        end.ram.data[at - BASE : at - BASE + len(data)] = data
        imm_at = packet.headers_at + 8
        imm = int.from_bytes(captured.frame[imm_at : imm_at + 4], "little") if packet.opcode == 0x65 else 0
        post_datagram(end, at, len(data), qpn=packet.destination_qpn, imm=imm, sges=(Sge(at, len(data), 1),))
        at += len(data)
    out = []
    for captured in frames:
        sink = ByteSink(1)
        known = end.qp._paths.get(5)  # type: ignore[attr-defined]
        (known[1] if known else path).ip_id = captured.ip_id
        assert end.host.engine.frames_to_send(0.0, sink) == 1
        out += sink.frames
    assert [frame.hex() for frame in out] == [captured.frame.hex() for captured in frames]


def test_uc_loss_as_the_specification_has_it() -> None:
    """rxe's capture without the lost packet: the damaged message is dropped; we take the next (rxe drops it too)."""
    frames = captures.read("uc_loss")
    lost = [c for c in frames if c.opcode == 0x21]
    assert len(lost) == 1
    first = frames[0]
    end = make(2, first.destination_qpn, QpType.UC, migros=False)
    back = path_of(first)
    path = Path(back.destination_mac, back.source_mac, back.destination_ip, back.source_ip, back.udp_source_port)
    uc_to_rts(end, path, 0x39, 0, first.psn)
    for k in range(3):
        end.receive(k, BASE + 4096 * k, 4096)
    for captured in frames:
        if captured.opcode != 0x21:
            end.host.engine.receive(memoryview(captured.frame), 0.0)
            end.host.engine.end_of_batch(0.0)
    lengths = [wc.byte_len for wc in end.rcq.entries]
    sent = [len(parsed(c.frame).payload) for c in frames if c.opcode == 0x24]
    assert lengths == sent and [wc.wr_id for wc in end.rcq.entries] == list(range(len(sent)))
    assert not end.host.pull(0.0)


# -- UC ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", [None, 0, 1, 2, 3, 4])
def test_uc_message_is_whole_or_nothing(lost: int | None) -> None:
    a, b = uc_pair()
    a.ram.data[:1100] = bytes(range(256)) * 4 + bytes(76)
    for k in range(2):
        b.receive(k, BASE + 8192 * k, 8192)
    a.post(WrOpcode.SEND, 1, BASE, 1100)
    frames = a.host.pull(0.0)
    assert len(frames) == 5
    a.post(WrOpcode.SEND_WITH_IMM, 2, BASE + 100, 600, imm=99)
    frames = [frame for k, frame in enumerate(frames) if k != lost] + a.host.pull(0.0)
    assert b.host.turn(frames, 0.0) == []
    got = [(wc.wr_id, wc.status, wc.byte_len, wc.imm) for wc in b.rcq.entries]
    if lost is None:
        assert got == [(0, 0, 1100, 0), (1, 0, 600, 99)]
        assert b.ram.data[8192 : 8192 + 600] == a.ram.data[100:700]
    else:
        assert got == [(0, 0, 600, 99)], "the receive of the cut message serves the next"
        assert b.ram.data[:600] == a.ram.data[100:700]
    assert [wc.status for wc in a.scq.entries] == [0, 0]


def test_uc_write_beyond_its_region_is_dropped_and_nothing_else() -> None:
    a, b = uc_pair()
    before = bytes(b.ram.data)
    a.post(WrOpcode.RDMA_WRITE, 1, BASE, 600, remote_address=BASE + MEMORY - 100)
    a.post(WrOpcode.RDMA_WRITE, 2, BASE, 600, remote_address=BASE, rkey=77)
    assert b.host.turn(a.host.pull(0.0), 0.0) == []
    assert bytes(b.ram.data) == before
    assert b.attributes.state == QpState.RTS and not b.events.seen
    assert b.host.engine.counters["dropped_invalid_request"] == 2
    a.ram.data[:600] = b"\x42" * 600
    a.post(WrOpcode.RDMA_WRITE, 3, BASE, 600, remote_address=BASE + 1000)
    b.host.turn(a.host.pull(0.0), 0.0)
    assert b.ram.data[1000:1600] == b"\x42" * 600


def test_uc_receive_that_is_too_short_ends_the_queue_pair() -> None:
    """As with rxe: the receive has failed, and the sender is not told."""
    a, b = uc_pair()
    b.receive(1, BASE, 50)
    b.receive(2, BASE, 500)
    a.post(WrOpcode.SEND, 1, BASE, 60)
    assert b.host.turn(a.host.pull(0.0), 0.0) == []
    assert [(wc.wr_id, wc.status) for wc in b.rcq.entries] == [(1, WcStatus.LOC_QP_OP_ERR), (2, WcStatus.WR_FLUSH_ERR)]
    assert b.attributes.state == QpState.ERR
    assert [wc.status for wc in a.scq.entries] == [0]


@pytest.mark.parametrize("kind", [QpType.UC, QpType.UD])
def test_memory_that_is_gone_is_not_answered(kind: QpType) -> None:
    """The queue pair fails as one of RC does, but keeps no NAK, which it could never send, and counts none."""
    a, b = uc_pair() if kind == QpType.UC else ud_pair()
    b.receive(1, BASE, 500)
    b.ram.unmapped.add(BASE + 41)
    if kind == QpType.UC:
        a.post(WrOpcode.SEND, 1, BASE, 100)
    else:
        post_datagram(a, 1, 100)
    assert b.host.turn(a.host.pull(0.0), 0.0) == []
    assert [(wc.wr_id, wc.status) for wc in b.rcq.entries] == [(1, WcStatus.LOC_PROT_ERR)]
    assert b.attributes.state == QpState.ERR
    assert not b.receiver.answers
    assert b.host.engine.counters["send_fatal_nak"] == 0


def test_uc_without_a_receive_drops_in_silence() -> None:
    a, b = uc_pair()
    a.post(WrOpcode.SEND, 1, BASE, 600)
    assert b.host.turn(a.host.pull(0.0), 0.0) == []
    assert not b.rcq.entries and b.host.engine.counters["dropped_no_receive"] == 1


@pytest.mark.parametrize("opcode", [WrOpcode.RDMA_READ, WrOpcode.ATOMIC_FETCH_AND_ADD, WrOpcode.SEND_WITH_INV])
def test_uc_refuses_what_it_does_not_have(opcode: WrOpcode) -> None:
    a, _ = uc_pair()
    a.post(opcode, 9, BASE, 8)
    assert a.host.pull(0.0) == []
    assert [(wc.wr_id, wc.status) for wc in a.scq.entries] == [(9, WcStatus.LOC_QP_OP_ERR)]
    assert a.attributes.state == QpState.ERR


def test_uc_stopped_in_the_middle_goes_on_where_it_was() -> None:
    """MigrOS: a message cut by the stop is continued after the restore, and nothing of it is sent twice."""
    a, b = uc_pair()
    a.ram.data[:2000] = bytes(200) + bytes(range(1, 251)) * 7 + bytes(50)
    b.receive(0, BASE, 4096)
    a.post(WrOpcode.SEND, 1, BASE, 2000)
    sink = ByteSink(3)
    assert a.host.engine.frames_to_send(0.0, sink) == 3
    a.qp.stop()
    assert a.host.pull(0.0) == []
    restored = QueuePairState.from_plain(a.state.to_plain())
    a.host.engine.remove_qp(0x11)
    qp = make_queue_pair(restored, a.sq, a.rq, a.scq, a.rcq, a.pd, a.events)
    a.host.engine.add_qp(qp)
    qp.resume(None)
    rest = a.host.pull(0.0)
    assert len(rest) == 5
    b.host.turn(sink.frames + rest, 0.0)
    assert [(wc.wr_id, wc.byte_len) for wc in b.rcq.entries] == [(0, 2000)]
    assert b.ram.data[:2000] == a.ram.data[:2000]


# -- UD ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 3, 64, 1024])
def test_ud_datagram_arrives_behind_its_grh(length: int) -> None:
    a, b = ud_pair()
    a.ram.data[:length] = b"\x77" * length
    b.receive(4, sges=(Sge(BASE, 30, 1), Sge(BASE + 100, 10 + length, 1)))
    post_datagram(a, 1, length, imm=0xAABB)
    frames = a.host.pull(0.0)
    assert b.host.turn(frames, 0.0) == []
    (wc,) = b.rcq.entries
    assert (wc.wr_id, wc.status, wc.opcode, wc.byte_len, wc.imm) == (4, 0, WcOpcode.RECV, 40 + length, 0xAABB)
    assert (wc.src_qp, wc.wc_flags) == (0x11, 3)
    grh = parsed(frames[0]).grh()
    assert b.ram.data[:30] + b.ram.data[100:110] == grh
    assert b.ram.data[110 : 110 + length] == b"\x77" * length
    assert b.ram.data[30:100] == GUARD * 70 and b.ram.data[110 + length : 200 + length] == GUARD * 90


@pytest.mark.parametrize(
    ("change", "counter"),
    [
        ({"qkey": QKEY + 1}, "refused_qkey"),
        ({"qpn": 0x23}, "refused_qpn"),
        ({"length": 100}, "dropped_length"),
    ],
)
def test_ud_datagram_that_does_not_fit_is_dropped(change: dict[str, int], counter: str) -> None:
    a, b = ud_pair()
    b.receive(4, BASE, 40 + 64)
    post_datagram(a, 1, **{"length": 64, **change})
    assert b.host.turn(a.host.pull(0.0), 0.0) == []
    assert b.host.engine.counters[counter] == 1 and not b.rcq.entries
    post_datagram(a, 2, 64)
    b.host.turn(a.host.pull(0.0), 0.0)
    assert [wc.wr_id for wc in b.rcq.entries] == [4], "the receive was not used up"


def test_ud_longer_than_the_port_sends_nothing_and_is_no_error() -> None:
    a, _ = ud_pair()
    post_datagram(a, 1, 1025)
    assert a.host.pull(0.0) == []
    assert [(wc.wr_id, wc.status) for wc in a.scq.entries] == [(1, 0)]


def test_ud_privileged_qkey_is_the_queue_pairs_own() -> None:
    a, b = ud_pair()
    b.receive(4, BASE, 1024)
    post_datagram(a, 1, 8, qkey=0x80010000)
    (frame,) = a.host.pull(0.0)
    packet = parsed(frame)
    assert DETH.unpack_from(packet.raw, packet.headers_at)[0] == QKEY


def test_ud_foreign_address_handle_fails_the_queue_pair() -> None:
    a, _ = ud_pair()
    post_datagram(a, 1, 8, ah=6)
    assert a.host.pull(0.0) == []
    assert [wc.status for wc in a.scq.entries] == [WcStatus.LOC_QP_OP_ERR]


def test_ud_takes_no_path_and_uc_no_qkey() -> None:
    a, _ = ud_pair()
    with pytest.raises(InvalidTransition):
        a.qp.modify({"path_mtu": 1024})
    u, _ = uc_pair()
    with pytest.raises(InvalidTransition):
        u.qp.modify({"qkey": 1})


def test_multicast_goes_to_each_member_of_the_group() -> None:
    a, b = ud_pair()
    group = bytes((239, 77, 0, 1))
    base = path_between(a, b)
    a.pd.paths[5] = base.replace(destination_ip=group, destination_mac=b"\x01\0\x5e\x4d\0\x01")  # type: ignore[attr-defined]
    b.receive(1, BASE, 1024)
    mgid = bytes(10) + b"\xff\xff" + group
    b.host.engine.multicast[mgid] = [b.qp]
    post_datagram(a, 1, 32, qpn=0xFFFFFF)
    frames = a.host.pull(0.0)
    b.host.turn(frames, 0.0)
    assert [(wc.wr_id, wc.byte_len) for wc in b.rcq.entries] == [(1, 72)]
    del b.host.engine.multicast[mgid]
    b.host.turn(frames, 0.0)
    assert b.host.engine.counters["refused_qpn"] == 1
