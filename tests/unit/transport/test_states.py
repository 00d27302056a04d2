"""Invariant: a queue pair takes the transitions and attributes of the table only; a refused modify changes nothing."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from softroce_ext.simulation.hosts import ALL_ACCESS, End, Host, connect, end, path_between, to_rts
from softroce_ext.simulation.world import World
from softroce_ext.transport.interfaces import RecvWqe
from softroce_ext.transport.states import ATTRIBUTES, BY_TYPE, TRANSITIONS, InvalidTransition
from softroce_ext.transport.verbs import QpEvent, QpState, WcStatus, WrOpcode
from softroce_ext.wire.frame import Path

PATH = Path(b"\2" * 6, b"\4" * 6, b"\n\0\0\1", b"\n\0\0\2", 50000)
VALUES: dict[str, Any] = {
    "path": PATH, "alt_path": PATH, "path_mtu": 2048, "destination_qpn": 99, "rq_psn": 5, "sq_psn": 6, "timeout": 14,
    "retry_cnt": 3, "rnr_retry": 2, "max_rd_atomic": 1, "max_dest_rd_atomic": 1, "min_rnr_timer": 1, "pkey_index": 0,
    "port_num": 1, "qp_access_flags": ALL_ACCESS, "path_mig_state": 0, "en_sqd_async_notify": 0,
}  # fmt: skip
ORDER = (QpState.RESET, QpState.INIT, QpState.RTR, QpState.RTS, QpState.SQD)


def fresh() -> End:
    return end(Host(1), 17)


def bring_to(state: QpState) -> End:
    here = fresh()
    if state == QpState.ERR:
        here = bring_to(QpState.INIT)
        here.qp.modify({"qp_state": QpState.ERR})
        return here
    for before, after in pairwise(ORDER):
        if here.attributes.state == state:
            break
        here.qp.modify({"qp_state": after, **{n: VALUES[n] for n in TRANSITIONS[before, after].required}})
    assert here.attributes.state == state
    return here


def snapshot(here: End) -> dict[str, Any]:
    return here.state.to_plain()


@pytest.mark.parametrize("target", QpState)
@pytest.mark.parametrize("state", [*ORDER, QpState.ERR])
def test_every_pair_of_states(state: QpState, target: QpState) -> None:
    here = bring_to(state)
    row = TRANSITIONS.get((state, target))
    if row is None:
        before = snapshot(here)
        with pytest.raises(InvalidTransition):
            here.qp.modify({"qp_state": target})
        assert snapshot(here) == before
        return
    for missing in row.required:
        before = snapshot(here)
        with pytest.raises(InvalidTransition, match=missing):
            here.qp.modify({"qp_state": target, **{n: VALUES[n] for n in row.required - {missing}}})
        assert snapshot(here) == before
    for extra in sorted(ATTRIBUTES - row.required - row.optional - {"qp_state", "cur_qp_state"}):
        if extra in VALUES:
            with pytest.raises(InvalidTransition, match=extra):
                here.qp.modify({"qp_state": target, extra: VALUES[extra], **{n: VALUES[n] for n in row.required}})
    names = row.required | row.optional
    here.qp.modify({"qp_state": target, "cur_qp_state": state, **{n: VALUES[n] for n in names}})
    assert here.attributes.state == target
    if target not in (QpState.RESET, QpState.ERR):
        for name in names - {"alt_path"}:
            assert getattr(here.attributes, name) == VALUES[name]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("path_mtu", 1500), ("path_mtu", 0), ("rq_psn", 1 << 24), ("rq_psn", -1), ("destination_qpn", 1 << 24),
        ("min_rnr_timer", 32), ("max_dest_rd_atomic", 129), ("path", None), ("path", "10.0.0.1"),
    ],
)  # fmt: skip
def test_values_out_of_range(name: str, value: object) -> None:
    here = bring_to(QpState.INIT)
    needed = TRANSITIONS[QpState.INIT, QpState.RTR].required
    with pytest.raises(InvalidTransition):
        here.qp.modify({"qp_state": QpState.RTR, **{n: VALUES[n] for n in needed}, name: value})
    assert here.attributes.state == QpState.INIT


def test_wrong_supposed_state_and_nonsense() -> None:
    here = bring_to(QpState.RTS)
    for attributes in ({"cur_qp_state": QpState.RTR}, {"qp_state": 77}, {"colour": 1}):
        with pytest.raises(InvalidTransition):
            here.qp.modify(attributes)


def test_from_reset_there_is_no_way_to_err() -> None:
    """As the kernel's table has it (ib_modify_qp_is_ok): nothing can have failed."""
    for table in BY_TYPE.values():
        assert (QpState.RESET, QpState.ERR) not in table
        assert all((state, QpState.ERR) in table for state in QpState if state != QpState.RESET)


@pytest.mark.parametrize(("asked", "had"), [(0, 0), (1, 1), (2, 2), (3, 4), (5, 8), (33, 64), (127, 128), (128, 128)])
def test_depths_are_powers_of_two(asked: int, had: int) -> None:
    """As rxe makes room for READs and atomics, and answers ibv_query_qp."""
    here = bring_to(QpState.INIT)
    for before, after in pairwise((QpState.INIT, QpState.RTR, QpState.RTS)):
        values = {**VALUES, "max_rd_atomic": asked, "max_dest_rd_atomic": asked}
        here.qp.modify({"qp_state": after, **{n: values[n] for n in TRANSITIONS[before, after].required}})
    assert (here.attributes.max_rd_atomic, here.attributes.max_dest_rd_atomic) == (had, had)


def test_a_receive_whose_completion_is_lost_ends_its_queue_pair() -> None:
    """A full completion queue: the receiver goes to ERR (as rxe), a sender only loses completions."""
    a, b = Host(1), Host(2)
    here, there = end(a, 17), end(b, 18)
    connect(here, there)
    here.scq.room, there.rcq.room = 1, 3
    for number in range(10):
        there.receive(number, length=10)
        here.post(WrOpcode.SEND, number, length=10)
    World(a, b).run(lambda: there.attributes.state == QpState.ERR)
    assert [wc.wr_id for wc in there.rcq.entries] == [0, 1, 2]
    assert there.attributes.state == QpState.ERR
    assert here.attributes.state == QpState.RTS
    assert len(here.scq.entries) <= 1


@pytest.mark.parametrize("room", range(6))
def test_a_lost_completion_s_message_is_not_acknowledged(room: int) -> None:
    """All in one batch: what came before is complete for its sender too, from the lost one on nothing is."""
    a, b = Host(1), Host(2)
    here, there = end(a, 17), end(b, 18)
    connect(here, there, retry_cnt=1)
    there.rcq.room = room
    requests = [WrOpcode.SEND, WrOpcode.RDMA_READ, WrOpcode.SEND, WrOpcode.RDMA_WRITE, WrOpcode.ATOMIC_FETCH_AND_ADD,
                WrOpcode.RDMA_WRITE_WITH_IMM, WrOpcode.RDMA_READ, WrOpcode.RDMA_READ, WrOpcode.SEND,
                WrOpcode.SEND_WITH_IMM, WrOpcode.RDMA_READ]  # fmt: skip
    taking = [n for n, opcode in enumerate(requests) if opcode.name.startswith("SEND") or "IMM" in opcode.name]
    for number, opcode in enumerate(requests):
        here.post(opcode, number, length=8 if "ATOMIC" in opcode.name else 1500)
        there.receive(number, length=2000)
    World(a, b).run(lambda: len(here.scq.entries) == len(requests))
    good = taking[room] if room < len(taking) else len(requests)
    statuses = [WcStatus.SUCCESS] * good + [WcStatus.RETRY_EXC_ERR, *[WcStatus.WR_FLUSH_ERR] * len(requests)]
    assert [wc.status for wc in here.scq.entries] == statuses[: len(requests)]
    assert len(there.rcq.entries) == min(room, len(taking))
    assert (there.attributes.state == QpState.ERR) == (room < len(taking))


def test_psns_are_taken_over() -> None:
    here = bring_to(QpState.RTS)
    assert here.receiver.expected_psn == VALUES["rq_psn"]
    assert here.sender.una_psn == here.sender.send_psn == here.sender.next_psn == VALUES["sq_psn"]


def test_reset_forgets_everything_but_its_number() -> None:
    here = bring_to(QpState.RTS)
    here.qp.modify({"qp_state": QpState.RESET})
    assert snapshot(here) == snapshot(fresh())


def test_error_flushes_both_queues_in_order() -> None:
    a, b = Host(1), Host(2)
    here, there = end(a, 17), end(b, 18)
    connect(here, there)
    for number in range(3):
        here.post(WrOpcode.SEND, number, length=10)
        here.receive(100 + number, length=10)
    a.pull(0.0)  # sent, not acknowledged
    here.post(WrOpcode.SEND, 3, length=10, flags=0)
    here.qp.modify({"qp_state": QpState.ERR})
    assert [(wc.wr_id, wc.status) for wc in here.scq.entries] == [(i, WcStatus.WR_FLUSH_ERR) for i in range(4)]
    assert [(wc.wr_id, wc.status) for wc in here.rcq.entries] == [(100 + i, WcStatus.WR_FLUSH_ERR) for i in range(3)]
    assert here.sq.retired == 4 and here.rq.retired == 3
    here.post(WrOpcode.SEND, 9, length=10)
    here.receive(109, length=10)
    assert not a.pull(0.0)
    assert here.scq.entries[-1].wr_id == 9 and here.rcq.entries[-1].wr_id == 109
    assert not here.events.seen


@pytest.mark.parametrize("stopped", [False, True])
def test_a_receive_posted_in_error_comes_back_without_a_doorbell(stopped: bool) -> None:
    """But nothing of a queue pair changes while it is being moved."""
    here = bring_to(QpState.ERR)
    host = here.host
    if stopped:
        here.qp.stop()
    host.pull(0.0)
    here.rq.posted.append(RecvWqe(7, 0, ()))
    host.pull(0.0)
    assert not here.rcq.entries
    host.engine.flush_failed()
    host.pull(0.0)
    assert [(wc.wr_id, wc.status) for wc in here.rcq.entries] == [(7, WcStatus.WR_FLUSH_ERR)] * (not stopped)


def test_error_with_a_shared_receive_queue_reports_the_last_receive() -> None:
    host = Host(1)
    here = end(host, 17, srq=True)
    to_rts(here, PATH, 99)
    here.receive(1, length=10)
    here.qp.modify({"qp_state": QpState.ERR})
    assert not here.rcq.entries and here.rq.fetched == 0
    assert here.events.seen == [(17, QpEvent.QP_LAST_WQE_REACHED)]


def test_nothing_is_sent_before_rts_but_requests_are_taken_in_rtr() -> None:
    a, b = Host(1), Host(2)
    here, there = end(a, 17), end(b, 18)
    to_rts(here, path_between(here, there), 18, sq_psn=5)
    there.qp.modify({"qp_state": 1, "pkey_index": 0, "port_num": 1, "qp_access_flags": ALL_ACCESS})
    values = VALUES | {"path": path_between(there, here), "destination_qpn": 17, "path_mtu": 1024}
    there.qp.modify({"qp_state": 2, **{n: values[n] for n in TRANSITIONS[QpState.INIT, QpState.RTR].required}})
    there.post(WrOpcode.SEND, 1, length=4)
    assert not b.pull(0.0)
    here.post(WrOpcode.RDMA_WRITE, 1, length=4)
    world = World(a, b)
    world.run(lambda: len(here.scq.entries) == 1)
    assert here.scq.entries[0].status == WcStatus.SUCCESS


def test_sqd_lets_started_requests_end_and_says_so() -> None:
    a, b = Host(1), Host(2)
    here, there = end(a, 17), end(b, 18)
    connect(here, there)
    world = World(a, b)
    here.post(WrOpcode.RDMA_WRITE, 1, length=30000)
    world.step()
    here.post(WrOpcode.RDMA_WRITE, 2, length=4)
    here.qp.modify({"qp_state": QpState.SQD, "en_sqd_async_notify": 1})
    for state in (QpState.RTS, QpState.SQD, QpState.RESET):
        with pytest.raises(InvalidTransition, match="draining"):  # as rxe
            here.qp.modify({"qp_state": state})
    world.run(lambda: bool(here.events.seen))
    assert here.events.seen == [(17, QpEvent.SQ_DRAINED)]
    assert [wc.wr_id for wc in here.scq.entries] == [1]
    world.settle(1)
    assert len(here.scq.entries) == 1
    here.qp.modify({"qp_state": QpState.RTS})
    world.run(lambda: len(here.scq.entries) == 2)


def test_error_ends_draining() -> None:
    here = bring_to(QpState.RTS)
    here.post(WrOpcode.SEND, 1, length=10)
    here.host.pull(0.0)
    here.qp.modify({"qp_state": QpState.SQD})
    here.qp.modify({"qp_state": QpState.ERR})
    here.qp.modify({"qp_state": QpState.RESET})
    assert snapshot(here) == snapshot(fresh())


def test_error_ends_what_is_being_read_here() -> None:
    """Its memory may be deregistered now: no fault may be reported then."""
    a, b = Host(1), Host(2)
    here, there = end(a, 17), end(b, 18)
    connect(here, there)
    there.post(WrOpcode.RDMA_READ, 1, length=40000)
    there.post(WrOpcode.RDMA_WRITE, 2, length=10)
    for frame in b.pull(0.0):
        a.engine.receive(memoryview(frame), 0.0)
    a.engine.end_of_batch(0.0)
    here.qp.modify({"qp_state": QpState.ERR})
    here.pd.regions.clear()
    assert not a.pull(0.0) and not here.events.seen


def test_numbers_are_unique_and_removal_is_silent() -> None:
    host = Host(1)
    here = end(host, 17)
    with pytest.raises(ValueError):
        end(host, 17)
    here.qp.make_ready()
    host.engine.remove_qp(17)
    host.engine.remove_qp(17)
    assert not host.engine.has_work() and not here.scq.entries
