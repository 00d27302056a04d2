"""Invariant: lost, late, repeated and forged messages of a move neither hang a connection nor take it away."""

from __future__ import annotations

import random

import pytest

from softroce_ext.simulation.hosts import BASE, ByteSink, Host, ip
from softroce_ext.simulation.link import Link
from softroce_ext.transport.engine import EngineConfig
from softroce_ext.transport.verbs import QpEvent, QpState, WcStatus, WrOpcode
from softroce_ext.wire.headers import BTH_AETH, MIGROS_CAPABLE
from tests.support.transport.scene import (
    BACK,
    FORTH,
    STEPS,
    Scene,
    frames_of,
    idle,
    is_nak_stopped,
    is_resume,
    is_resume_ack,
    migrate,
    one_sided,
    restore,
)
from tests.support.transport.traffic import Direction, Op


@pytest.mark.parametrize("step", range(0, STEPS, 3))
@pytest.mark.parametrize("lost", ["RESUME", "its ACK", "NAK_STOPPED", "three RESUMEs"])
def test_messages_of_the_move_may_be_lost(lost: str, step: int) -> None:
    scene = Scene()
    left = {"three RESUMEs": 3}.get(lost, 1)
    wanted = {"its ACK": is_resume_ack, "NAK_STOPPED": is_nak_stopped}.get(lost, is_resume)

    def drop(frame: bytes) -> bool:
        nonlocal left
        if left and wanted(frame):
            left -= 1
            return True
        return False

    scene.link.drop = drop
    scene.step(step)
    scene.b.qp.stop()
    migrate(scene.world, scene.b, scene.hosts[2], restore_delay=0.2)
    scene.finish()


def test_a_lost_resume_on_an_idle_connection_is_sent_again() -> None:
    """Defect 2 of the proof of concept: nothing outstanding at the mover, so no retransmission would carry it."""
    scene = Scene()
    scene.finish()
    scene.b.qp.stop()
    scene.world.settle(0.1)
    # The peer asks for something meanwhile, and gets NAK_STOPPED.
    more = Direction(scene.a, scene.b, [Op(WrOpcode.RDMA_WRITE, 5000)], 7)
    lost = [True, True]
    scene.link.drop = lambda frame: is_resume(frame) and bool(lost) and lost.pop()
    scene.a.scq.entries.clear()
    scene.a.scq.on_push = None
    scene.world.settle(0.05)
    assert scene.a.movement.paused
    assert not frames_of(scene.world, is_resume)
    migrate(scene.world, scene.b, scene.hosts[2])
    scene.world.run(lambda: len(scene.a.scq.entries) == 1, limit=1.0)
    assert scene.a.scq.entries[0].status == WcStatus.SUCCESS
    assert len(frames_of(scene.world, is_resume)) == 3
    assert more.sent[0].data == scene.b.ram.data[more.sent[0].address - BASE :][:5000]


@pytest.mark.parametrize("first", ["mover", "partner"])
def test_a_connection_that_was_never_used_moves_to_another_address(first: str) -> None:
    """Nothing has ever come from the partner: it is sent RESUME all the same, learns the address, and is known."""
    world, a, b, free = idle()
    b.qp.stop()
    migrate(world, b, free, keep_address=False)
    assert b.qp.resume_settled, "no wait for an answer that may not come"
    world.settle(1)
    assert not b.movement.resume_pending and b.movement.peer_migros
    direction = Direction(a, b, BACK, 7) if first == "partner" else Direction(b, a, BACK, 7)
    world.run(direction.done, limit=1)
    direction.check_end()
    assert a.host.engine.counters["rcvd_resume"] == 1


def test_a_partner_that_does_not_know_resume_is_left_alone_after_a_time() -> None:
    """A stock NIC drops it; nothing fails for that."""
    world, _, b, free = idle(EngineConfig(migros=False))
    b.qp.stop()
    migrate(world, b, free, keep_address=False)
    world.settle(100)
    assert 60 < len(frames_of(world, is_resume)) < 80
    assert (b.attributes.state, b.movement.resume_pending, b.events.seen) == (QpState.RTS, False, [])


def test_the_first_packet_ever_comes_after_the_dump() -> None:
    """The source tells the partner to wait, and the new place knows nothing of it: the partner asks by itself."""
    world, a, b, free = idle()
    b.qp.stop()
    plain = b.state.to_plain()
    direction = Direction(a, b, FORTH, 7)
    world.settle(0.2)
    assert a.movement.paused
    b.host.engine.remove_qp(b.attributes.qpn)
    restore(world, b, plain, free)
    world.run(direction.done, limit=1)
    direction.check_end()
    assert not frames_of(world, is_resume)


def test_a_paused_partner_spends_no_retry_and_waits() -> None:
    """Longer than all its retries would last."""
    scene = Scene()
    for here in (scene.a, scene.b):
        here.attributes.retry_cnt = here.sender.retry_left = 1
    scene.step(6)
    scene.b.qp.stop()
    scene.world.settle(20)
    assert scene.a.movement.paused
    before = len(scene.world.trace)
    scene.world.settle(20)
    assert len(scene.world.trace) == before, "a Paused queue pair sends nothing"
    migrate(scene.world, scene.b, scene.hosts[2])
    scene.finish()


def test_pause_has_an_end() -> None:
    """The mover vanished for good: after the limit ordinary retries run out and the application learns it."""
    scene = Scene()
    scene.a.attributes.retry_cnt = scene.a.sender.retry_left = 2
    scene.a.scq.on_push = None
    scene.step(6)
    scene.b.qp.stop()
    scene.world.settle(1)
    assert scene.a.movement.paused
    scene.hosts[1].alive = False
    scene.world.run(lambda: scene.a.attributes.state == QpState.ERR, limit=70)
    statuses = [wc.status for wc in scene.a.scq.entries if wc.status]
    assert statuses[0] == WcStatus.RETRY_EXC_ERR
    assert set(statuses[1:]) <= {WcStatus.WR_FLUSH_ERR}


def test_resume_gives_up() -> None:
    scene = Scene()
    scene.step(6)
    scene.b.qp.stop()
    scene.hosts[0].alive = False
    scene.b.scq.on_push = scene.b.rcq.on_push = None
    migrate(scene.world, scene.b, scene.hosts[2])
    scene.world.run(lambda: scene.b.attributes.state == QpState.ERR, limit=70)
    assert (scene.b.attributes.qpn, QpEvent.QP_FATAL) in scene.b.events.seen


def test_a_resume_of_a_receiver_out_of_what_was_sent_is_refused() -> None:
    world, a, b, _ = one_sided()
    direction = Direction(a, b, FORTH[:2], 1)
    world.run(direction.done)
    for psn in (a.sender.una_psn + 1, a.sender.una_psn - 1):
        path = b.attributes.path
        assert path is not None
        sink = ByteSink()
        headers = BTH_AETH.pack(0x1900FFFF, 17, 0xD0 << 24 | psn & 0xFFFFFF, 0)
        sink.add(path.replace(source_ip=ip(9)), headers, b"", 0)
        world.send(sink.frames)
    world.settle(0.01)
    assert world.hosts[0].engine.counters["refused_resume"] == 2


def forged_resume(scene: Scene, psn: int, source: int = 4, capable: bool = True) -> bytes:
    """A RESUME to `a` from host `source`, as anyone on the wire could send it."""
    assert scene.a.attributes.path is not None
    path = scene.b.attributes.path
    assert path is not None
    sink = ByteSink()
    ack_byte = 0x80 | (MIGROS_CAPABLE if capable else 0)
    headers = BTH_AETH.pack(0x1900FFFF, scene.a.attributes.qpn, ack_byte << 24 | psn, 0)
    sink.add(path.replace(source_ip=ip(source), source_mac=b"\2" * 6), headers, b"", 0)
    return sink.frames[0]


@pytest.mark.parametrize("offset", [1, 0x800000, -200, -(1 << 20)])
def test_a_resume_out_of_the_window_is_refused(offset: int) -> None:
    """Defect 5, as far as a PSN can guard: old and stray RESUMEs do not move a connection."""
    scene = Scene()
    scene.finish()
    before = scene.a.attributes.path
    scene.world.send([forged_resume(scene, scene.a.receiver.expected_psn + offset & 0xFFFFFF)])
    scene.world.settle(0.01)
    assert scene.a.attributes.path == before
    assert scene.hosts[0].engine.counters["refused_resume"] == 1
    assert scene.hosts[0].engine.counters["rcvd_resume"] == 0


def test_a_resume_without_the_capability_bit_is_refused() -> None:
    scene = Scene()
    scene.finish()
    before = scene.a.attributes.path
    scene.world.send([forged_resume(scene, scene.a.receiver.expected_psn, capable=False)])
    scene.world.settle(0.01)
    assert scene.a.attributes.path == before


def test_what_the_guard_does_not_cover() -> None:
    """Honesty: somebody who knows QPN and PSN can move a connection, as they can inject data in any RoCE network."""
    scene = Scene()
    scene.finish()
    scene.world.send([forged_resume(scene, scene.a.receiver.expected_psn)])
    scene.world.settle(0.01)
    assert scene.a.attributes.path is not None and scene.a.attributes.path.destination_ip == ip(4)


@pytest.mark.parametrize("seed", range(60))
def test_chaos(seed: int) -> None:
    """Moves, rollbacks, both ends at once, again and again, at random moments, over a bad link."""
    randomness = random.Random(seed)
    rate = randomness.choice([0.0, 0.0, 0.05, 0.15])
    scene = Scene(Link(seed, rate, rate, rate, rate / 3, spacing=randomness.choice([0.0, 1e-6, 1e-4])))
    scene.hosts += [Host(5), Host(6)]
    scene.world.hosts = scene.hosts
    for _ in range(randomness.randrange(2, 9)):
        scene.step(randomness.randrange(25))
        here = randomness.choice([scene.a, scene.b])
        there = scene.b if here is scene.a else scene.a
        if not here.movement.stopped:
            here.qp.stop()
        elif randomness.random() < 0.3:
            here.qp.resume()
        else:
            # A new address only while the partner can hear of it: it is not being moved, and neither was this end
            # before the partner heard.
            free = not there.movement.stopped and not here.movement.resume_pending and not there.movement.resume_pending
            keep = not (free and here.movement.peer_migros and randomness.random() < 0.5)
            place = next(host for host in scene.hosts if not host.engine.qps)
            migrate(scene.world, here, place, keep_address=keep, restore_delay=randomness.choice([0, 1e-4, 0.1]))
            if not keep:
                scene.world.run(lambda here=here: not here.movement.resume_pending)  # type: ignore[misc]
    for here in (scene.a, scene.b):
        if here.movement.stopped:
            here.qp.resume()
    scene.finish(limit=30.0)


def test_a_stale_nak_stopped_just_after_a_resume_pauses_for_a_moment_only() -> None:
    """It was reordered behind the RESUME: an ordinary pause would wait for a RESUME that has come already."""
    scene = Scene()
    scene.step(4)
    scene.b.qp.stop()
    scene.world.run(lambda: bool(frames_of(scene.world, is_nak_stopped)), limit=10)
    stale = frames_of(scene.world, is_nak_stopped)[0]
    migrate(scene.world, scene.b, scene.hosts[2])
    scene.world.run(lambda: scene.b.movement.resume_acked_at is not None)
    engine = scene.a.host.engine
    before = engine.counters["rcvd_nak_stopped"]
    assert not scene.ends() and not scene.a.movement.paused
    scene.world.send([stale])
    scene.world.run(lambda: engine.counters["rcvd_nak_stopped"] > before, limit=1.0)
    assert engine.counters["rcvd_nak_stopped"] == before + 1 and scene.a.movement.paused
    heard = scene.world.now
    scene.world.run(lambda: not scene.a.movement.paused, limit=1.0)
    assert 0 < scene.world.now - heard <= engine.config.stale_stop_pause + 1e-9
    scene.finish(limit=5.0)


@pytest.mark.parametrize("seed", range(25))
def test_move_over_a_bad_link(seed: int) -> None:
    scene = Scene(Link(seed, 0.15, 0.15, 0.15, 0.05))
    scene.step(2 + seed)
    moving = scene.a if seed % 2 else scene.b
    moving.qp.stop()
    scene.step(seed % 6)
    migrate(scene.world, moving, scene.hosts[2], keep_address=seed % 3 != 0 or not moving.movement.peer_migros)
    scene.finish()
