"""Invariant: a READ brings what was there when everything posted before it, and nothing behind it, had been executed.

No request sets a fence; the link loses nothing (a READ that is asked for again may bring newer data, as with rxe).
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softroce_ext.simulation.hosts import ALL_ACCESS, BASE, ByteSink, Region
from softroce_ext.transport.rc.in_order import MAX_HELD, MAX_HELD_BY_ALL
from softroce_ext.transport.verbs import QpState, WcStatus, WrOpcode
from softroce_ext.wire import opcodes as op
from softroce_ext.wire.frame import parse
from tests.support.transport.pairs import pair

SEND, WRITE, READ, ADD = (
    WrOpcode.SEND, WrOpcode.RDMA_WRITE, WrOpcode.RDMA_READ, WrOpcode.ATOMIC_FETCH_AND_ADD,
)  # fmt: skip
AREA = 8192
SOURCE = 40960
"""Where the requester's data begin, behind what its READs bring."""

REQUESTS = st.tuples(st.sampled_from((SEND, WRITE, READ, READ, ADD)), st.integers(0, 1000), st.integers(1, 4000))


@settings(deadline=None, max_examples=150)
@given(st.lists(REQUESTS, min_size=2, max_size=10), st.sampled_from((256, 1024)), st.integers(1, 3))
def test_reads_see_what_came_before_them(requests: list[tuple[int, int, int]], mtu: int, quantum: int) -> None:
    world, here, there = pair(path_mtu=mtu)
    there.host.engine.config.quantum = quantum
    here.ram.data[SOURCE : SOURCE + AREA] = bytes(index * 7 % 251 for index in range(AREA))
    memory = bytearray(AREA)
    expected: dict[int, bytes] = {}
    for number, (opcode, at, length) in enumerate(requests):
        source = SOURCE + 13 * number
        data = here.ram.data[source : source + length]
        if opcode == READ:
            place = 4000 * number
            expected[place] = bytes(memory[at : at + length])
            here.post(READ, number, BASE + place, length, remote_address=BASE + at)
        elif opcode == ADD:
            at &= ~7
            memory[at : at + 8] = (int.from_bytes(memory[at : at + 8], "little") + length).to_bytes(8, "little")
            here.post(ADD, number, BASE + 40000, 8, remote_address=BASE + at, compare_add=length)
        else:
            memory[at : at + length] = data
            if opcode == SEND:
                there.receive(number, BASE + at, length)
            here.post(opcode, number, BASE + source, length, remote_address=BASE + at)
    world.run(lambda: len(here.scq.entries) == len(requests))
    assert {wc.status for wc in here.scq.entries} == {WcStatus.SUCCESS}
    assert {place: bytes(here.ram.data[place : place + len(data)]) for place, data in expected.items()} == expected
    assert there.ram.data[:AREA] == memory
    assert not there.host.engine.holding
    assert not there.qp.held and there.host.engine.held == 0


def arrive(*requests: tuple[int, dict[str, Any]]) -> Any:
    """A pair whose passive end has got these requests as one batch and has sent nothing yet."""
    scene = pair(path_mtu=256)
    for number, (opcode, more) in enumerate(requests):
        scene.here.post(opcode, number, BASE + 4096 * number, **more)
    engine = scene.there.host.engine
    for frame in scene.here.host.pull(0.0):
        engine.receive(memoryview(bytearray(frame)), 0.0)
    engine.end_of_batch(0.0)
    return scene


def test_a_key_taken_back_behind_a_read_of_it() -> None:
    """Without a fence: the READ is answered, then the key is gone."""
    scene = pair()
    scene.there.pd.regions[2] = Region(BASE, 1 << 16, ALL_ACCESS)
    scene.there.receive(7, BASE + 9000, 100)
    scene.here.post(READ, 1, BASE, 8000, rkey=2)
    scene.here.post(WrOpcode.SEND_WITH_INV, 2, BASE + 9000, 10, imm=2)
    scene.world.run(lambda: len(scene.here.scq.entries) == 2)
    assert [wc.status for wc in (*scene.here.scq.entries, *scene.there.rcq.entries)] == [WcStatus.SUCCESS] * 3
    assert 2 not in scene.there.pd.regions


def test_what_waits_is_bounded() -> None:
    """A partner that sends on and on while its READ is answered is not listened to."""
    scene = arrive((READ, {"length": 20000}), (WRITE, {"length": 100}))
    engine = scene.there.host.engine
    (frame,) = scene.there.qp.held
    for _ in range(MAX_HELD + 5):
        engine.receive(memoryview(frame), 0.0)
    assert len(scene.there.qp.held) == MAX_HELD
    assert engine.counters["dropped_busy"] == 6


def test_what_waits_on_all_queue_pairs_is_bounded() -> None:
    scene = arrive((READ, {"length": 20000}), (WRITE, {"length": 100}))
    engine = scene.there.host.engine
    (frame,) = scene.there.qp.held
    engine.held = MAX_HELD_BY_ALL
    engine.receive(memoryview(frame), 0.0)
    assert len(scene.there.qp.held) == 1
    assert engine.counters["dropped_busy"] == 1


@pytest.mark.parametrize("end", ["stop", "reset", "error", "remove"])
def test_what_waits_goes_with_its_queue_pair(end: str) -> None:
    """Nothing of it is executed after the queue pair was stopped (its partner sends it again), failed or taken away."""
    scene = arrive((READ, {"length": 20000}), (WRITE, {"length": 100, "remote_address": BASE + 30000}))
    engine, qp = scene.there.host.engine, scene.there.qp
    assert len(qp.held) == 1
    scene.here.ram.data[4096:4196] = bytes([7] * 100)
    if end == "stop":
        qp.stop()
    elif end == "remove":
        engine.remove_qp(qp.attributes.qpn)
    else:
        qp.modify({"qp_state": QpState.RESET if end == "reset" else QpState.ERR})
    while engine.frames_to_send(0.0, ByteSink()):
        pass
    assert engine.holding == [] and engine.held == 0
    assert scene.there.ram.data[30000:30100] == bytes(100)


def test_answers_leave_before_what_is_behind_them_is_executed() -> None:
    """Half of the READ answers have left: the SEND behind it has not arrived, nor has a READ behind it started."""
    scene = pair(path_mtu=256)
    scene.there.receive(7, BASE, 1000)
    scene.here.post(READ, 1, BASE, 10240)
    scene.here.post(SEND, 2, BASE + 20480, 1000)
    scene.here.post(READ, 3, BASE + 24576, 100)
    engine = scene.there.host.engine
    for frame in scene.here.host.pull(0.0):
        engine.receive(memoryview(bytearray(frame)), 0.0)
    engine.end_of_batch(0.0)
    assert engine.frames_to_send(0.0, ByteSink(room=20)) == 20
    assert scene.there.rcq.entries == []
    sink = ByteSink()
    while engine.frames_to_send(0.0, sink):
        pass
    assert [wc.status for wc in scene.there.rcq.entries] == [WcStatus.SUCCESS]
    tail = [parse(memoryview(frame)) for frame in sink.frames[-3:]]
    assert [packet.opcode for packet in tail] == [op.READ_RESPONSE_LAST, op.ACKNOWLEDGE, op.READ_RESPONSE_ONLY]
