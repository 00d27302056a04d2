"""Invariant: each timer acts at its time, not before; counts are spent as ibv_modify_qp set them; 7 is without end."""

from __future__ import annotations

from itertools import pairwise

import pytest

from softroce_ext.simulation.hosts import BASE, End, Host, connect, end
from softroce_ext.simulation.link import Link
from softroce_ext.simulation.world import World
from softroce_ext.transport.rc.queue_pair import RcQueuePair
from softroce_ext.transport.verbs import QpState, WcStatus, WrOpcode
from softroce_ext.wire.headers import RNR_TIMER
from tests.support.transport.scene import migrate


def ack_timeout(here: End) -> float:
    """What the attribute says."""
    assert isinstance(here.qp, RcQueuePair) and here.qp.ack_timeout is not None
    return here.qp.ack_timeout


@pytest.mark.parametrize(
    ("code", "seconds"), [(1, 0.008), (10, 0.008), (12, 0.016777216), (14, 0.067108864), (20, 4.294967296)]
)
def test_local_ack_timeout(code: int, seconds: float) -> None:
    """4.096 us * 2**code, at least the granularity; after retry_cnt repetitions the request fails."""
    here, there = end(Host(1), 17), end(Host(2), 18)
    connect(here, there, timeout=code, retry_cnt=2)
    world = World(here.host, there.host, link=Link(loss=1.0))
    here.post(WrOpcode.SEND, 1, BASE, 8)
    start = world.now
    world.run(lambda: bool(here.scq.entries))
    times = [when - start for when, _ in world.trace]
    assert times == pytest.approx([0, seconds, 2 * seconds], abs=1e-6)
    assert world.now - start == pytest.approx(3 * seconds, abs=1e-6)
    assert here.scq.entries[0].status == WcStatus.RETRY_EXC_ERR
    assert here.attributes.state == QpState.ERR


def test_a_timeout_shorter_than_the_way_is_prolonged_and_shortened_again() -> None:
    """Only what is answered twice shows that; what is lost does not."""
    here, there = end(Host(1), 17), end(Host(2), 18)
    connect(here, there, timeout=14, retry_cnt=7)  # 67 ms
    world = World(here.host, there.host, link=Link(delay=0.06))
    timeouts = []
    for number in range(12):
        here.post(WrOpcode.RDMA_WRITE, number, BASE, 8)
        world.run(lambda number=number: len(here.scq.entries) == number + 1)  # type: ignore[misc]
        timeouts.append(here.host.engine.counters["local_ack_timeout_err"])
    assert timeouts[0] == 1 and timeouts[-1] <= 2, timeouts
    assert here.sender.ack_timeout_now in (2 * ack_timeout(here), 4 * ack_timeout(here))
    world.link = Link()
    for number in range(12, 12 + 8300):
        here.post(WrOpcode.RDMA_WRITE, number, BASE, 8)
        world.run(lambda number=number: len(here.scq.entries) == number + 1)  # type: ignore[misc]
    assert here.sender.ack_timeout_now == ack_timeout(here)


def test_a_prolonged_timeout_survives_a_migration() -> None:
    """It was learned from the path to the peer, which is as slow after the move. Restoring it needs no new timeout."""
    here, there = end(Host(1), 17), end(Host(2), 18)
    connect(here, there, timeout=14, retry_cnt=7)  # 67 ms
    world = World(here.host, there.host, link=Link(delay=0.06))
    for number in range(4):
        here.post(WrOpcode.RDMA_WRITE, number, BASE, 8)
        world.run(lambda number=number: len(here.scq.entries) == number + 1)  # type: ignore[misc]
    learned = here.sender.ack_timeout_now
    assert learned in (2 * ack_timeout(here), 4 * ack_timeout(here))
    assert 1 <= here.host.engine.counters["local_ack_timeout_err"] <= 2
    here.qp.stop()
    world.hosts.append(Host(3))
    migrate(world, here, world.hosts[-1])
    assert here.sender.ack_timeout_now == learned
    for number in range(4, 8):
        here.post(WrOpcode.RDMA_WRITE, number, BASE, 8)
        world.run(lambda number=number: len(here.scq.entries) == number + 1)  # type: ignore[misc]
    assert here.host.engine.counters["local_ack_timeout_err"] == 0
    world.link = Link()
    for number in range(8, 8 + 8300):
        here.post(WrOpcode.RDMA_WRITE, number, BASE, 8)
        world.run(lambda number=number: len(here.scq.entries) == number + 1)  # type: ignore[misc]
    assert here.sender.ack_timeout_now == ack_timeout(here), "it is shortened at the new place, too"


def test_the_time_of_a_move_does_not_prolong_a_timeout() -> None:
    """What was retransmitted before a stop and is acknowledged twice after it says nothing about the path."""
    here, there = end(Host(1), 17), end(Host(2), 18)
    connect(here, there, timeout=14, retry_cnt=7)
    world = World(here.host, there.host, link=Link(loss=1.0))
    here.post(WrOpcode.RDMA_WRITE, 1, BASE, 8)
    world.settle(0.1)
    assert here.host.engine.counters["local_ack_timeout_err"] == 1
    here.qp.stop()
    world.settle(2.0)
    world.link = Link(duplicate=1.0)
    world.hosts.append(Host(3))
    migrate(world, here, world.hosts[-1])
    world.run(lambda: bool(here.scq.entries))
    world.settle(0.01)
    assert here.host.engine.counters["rcvd_old_answer"] > 0
    assert here.sender.ack_timeout_now == ack_timeout(here)


@pytest.mark.parametrize(("learned", "restored"), [(1e-3, 0.067108864), (0.1, 0.1), (9.0, 0.268435456)])
def test_a_restored_timeout_is_within_the_limits_of_its_attribute(learned: float, restored: float) -> None:
    """IBA 9.7.6.1.3: between T and 4 T, whatever an image says."""
    here, there = end(Host(1), 17), end(Host(2), 18)
    connect(here, there, timeout=14)
    here.sender.ack_timeout_now = learned
    here.qp.stop()
    migrate(World(here.host, there.host), here, Host(3))
    assert here.sender.ack_timeout_now == pytest.approx(restored)


def test_losses_do_not_prolong_a_timeout() -> None:
    here, there = end(Host(1), 17), end(Host(2), 18)
    connect(here, there, timeout=14, retry_cnt=7)
    world = World(here.host, there.host, link=Link(loss=0.3, seed=4))
    for number in range(60):
        here.post(WrOpcode.RDMA_WRITE, number, BASE, 8)
        world.run(lambda number=number: len(here.scq.entries) == number + 1)  # type: ignore[misc]
    assert here.host.engine.counters["local_ack_timeout_err"] > 20
    assert here.sender.ack_timeout_now == ack_timeout(here)


def test_a_partner_that_answers_each_packet_that_comes_twice_does_not_prolong_a_timeout() -> None:
    """As rxe does when an ACK was lost: one message's packets bring several answers at once."""
    here, there = end(Host(1), 17), end(Host(2), 18)
    connect(here, there, timeout=14, retry_cnt=7)
    here.post(WrOpcode.RDMA_WRITE, 1, BASE, 4096)
    there.host.turn(here.host.pull(0.0), 0.0)  # its ACK is lost
    now = 0.0672
    again = here.host.turn([], now)
    answers = [there.host.turn([frame], now) for frame in again]
    assert [len(frames) for frames in answers] == [1] * 4
    for frames in answers:
        here.host.turn(frames, now + 0.002)
    assert [wc.status for wc in here.scq.entries] == [WcStatus.SUCCESS]
    assert here.host.engine.counters["rcvd_old_answer"] == 3
    assert here.sender.ack_timeout_now == ack_timeout(here)


@pytest.mark.parametrize("count", range(7))
def test_retry_counts_are_spent_exactly(count: int) -> None:
    """retry_cnt repetitions after silence, rnr_retry after RNR NAKs: each has its own count and its own status."""
    here, there = end(Host(1), 17), end(Host(2), 18)
    connect(here, there, timeout=14, retry_cnt=count, rnr_retry=7)
    world = World(here.host, there.host, link=Link(loss=1.0))
    here.post(WrOpcode.RDMA_WRITE, 1, BASE, 8)
    world.run(lambda: bool(here.scq.entries))
    assert len(world.trace) == 1 + count
    assert here.scq.entries[0].status == WcStatus.RETRY_EXC_ERR
    here, there = end(Host(1), 17), end(Host(2), 18)
    connect(here, there, retry_cnt=7, rnr_retry=count)
    world = World(here.host, there.host)
    here.post(WrOpcode.SEND, 1, BASE, 8)
    world.run(lambda: bool(here.scq.entries))
    assert sum(frame[42] == 0x04 for _, frame in world.trace) == 1 + count
    assert here.scq.entries[0].status == WcStatus.RNR_RETRY_EXC_ERR


def test_rnr_retry_7_waits_until_a_receive_is_posted() -> None:
    here, there = end(Host(1), 17), end(Host(2), 18)
    connect(here, there, min_rnr_timer=12, rnr_retry=7)
    world = World(here.host, there.host)
    here.post(WrOpcode.SEND, 1, BASE, 8)
    world.settle(5)
    assert not here.scq.entries and here.host.engine.counters["rcvd_rnr_err"] > 1000
    there.receive(9, BASE, 64)
    world.run(lambda: bool(here.scq.entries))
    assert [(wc.wr_id, wc.status) for wc in there.rcq.entries] == [(9, 0)]
    assert here.scq.entries[0].status == WcStatus.SUCCESS


def test_timeout_0_waits_for_ever_and_retry_7_never_ends() -> None:
    here, there = end(Host(1), 17), end(Host(2), 18)
    connect(here, there, timeout=0)
    world = World(here.host, there.host, link=Link(loss=1.0))
    here.post(WrOpcode.SEND, 1, BASE, 8)
    world.settle(10000)
    assert len(world.trace) == 1
    here, there = end(Host(1), 17), end(Host(2), 18)
    connect(here, there, timeout=14, retry_cnt=7)
    world = World(here.host, there.host, link=Link(loss=1.0))
    here.post(WrOpcode.SEND, 1, BASE, 8)
    world.settle(100)
    assert len(world.trace) > 1000 and not here.scq.entries


@pytest.mark.parametrize("code", range(32))
def test_rnr_wait(code: int) -> None:
    here, there = end(Host(1), 17), end(Host(2), 18)
    connect(here, there, min_rnr_timer=code, rnr_retry=2)
    world = World(here.host, there.host)
    here.post(WrOpcode.SEND, 1, BASE, 8)
    here.post(WrOpcode.RDMA_WRITE, 2, BASE, 8)
    world.run(lambda: bool(here.scq.entries))
    sends = [when for when, frame in world.trace if frame[42] == 0x04]
    assert len(sends) == 3
    for before, after in pairwise(sends):
        assert RNR_TIMER[code] / 1000 <= after - before < RNR_TIMER[code] / 1000 + 1e-3
    assert [wc.status for wc in here.scq.entries] == [WcStatus.RNR_RETRY_EXC_ERR, WcStatus.WR_FLUSH_ERR]
    assert there.attributes.state == QpState.RTS


def test_retries_are_fresh_after_progress() -> None:
    """Every packet is lost twice; two retries are enough for any number of messages."""
    here, there = end(Host(1), 17), end(Host(2), 18)
    connect(here, there, timeout=12, retry_cnt=2)
    seen: dict[bytes, int] = {}

    def drop(frame: bytes) -> bool:
        key = frame[42:54]
        seen[key] = seen.get(key, 0) + 1
        return frame[42] != 0x11 and seen[key] <= 2

    world = World(here.host, there.host, link=Link(drop=drop))
    for number in range(5):
        there.receive(number, BASE, 8)
        here.post(WrOpcode.SEND, number, BASE, 8)
        world.run(lambda number=number: len(here.scq.entries) == number + 1)  # type: ignore[misc]
    assert [wc.status for wc in here.scq.entries] == [WcStatus.SUCCESS] * 5


def test_gap_statistics() -> None:
    """The longest time between two completions, of either queue, and when it ended."""
    here, there = end(Host(1), 17), end(Host(2), 18)
    connect(here, there)
    world = World(here.host, there.host)
    ends = []
    for pause in (0.1, 3.0, 0.5):
        here.post(WrOpcode.RDMA_WRITE, 1, BASE, 8)
        world.settle(pause)
        ends.append(here.statistics.gap_last)
    assert here.statistics.gap_longest == pytest.approx(3.0)
    assert here.statistics.gap_longest_end == ends[2]
    here.statistics.reset_gaps()
    assert (
        here.statistics.gap_last is None
        and here.statistics.gap_longest == 0.0
        and here.statistics.gap_longest_end is None
    )


def test_next_timer_is_never_late() -> None:
    """A caller that sleeps until `next_timer` misses nothing: in a run with losses every deadline was announced."""
    here, there = end(Host(1), 17, 1 << 17), end(Host(2), 18, 1 << 17)
    connect(here, there, timeout=12)
    world = World(here.host, there.host, link=Link(7, loss=0.3))

    def check() -> None:
        for one in (here, there):
            deadlines = [d for d in (one.sender.ack_deadline, one.sender.rnr_deadline) if d is not None]
            if deadlines:
                announced = one.host.engine.next_timer()
                assert announced is not None and announced <= min(deadlines)

    world.after_step = check
    for number in range(20):
        here.post(WrOpcode.RDMA_WRITE, number, BASE, 3000)
        here.post(WrOpcode.RDMA_READ, number, BASE + 65536, 3000)
    world.run(lambda: len(here.scq.entries) == 40)
