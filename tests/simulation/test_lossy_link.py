"""Invariant: whatever a network loses, reorders, duplicates or corrupts, RC delivers exactly once, in order, intact.

The invariants are spelt out and checked in `traffic`; here hypothesis draws the traffic, the MTU, where the PSNs begin
and a seed for the network, and the run must come to its end in virtual time.
"""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from softroce_ext.simulation.hosts import ByteSink, Host, connect, end
from softroce_ext.simulation.link import Link
from softroce_ext.simulation.world import World
from softroce_ext.transport.verbs import WrOpcode
from tests.support.transport.traffic import MEMORY, Direction, Op

KINDS = (
    WrOpcode.SEND,
    WrOpcode.SEND_WITH_IMM,
    WrOpcode.RDMA_WRITE,
    WrOpcode.RDMA_WRITE_WITH_IMM,
    WrOpcode.RDMA_READ,
    WrOpcode.ATOMIC_FETCH_AND_ADD,
)


def op(opcode: WrOpcode, length: int, fence: bool, elements: int) -> Op:
    return Op(opcode, 8 if opcode == WrOpcode.ATOMIC_FETCH_AND_ADD else length, fence, elements)


operations = st.lists(
    st.builds(
        op,
        st.sampled_from(KINDS),
        st.one_of(st.integers(0, 300), st.integers(0, 5000), st.sampled_from([256, 1024, 4096, 8192])),
        st.booleans(),
        st.integers(1, 3),
    ),
    max_size=7,
)
psns = st.one_of(st.integers(0, 0xFFFFFF), st.integers(0xFFFFF0, 0xFFFFFF))


def run(link: Link, ops_a: list[Op], ops_b: list[Op], mtu: int, psn: int, reads: int = 16) -> World:
    a, b = Host(1), Host(2)
    end_a, end_b = end(a, 17, MEMORY), end(b, 65553, MEMORY)
    connect(end_a, end_b, psn, (psn * 7 + 3) & 0xFFFFFF, path_mtu=mtu, max_rd_atomic=reads)
    world = World(a, b, link=link)
    forth, back = Direction(end_a, end_b, ops_a, link.seed), Direction(end_b, end_a, ops_b, link.seed + 1)
    world.run(lambda: forth.done() and back.done(), limit=3600)
    world.settle(5)
    forth.check_end()
    back.check_end()
    for here in (end_a, end_b):
        sender = here.sender
        assert not sender.inflight and not here.receiver.answers
        assert sender.una_psn == sender.send_psn == sender.next_psn
        assert sender.ack_deadline is None and sender.rnr_deadline is None
    assert end_a.sender.una_psn == end_b.receiver.expected_psn
    return world


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(operations, operations, st.sampled_from([256, 512, 1024, 2048, 4096]), psns, st.integers(0, 1 << 30), st.data())
def test_exactly_once_in_order_intact(
    ops_a: list[Op], ops_b: list[Op], mtu: int, psn: int, seed: int, data: st.DataObject
) -> None:
    rate = st.sampled_from([0.0, 0.02, 0.1, 0.3])
    link = Link(seed, data.draw(rate), data.draw(rate), data.draw(rate), data.draw(rate))
    run(link, ops_a, ops_b, mtu, psn, data.draw(st.sampled_from([1, 2, 16])))


@pytest.mark.parametrize("mtu", [256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("kind", KINDS)
def test_a_clean_link_needs_no_retransmission(kind: WrOpcode, mtu: int) -> None:
    lengths = [8] * 20 if kind == WrOpcode.ATOMIC_FETCH_AND_ADD else [0, 1, mtu - 1, mtu, mtu + 1, 3 * mtu, 40000]
    world = run(Link(), [Op(kind, length) for length in lengths], [], mtu, 0xFFFFFE)
    counters = world.hosts[0].engine.counters
    assert counters["retransmits"] == counters["completer_retry_err"] == 0


@pytest.mark.parametrize("seed", range(6))
def test_long_messages_over_a_bad_link(seed: int) -> None:
    ops = [Op(WrOpcode.RDMA_WRITE, 20000), Op(WrOpcode.SEND, 20000), Op(WrOpcode.RDMA_READ, 20000)]
    world = run(Link(seed, 0.05, 0.05, 0.05, 0.05), ops, ops[::-1], 256, 0xFFFF00)
    assert world.hosts[0].engine.counters["retransmits"] > 0
    assert world.hosts[1].engine.counters["refused_icrc"] > 0


def test_many_queue_pairs_share_the_wire_fairly() -> None:
    """Eight QPs, one of them with a long READ to answer: none of the others waits for its end."""
    a, b = Host(1), Host(2)
    ends = []
    for number in range(8):
        end_a, end_b = end(a, 20 + number, MEMORY), end(b, 65560 + number, MEMORY)
        connect(end_a, end_b, path_mtu=256)
        ends.append((end_a, end_b))
    ends[0][0].post(WrOpcode.RDMA_READ, 1, length=60000)
    for frame in a.pull(0.0):
        b.engine.receive(memoryview(frame), 0.0)
    for _, end_b in ends[1:]:
        end_b.post(WrOpcode.RDMA_WRITE, 1, length=5000)
    b.engine.end_of_batch(0.0)
    sink = ByteSink(room=8 * 32)
    b.engine.frames_to_send(0.0, sink)
    share = Counter(int.from_bytes(frame[47:50]) for frame in sink.frames)
    assert len(share) == 8
    assert share[20] <= 8 * 32 - 7 * 20
    assert all(share[20 + number] == 20 for number in range(1, 8))
