"""Invariant: an access that is not allowed happens nowhere, and both ends learn it by the right status and NAK."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import pytest

from softroce_ext.simulation.hosts import ALL_ACCESS, BASE, ByteSink, Host, Region, Sge, connect, end
from softroce_ext.simulation.world import World
from softroce_ext.transport.verbs import Access, QpEvent, QpState, WcFlag, WcStatus, WrOpcode
from softroce_ext.wire import opcodes as op
from softroce_ext.wire.frame import parse
from tests.support.transport.pairs import READ, SEND, WRITE, Pair, pair

ADD, SWAP = WrOpcode.ATOMIC_FETCH_AND_ADD, WrOpcode.ATOMIC_CMP_AND_SWP
RIGHTS = Access.LOCAL_WRITE, Access.REMOTE_WRITE, Access.REMOTE_READ, Access.REMOTE_ATOMIC


def outcome(scene: Pair) -> tuple[int, list[int]]:
    """The status of the first completion here, and of the receives there; both QPs are in ERR, ours flushed."""
    scene.world.run(lambda: bool(scene.here.scq.entries))
    scene.world.settle(0.5)
    assert scene.here.attributes.state == scene.there.attributes.state == QpState.ERR
    return scene.here.scq.entries[0].status, [wc.status for wc in scene.there.rcq.entries]


@pytest.mark.parametrize("together", [True, False])
def test_a_late_duplicate_of_a_read_whose_key_was_taken_back_is_ignored(together: bool) -> None:
    """It comes after the SEND_WITH_INV: its answer is no longer awaited. Just before it, it is answered again."""
    world, here, there = scene = pair()
    there.pd.regions[2] = Region(BASE, 1 << 16, ALL_ACCESS)
    there.receive(7, BASE, 100)
    here.post(READ, 1, BASE, 3000, rkey=2)
    world.run(lambda: len(here.scq.entries) == 1)
    duplicate = next(frame for _, frame in world.trace if parse(memoryview(frame)).opcode == op.READ_REQUEST)
    here.post(WrOpcode.SEND_WITH_INV, 2, BASE, 10, imm=2)
    sent = here.host.pull(world.now)
    answers = there.host.turn([duplicate, *sent], world.now) if together else there.host.turn(sent, world.now)
    answers += there.host.turn([duplicate], world.now)
    again = [op.READ_RESPONSE_FIRST, op.READ_RESPONSE_MIDDLE, op.READ_RESPONSE_LAST] if together else []
    assert [parse(memoryview(frame)).opcode for frame in answers] == [*again, op.ACKNOWLEDGE]
    world.send(answers)
    world.run(lambda: len(here.scq.entries) == 2)
    assert [wc.status for wc in (*here.scq.entries, *there.rcq.entries)] == [WcStatus.SUCCESS] * 3
    assert 2 not in there.pd.regions and scene.there.attributes.state == QpState.RTS
    here.post(WRITE, 3, BASE, 8)
    world.run(lambda: len(here.scq.entries) == 3)


class Case(NamedTuple):
    opcode: WrOpcode
    post: dict[str, Any]
    qp_access: int
    region_access: int
    status: WcStatus
    event: QpEvent


def without(right: Access) -> int:
    return ALL_ACCESS & ~int(right)


REMOTE = {
    "write without the QP's right": Case(WRITE, {}, without(Access.REMOTE_WRITE), ALL_ACCESS,
                                         WcStatus.REM_INV_REQ_ERR, QpEvent.QP_REQ_ERR),
    "read without the QP's right": Case(READ, {}, without(Access.REMOTE_READ), ALL_ACCESS,
                                        WcStatus.REM_INV_REQ_ERR, QpEvent.QP_REQ_ERR),
    "atomic without the QP's right": Case(ADD, {}, without(Access.REMOTE_ATOMIC), ALL_ACCESS,
                                          WcStatus.REM_INV_REQ_ERR, QpEvent.QP_REQ_ERR),
    "write without the region's right": Case(WRITE, {}, ALL_ACCESS, without(Access.REMOTE_WRITE),
                                             WcStatus.REM_ACCESS_ERR, QpEvent.QP_ACCESS_ERR),
    "read without the region's right": Case(READ, {}, ALL_ACCESS, without(Access.REMOTE_READ),
                                            WcStatus.REM_ACCESS_ERR, QpEvent.QP_ACCESS_ERR),
    "atomic without the region's right": Case(SWAP, {}, ALL_ACCESS, without(Access.REMOTE_ATOMIC),
                                              WcStatus.REM_ACCESS_ERR, QpEvent.QP_ACCESS_ERR),
    "write with a wrong rkey": Case(WRITE, {"rkey": 7}, ALL_ACCESS, ALL_ACCESS,
                                    WcStatus.REM_ACCESS_ERR, QpEvent.QP_ACCESS_ERR),
    "read with a wrong rkey": Case(READ, {"rkey": 7}, ALL_ACCESS, ALL_ACCESS,
                                   WcStatus.REM_ACCESS_ERR, QpEvent.QP_ACCESS_ERR),
    "write beyond the region": Case(WRITE, {"remote_address": BASE + 65529}, ALL_ACCESS, ALL_ACCESS,
                                    WcStatus.REM_ACCESS_ERR, QpEvent.QP_ACCESS_ERR),
    "read before the region": Case(READ, {"remote_address": BASE - 1}, ALL_ACCESS, ALL_ACCESS,
                                   WcStatus.REM_ACCESS_ERR, QpEvent.QP_ACCESS_ERR),
    "misaligned atomic": Case(ADD, {"remote_address": BASE + 4}, ALL_ACCESS, ALL_ACCESS,
                              WcStatus.REM_INV_REQ_ERR, QpEvent.QP_REQ_ERR),
}  # fmt: skip


@pytest.mark.parametrize("name", REMOTE)
def test_remote_access(name: str) -> None:
    case = REMOTE[name]
    scene = pair()
    scene.there.attributes.qp_access_flags = case.qp_access
    scene.there.pd.regions[1] = Region(BASE, 65536, case.region_access)
    before = bytes(scene.there.ram.data)
    scene.there.receive(50, length=64)
    scene.here.post(case.opcode, 1, BASE + 2048, 8, **case.post)
    scene.here.post(SEND, 2, BASE, 8)
    status, received = outcome(scene)
    assert status == case.status
    assert scene.there.ram.data == before and not any(scene.here.ram.data[2048:2056])
    assert received == [WcStatus.WR_FLUSH_ERR]
    assert [wc.status for wc in scene.here.scq.entries] == [case.status, WcStatus.WR_FLUSH_ERR]
    assert scene.there.events.seen == [(18, case.event)]
    assert not scene.here.events.seen


@pytest.mark.parametrize("opcode", [WRITE, READ])
def test_zero_length_needs_no_key(opcode: WrOpcode) -> None:
    """IBA 9.7.4.1.4: an RDMA request of no bytes is not checked against a key."""
    scene = pair()
    scene.here.post(opcode, 1, length=0, rkey=0xBAD, remote_address=1)
    scene.world.run(lambda: bool(scene.here.scq.entries))
    assert scene.here.scq.entries[0].status == WcStatus.SUCCESS


@pytest.mark.parametrize("opcode", [SEND, WRITE, READ])
@pytest.mark.parametrize("fault", ["key", "bounds", "unmapped"])
def test_local_access(fault: str, opcode: WrOpcode) -> None:
    """LOC_PROT_ERR for the request, after those before it; the partner is not told anything but silence."""
    scene = pair()
    scene.there.receive(50, length=64)
    scene.here.post(WRITE, 1, BASE, 3000)
    sge = Sge(BASE + 65530 if fault == "bounds" else BASE + 4096, 64, 9 if fault == "key" else 1)
    if fault == "unmapped":
        scene.here.ram.unmapped.add(BASE + 4100)
    scene.here.post(opcode, 2, sges=(sge,))
    scene.here.post(WRITE, 3, BASE, 8)
    scene.world.run(lambda: len(scene.here.scq.entries) == 3)
    assert [wc.status for wc in scene.here.scq.entries] == [
        WcStatus.SUCCESS, WcStatus.LOC_PROT_ERR, WcStatus.WR_FLUSH_ERR,
    ]  # fmt: skip
    assert scene.here.attributes.state == QpState.ERR


def test_read_needs_local_write() -> None:
    scene = pair()
    scene.here.pd.regions[1] = Region(BASE, 65536, 0)
    scene.here.post(READ, 1, BASE, 8)
    scene.world.run(lambda: bool(scene.here.scq.entries))
    assert scene.here.scq.entries[0].status == WcStatus.LOC_PROT_ERR
    scene = pair()
    scene.here.pd.regions[1] = Region(BASE, 65536, 0)  # enough to send from
    scene.here.post(WRITE, 1, BASE, 8)
    scene.world.run(lambda: bool(scene.here.scq.entries))
    assert scene.here.scq.entries[0].status == WcStatus.SUCCESS


@pytest.mark.parametrize("fault", ["key", "no local write", "too short", "unmapped"])
def test_bad_receive(fault: str) -> None:
    """0x63 to the partner, and an error for the receive (LOC_QP_OP_ERR, as rxe; unmapped pages are found later)."""
    scene = pair()
    length = 100 if fault == "too short" else 2000
    scene.there.receive(50, BASE, length, sges=(Sge(BASE, length, 9),) if fault == "key" else None)
    scene.there.receive(51, BASE, 4000)
    if fault == "no local write":
        scene.there.pd.regions[1] = Region(BASE, 65536, int(Access.REMOTE_WRITE))
    if fault == "unmapped":
        scene.there.ram.unmapped.add(BASE + 5)
    scene.here.post(SEND, 1, BASE, 2000)
    status, received = outcome(scene)
    assert status == WcStatus.REM_OP_ERR
    expected = WcStatus.LOC_PROT_ERR if fault == "unmapped" else WcStatus.LOC_QP_OP_ERR
    assert received == [expected, WcStatus.WR_FLUSH_ERR]


@pytest.mark.parametrize("opcode", [WRITE, READ, ADD])
def test_remote_pages_are_gone(opcode: WrOpcode) -> None:
    """Registered but unmapped: no success at either end (rxe would have pinned the pages)."""
    scene = pair()
    scene.there.ram.unmapped.add(BASE + 3)
    scene.here.post(opcode, 1, BASE + 2048, 8)
    status, _ = outcome(scene)
    assert status == WcStatus.REM_OP_ERR


def test_an_atomic_behind_a_write_that_could_not_be_stored() -> None:
    """In one batch: the WRITE must not succeed because the atomic has found the fault first."""
    scene = pair()
    scene.there.ram.unmapped.add(BASE + 100)
    scene.here.post(WRITE, 1, BASE, 10, remote_address=BASE + 100)
    scene.here.post(ADD, 2, BASE, 8, remote_address=BASE + 2048)
    status, _ = outcome(scene)
    assert status == WcStatus.REM_OP_ERR
    assert [wc.wr_id for wc in scene.here.scq.entries] == [1, 2]


@pytest.mark.parametrize("opcode", [ADD, SWAP])
def test_atomics_of_two_programs_on_one_word_in_one_batch(opcode: WrOpcode) -> None:
    """Each program has registered the page that both share. Exactly one of two swaps finds what it looks for."""
    scene = pair()
    other = end(scene.here.host, 19), end(scene.there.host, 20)
    connect(*other)
    other[1].ram.data = scene.there.ram.data
    for here, number in ((scene.here, 1), (other[0], 2)):
        more = {"compare_add": 1} if opcode == ADD else {"compare_add": 0, "swap": number}
        here.post(opcode, number, BASE, 8, remote_address=BASE + 2048, **more)
    scene.world.run(lambda: all(here.scq.entries for here in (scene.here, other[0])))
    before = sorted(int.from_bytes(here.ram.data[:8], "little") for here in (scene.here, other[0]))
    after = int.from_bytes(scene.there.ram.data[2048:2056], "little")
    assert (before, after) == ([0, 1], 2) if opcode == ADD else before == [0, after] and after


def test_another_queue_pair_is_not_to_blame() -> None:
    """Both use one process's memory; what came for both came in one batch."""
    scene = pair()
    other = end(scene.here.host, 19), end(scene.there.host, 20)
    connect(*other)
    other[1].pd.ram = scene.there.ram
    scene.there.ram.unmapped.add(BASE + 100)
    scene.here.post(WRITE, 1, BASE, 10, remote_address=BASE + 100)
    other[0].post(ADD, 2, BASE, 8, remote_address=BASE + 2048)
    status, _ = outcome(scene)
    assert status == WcStatus.REM_OP_ERR
    assert other[0].scq.entries[0].status == WcStatus.REM_OP_ERR, "the process's memory is in doubt for all"


@pytest.mark.parametrize("opcode", [WRITE, READ, ADD])
def test_a_partner_whose_process_has_ended_is_silent(opcode: WrOpcode) -> None:
    """Its memory goes before its queue pairs do: no NAK leaves, the requester's retries end."""
    scene = pair(retry_cnt=1)
    scene.there.ram.unmapped.add(BASE + 3)
    scene.there.events.gone = True
    scene.here.post(opcode, 1, BASE + 2048, 8)
    status, _ = outcome(scene)
    assert status == WcStatus.RETRY_EXC_ERR
    assert scene.there.events.seen == []


def test_region_deregistered_in_the_middle_of_a_read() -> None:
    """The answers that left are right; the rest is refused."""
    scene = pair(path_mtu=256)
    scene.here.post(READ, 1, BASE, 40000)
    scene.world.send(scene.here.host.pull(scene.world.now))
    scene.world.settle(9e-6)
    request = scene.world.trace[0][1]
    engine = scene.there.host.engine
    engine.receive(memoryview(request), scene.world.now)
    engine.end_of_batch(scene.world.now)
    sink = ByteSink(room=40)
    engine.frames_to_send(scene.world.now, sink)
    del scene.there.pd.regions[1]
    scene.world.send(sink.frames)
    assert outcome(scene) == (WcStatus.REM_ACCESS_ERR, [])
    assert scene.here.ram.data[: 40 * 256] == scene.there.ram.data[: 40 * 256]


def test_read_and_atomic_need_depth() -> None:
    scene = pair(max_rd_atomic=0)
    scene.here.post(READ, 1, BASE, 8)
    scene.world.run(lambda: bool(scene.here.scq.entries))
    assert scene.here.scq.entries[0].status == WcStatus.LOC_QP_OP_ERR
    scene = pair(max_dest_rd_atomic=0)
    scene.here.post(ADD, 1, BASE, 8)
    assert outcome(scene)[0] == WcStatus.REM_INV_REQ_ERR


@pytest.mark.parametrize("length", [0, 1, 100, 1024])
@pytest.mark.parametrize("fragments", [1, 3])
def test_inline_and_elements(length: int, fragments: int) -> None:
    scene = pair()
    data = bytes(range(256)) * 4
    scene.there.receive(50, sges=tuple(Sge(BASE + 8192 + 400 * i, 400, 1) for i in range(3)))
    scene.here.post(SEND, 1, inline=data[:length], flags=2 | 8)
    scene.there.receive(51, BASE + 16384, 1024)
    cuts = [length * i // fragments for i in range(fragments + 1)]
    sges = tuple(Sge(BASE + low, high - low, 1) for low, high in pairwise(cuts))
    scene.here.post(SEND, 2, sges=sges)
    scene.world.run(lambda: len(scene.here.scq.entries) == 2)
    ram = scene.there.ram.data
    assert (ram[8192 : 8192 + 1200])[:length] == data[:length]
    assert ram[16384 : 16384 + length] == data[:length]
    assert [wc.byte_len for wc in scene.there.rcq.entries] == [length, length]


def test_signalled_unsignalled_and_sq_sig_all() -> None:
    for every in (False, True):
        a, b = Host(1), Host(2)
        here, there = end(a, 17, sq_sig_all=every), end(b, 18)
        connect(here, there)
        for number in range(4):
            here.post(WRITE, number, BASE, 8, flags=2 if number == 3 else 0)
        World(a, b).run(lambda here=here: here.sq.retired == 4)  # type: ignore[misc]
        assert [wc.wr_id for wc in here.scq.entries] == ([0, 1, 2, 3] if every else [3])


def test_solicited_and_immediate() -> None:
    scene = pair()
    for number, flags in enumerate((2, 2 | 4)):
        scene.there.receive(number, BASE, 3000)
        scene.here.post(WrOpcode.SEND_WITH_IMM, number, BASE, 3000, flags=flags, imm=0x11223344)
    scene.world.run(lambda: len(scene.there.rcq.entries) == 2)
    assert [wc.solicited for wc in scene.there.rcq.entries] == [False, True]
    assert all(wc.imm == 0x11223344 and wc.wc_flags == WcFlag.GRH | WcFlag.WITH_IMM for wc in scene.there.rcq.entries)


def test_send_with_invalidate() -> None:
    scene = pair()
    scene.there.pd.regions[0x55] = Region(BASE, 100, ALL_ACCESS)
    scene.there.receive(1, BASE + 4096, 100)
    scene.here.post(WrOpcode.SEND_WITH_INV, 1, BASE, 20, imm=0x55)
    scene.world.run(lambda: bool(scene.here.scq.entries))
    wc = scene.there.rcq.entries[0]
    assert (wc.imm, wc.wc_flags) == (0x55, WcFlag.GRH | WcFlag.WITH_INVALIDATE)
    assert 0x55 not in scene.there.pd.regions
    scene.here.post(WRITE, 2, BASE, 8, rkey=0x55)
    scene.here.scq.entries.clear()
    assert outcome(scene)[0] == WcStatus.REM_ACCESS_ERR


def test_send_with_invalidate_of_a_key_that_cannot_be() -> None:
    """As with rxe: the SEND is acknowledged, then its receive and the queue pair fail."""
    scene = pair()
    for number in range(2):
        scene.there.receive(number, BASE + 4096, 100)
    scene.here.post(WrOpcode.SEND_WITH_INV, 1, BASE, 20, imm=0xBAD)
    scene.world.run(lambda: bool(scene.here.scq.entries))
    assert [wc.status for wc in scene.here.scq.entries] == [WcStatus.SUCCESS]
    assert [wc.status for wc in scene.there.rcq.entries] == [WcStatus.REM_INV_REQ_ERR, WcStatus.WR_FLUSH_ERR]
    assert (scene.here.attributes.state, scene.there.attributes.state) == (QpState.RTS, QpState.ERR)


def test_local_operations_complete_in_order_and_once() -> None:
    scene = pair()
    scene.here.pd.regions[0x77] = Region(BASE, 100, ALL_ACCESS)
    scene.here.post(WRITE, 1, BASE, 20000)
    scene.here.post(WrOpcode.LOCAL_INV, 2, imm=0x77)
    scene.here.post(WRITE, 3, BASE, 8)
    scene.world.run(lambda: len(scene.here.scq.entries) == 3)
    assert [(wc.wr_id, wc.status) for wc in scene.here.scq.entries] == [(1, 0), (2, 0), (3, 0)]
    assert 0x77 not in scene.here.pd.regions
    scene.here.post(WrOpcode.LOCAL_INV, 4, imm=0x77)
    scene.world.run(lambda: len(scene.here.scq.entries) == 4)
    assert scene.here.scq.entries[3].status == WcStatus.LOC_QP_OP_ERR


def test_fence_waits_for_reads() -> None:
    """A fenced request is not on the wire before the READ before it is complete; an unfenced one may be."""
    for fenced in (False, True):
        scene = pair()
        scene.here.post(READ, 1, BASE + 8192, 5000)
        scene.here.post(WRITE, 2, BASE, 8, flags=2 | (1 if fenced else 0))
        frames = scene.here.host.pull(scene.world.now)
        assert len(frames) == (1 if fenced else 2)
        scene.world.send(frames)
        scene.world.run(lambda scene=scene: len(scene.here.scq.entries) == 2)  # type: ignore[misc]


def test_reads_are_limited_by_max_rd_atomic() -> None:
    scene = pair(max_rd_atomic=2)
    for number in range(5):
        scene.here.post(READ, number, BASE + 8192, 100)
    frames = scene.here.host.pull(scene.world.now)
    assert len(frames) == 2
    scene.world.send(frames)
    scene.world.run(lambda: len(scene.here.scq.entries) == 5)


def test_window() -> None:
    """Never more than 128 unacknowledged PSNs; AckReq on the 66th packet."""
    scene = pair(path_mtu=256)
    scene.here.post(WRITE, 1, BASE, 256 * 200)
    frames = scene.here.host.pull(scene.world.now)
    assert len(frames) == 128
    assert [number for number, frame in enumerate(frames) if frame[50] & 0x80] == [65]
