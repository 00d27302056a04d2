"""Invariant: a queue pair may be moved at any moment of its traffic, by either end, without a trace in the data.

`traffic` says what must hold. Every test moves a live connection (dump through JSON, forgotten at the source, restored
at another host, rerouted, resumed) and then lets the traffic end; the runs are in virtual time and deterministic.
"""

from __future__ import annotations

import json

import pytest

from softroce_ext.simulation.hosts import BASE, End
from softroce_ext.simulation.link import Link
from softroce_ext.transport.engine import EngineConfig
from softroce_ext.transport.state.queue_pair import QueuePairState
from softroce_ext.transport.verbs import QpState, WcStatus, WrOpcode
from softroce_ext.wire import opcodes as op
from softroce_ext.wire.frame import parse
from softroce_ext.wire.headers import MIGROS_CAPABLE
from tests.support.transport.scene import (
    FORTH,
    STEPS,
    Scene,
    frames_of,
    is_nak_stopped,
    is_resume,
    is_resume_ack,
    migrate,
    one_sided,
    restore,
)
from tests.support.transport.traffic import Direction


def test_there_is_something_to_interrupt() -> None:
    assert STEPS > 50


@pytest.mark.parametrize("keep_address", [True, False], ids=["same address", "new address"])
@pytest.mark.parametrize("mover", ["requester", "responder"])
@pytest.mark.parametrize("step", range(STEPS))
def test_move_at_every_step(step: int, mover: str, keep_address: bool) -> None:
    scene = Scene()
    scene.step(step)
    moving = scene.a if mover == "requester" else scene.b
    moving.qp.stop()
    scene.step(step % 7)  # sometimes the partner hears of it, sometimes not
    migrate(scene.world, moving, scene.hosts[2], keep_address=keep_address)
    scene.finish()
    if moving.movement.peer_migros and frames_of(scene.world, is_resume):
        assert scene.total("resume_acked") == 1
        assert moving.movement.resume_acked_at is not None


def test_resume_ack_does_not_complete_what_never_arrived() -> None:
    """Defect 1: the RESUME's ACK carries expected - 1, so a SEND that was lost before the move stays incomplete."""
    scene = Scene()
    scene.finish()
    scene.link.drop = lambda frame: frame[42] == op.WRITE_ONLY
    scene.a.scq.on_push = None
    scene.a.post(WrOpcode.RDMA_WRITE, 99, BASE, 64, remote_address=BASE + 5000)
    scene.world.settle(1e-3)
    scene.a.qp.stop()
    completed = len(scene.a.scq.entries)
    migrate(scene.world, scene.a, scene.hosts[2])
    scene.world.settle(0.05)
    acks = frames_of(scene.world, is_resume_ack)
    assert acks and all(int.from_bytes(frame[51:54]) == scene.a.sender.una_psn - 1 & 0xFFFFFF for frame in acks)
    assert len(scene.a.scq.entries) == completed
    scene.link.drop = None
    scene.world.run(lambda: len(scene.a.scq.entries) == completed + 1)
    assert scene.b.ram.data[5000:5064] == scene.a.ram.data[0:64]


@pytest.mark.parametrize("kind", [WrOpcode.RDMA_READ, WrOpcode.ATOMIC_FETCH_AND_ADD])
def test_lost_answers_survive_the_move_of_the_responder(kind: WrOpcode) -> None:
    """Defect 3: a duplicate READ or atomic after the move is answered from dumped resources, an atomic exactly once."""
    scene = Scene()
    scene.finish()
    answers = (op.READ_RESPONSE_ONLY, op.ATOMIC_ACKNOWLEDGE)
    scene.link.drop = lambda frame: frame[42] in answers
    scene.a.scq.on_push = None
    before = len(scene.a.scq.entries)
    counter = BASE + 0x1000
    scene.b.ram.data[0x1000:0x1008] = (5).to_bytes(8, "little")
    scene.a.post(kind, 7, BASE + 0x3000, 8, remote_address=counter, compare_add=3)
    scene.world.settle(1e-3)
    scene.b.qp.stop()
    migrate(scene.world, scene.b, scene.hosts[2])
    scene.link.drop = None
    scene.world.run(lambda: len(scene.a.scq.entries) > before)
    assert scene.a.scq.entries[-1].status == WcStatus.SUCCESS
    assert scene.a.ram.data[0x3000:0x3008] == (5).to_bytes(8, "little")
    after = 8 if kind == WrOpcode.ATOMIC_FETCH_AND_ADD else 5
    assert int.from_bytes(scene.b.ram.data[0x1000:0x1008], "little") == after


@pytest.mark.parametrize("step", range(STEPS))
@pytest.mark.parametrize("order", ["a first", "b first"])
def test_both_ends_move_at_once(step: int, order: str) -> None:
    """Defect 4. Both are stopped (and Paused) when they are dumped; each resumes at its new host, address kept."""
    scene = Scene()
    scene.step(step)
    first, second = (scene.a, scene.b) if order == "a first" else (scene.b, scene.a)
    first.qp.stop()
    scene.step(step % 5)
    second.qp.stop()
    scene.step(2)
    images = [json.loads(json.dumps(moving.state.to_plain())) for moving in (first, second)]
    for moving in (first, second):
        moving.host.engine.remove_qp(moving.attributes.qpn)
    restore(scene.world, first, images[0], scene.hosts[2])
    scene.world.settle(0.3)  # its RESUMEs go nowhere yet
    restore(scene.world, second, images[1], scene.hosts[3])
    scene.finish()


def test_resume_to_a_stopped_partner_is_acknowledged_only_where_it_finally_runs() -> None:
    """One end moves to a new address while the other is stopped and dumped: the RESUME must reach the *new* place."""
    scene = Scene()
    scene.world.run(lambda: scene.a.movement.peer_migros)
    scene.a.qp.stop()
    scene.b.qp.stop()
    image = json.loads(json.dumps(scene.b.state.to_plain()))
    migrate(scene.world, scene.a, scene.hosts[2], keep_address=False)
    scene.world.settle(0.5)
    assert scene.a.movement.resume_pending and scene.a.qp.resume_settled
    assert not frames_of(scene.world, is_resume_ack)
    scene.hosts[1].engine.remove_qp(scene.b.attributes.qpn)
    restore(scene.world, scene.b, image, scene.hosts[3])
    scene.finish()


@pytest.mark.parametrize("step", range(STEPS))
def test_rollback(step: int) -> None:
    """Defect 6: the restore failed; the source is still there, un-stops and resumes."""
    scene = Scene()
    scene.step(step)
    moving = scene.b if step % 2 else scene.a
    moving.qp.stop()
    moving.state.to_plain()
    scene.world.settle(0.5)
    moving.qp.resume()
    scene.finish(limit=5.0)


def test_a_queue_pair_moves_many_times() -> None:
    scene = Scene(Link(3, 0.02, 0.02, 0.02, 0.0))
    for number in range(8):
        scene.step(4)
        moving = scene.a if number % 3 else scene.b
        moving.qp.stop()
        scene.step(number)
        free = next(host for host in scene.hosts if not host.engine.qps)
        migrate(scene.world, moving, free)
    scene.finish()


@pytest.mark.parametrize("step", range(STEPS))
@pytest.mark.parametrize("mover", ["requester", "responder"])
def test_a_stock_partner_gets_silence(step: int, mover: str) -> None:
    """Defect 8: no 0x65 and no RESUME to a partner that does not announce MigrOS; retransmission does the rest."""
    configs = (EngineConfig(), EngineConfig(migros=False))
    scene = Scene(configs=configs if mover == "requester" else configs[::-1])
    scene.step(step)
    moving = scene.a if mover == "requester" else scene.b
    moving.qp.stop()
    scene.world.settle(0.1)
    migrate(scene.world, moving, scene.hosts[2 if mover == "requester" else 3])
    scene.finish()
    assert not frames_of(scene.world, is_nak_stopped)
    assert not frames_of(scene.world, is_resume)
    assert not scene.a.movement.peer_migros or not scene.b.movement.peer_migros


def test_without_migros_no_reserved_bit_is_sent() -> None:
    scene = Scene(configs=(EngineConfig(migros=False), EngineConfig(migros=False)))
    scene.finish()
    assert not any(frame[50] & 0x7F for _, frame in scene.world.trace)
    scene = Scene()
    scene.finish()
    assert all(frame[50] & 0x7F == MIGROS_CAPABLE for _, frame in scene.world.trace)


@pytest.mark.parametrize("keep_address", [True, False])
@pytest.mark.parametrize("step", range(1, 100, 6))
@pytest.mark.parametrize("lost", [0, 2])
def test_an_end_in_rtr_moves(step: int, keep_address: bool, lost: int) -> None:
    """It has no PSN of its own: its RESUME says what it expects, and is repeated and acknowledged like any other."""
    world, a, b, free = one_sided()
    direction = Direction(a, b, FORTH, 1)
    left = lost

    def drop(frame: bytes) -> bool:
        nonlocal left
        hit = bool(left) and is_resume(frame)
        left -= hit
        return hit

    world.link.drop = drop
    for _ in range(step):
        world.step()
    b.qp.stop()
    for _ in range(step % 5):
        world.step()
    migrate(world, b, free, keep_address=keep_address)
    world.run(direction.done, limit=10)
    world.settle(3)
    direction.check_end()
    assert not b.movement.resume_pending and not a.movement.paused
    assert b.attributes.state == QpState.RTR


def test_the_partner_of_an_end_in_rtr_moves() -> None:
    world, a, b, free = one_sided()
    direction = Direction(a, b, FORTH, 1)
    world.run(lambda: a.movement.peer_migros)
    a.qp.stop()
    migrate(world, a, free, keep_address=False)
    world.run(direction.done, limit=10)
    direction.check_end()


def test_dump_is_complete_and_pure() -> None:
    """to_plain is JSON, from_plain its inverse, at every step of the traffic; dumping changes nothing."""
    scene = Scene(Link(5, 0.1, 0.1, 0.1))

    def check(here: End) -> None:
        plain = here.state.to_plain()
        again = QueuePairState.from_plain(json.loads(json.dumps(plain)))
        assert again == here.state
        assert again.to_plain() == plain

    while not scene.ends():
        scene.world.step()
        check(scene.a)
        check(scene.b)
    plain = scene.a.state.to_plain()
    broken = {**plain, "sender": {**plain["sender"], "inflight": [1]}}
    for nonsense in ({}, {"version": 1}, {"version": plain["version"]}, {"version": 99}, broken, None):
        with pytest.raises(ValueError):
            QueuePairState.from_plain(nonsense)


def test_frames_of_the_move_are_as_the_paper_has_them() -> None:
    scene = Scene()
    scene.step(6)
    scene.b.qp.stop()
    scene.world.settle(0.2)
    migrate(scene.world, scene.b, scene.hosts[2])
    scene.finish()
    resume = parse(memoryview(frames_of(scene.world, is_resume)[0]))
    nak = parse(memoryview(frames_of(scene.world, is_nak_stopped)[0]))
    assert not isinstance(resume, str) and not isinstance(nak, str)
    assert (resume.opcode, resume.ack_byte, len(resume.payload)) == (0x19, 0xC0, 0)
    assert nak.opcode == 0x11 and nak.raw[nak.headers_at] == 0x65
