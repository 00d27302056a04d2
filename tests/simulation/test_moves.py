"""Invariant: a queue pair may be moved at any moment of its traffic, by either end, and nobody can tell by the data.

`traffic` says what must hold. Every test moves a live connection (dump through JSON, forgotten at the source, restored
at another host, rerouted, resumed) and then lets the traffic end; the runs are in virtual time and deterministic.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable

import pytest
from traffic import MEMORY, Direction, Op
from world import (
    ALL_ACCESS,
    BASE,
    ByteSink,
    End,
    Host,
    Link,
    World,
    connect,
    end,
    ip,
    migrate,
    path_between,
    restore,
    to_rts,
)

from softroce_ext.transport.context import QpContext
from softroce_ext.transport.engine import EngineConfig
from softroce_ext.transport.verbs import QpEvent, QpState, WcStatus, WrOpcode
from softroce_ext.wire import opcodes as op
from softroce_ext.wire.frame import parse
from softroce_ext.wire.headers import BTH_AETH, MIGROS_CAPABLE, NAK_STOPPED

FORTH = [
    Op(WrOpcode.SEND, 700),
    Op(WrOpcode.RDMA_WRITE, 2000),
    Op(WrOpcode.RDMA_READ, 1500),
    Op(WrOpcode.ATOMIC_FETCH_AND_ADD, 8),
    Op(WrOpcode.RDMA_WRITE_WITH_IMM, 300),
    Op(WrOpcode.SEND, 0),
    Op(WrOpcode.RDMA_READ, 40),
    Op(WrOpcode.ATOMIC_FETCH_AND_ADD, 8),
    Op(WrOpcode.SEND_WITH_IMM, 1000),
]
BACK = [Op(WrOpcode.SEND, 900), Op(WrOpcode.RDMA_READ, 1200), Op(WrOpcode.RDMA_WRITE, 600), Op(WrOpcode.SEND, 10)]


class Scene:
    """Hosts 1 and 2 with a connection and its traffic; hosts 3 and 4 to go to."""

    def __init__(self, link: Link | None = None, configs: tuple[EngineConfig, EngineConfig] | None = None) -> None:
        first, second = configs or (EngineConfig(), EngineConfig())
        self.hosts = [Host(1, first), Host(2, second), Host(3, first), Host(4, second)]
        self.a, self.b = end(self.hosts[0], 17, MEMORY), end(self.hosts[1], 65553, MEMORY)
        connect(self.a, self.b, psn_a=0xFFFFFA, path_mtu=256)
        self.link = link or Link(spacing=1e-6)
        self.world = World(*self.hosts, link=self.link)
        self.forth = Direction(self.a, self.b, FORTH, 1)
        self.back = Direction(self.b, self.a, BACK, 2)

    def ends(self) -> bool:
        return self.forth.done() and self.back.done()

    def finish(self, limit: float = 300.0) -> None:
        self.world.run(self.ends, limit)
        self.world.settle(3)
        self.forth.check_end()
        self.back.check_end()
        for here, there in ((self.a, self.b), (self.b, self.a)):
            context = here.context
            assert not (context.stopped or context.paused or context.resume_pending)
            assert not here.events.seen
            assert context.path is not None and there.context.path is not None
            assert context.path.destination_ip == there.context.path.source_ip

    def step(self, number: int) -> None:
        for _ in range(number):
            self.world.step()

    def total(self, counter: str) -> int:
        return sum(host.engine.counters[counter] for host in self.hosts)


def undisturbed_steps() -> int:
    scene = Scene()
    steps = 0
    while not scene.ends():
        scene.world.step()
        steps += 1
    return steps


STEPS = undisturbed_steps()


def frames_of(world: World, wanted: Callable[[bytes], bool]) -> list[bytes]:
    return [frame for _, frame in world.trace if wanted(frame)]


def is_resume(frame: bytes) -> bool:
    return frame[42] == op.RESUME


def is_resume_ack(frame: bytes) -> bool:
    return frame[42] == op.ACKNOWLEDGE and bool(frame[50] & 0x20)


def is_nak_stopped(frame: bytes) -> bool:
    return frame[42] == op.ACKNOWLEDGE and frame[54] == NAK_STOPPED


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
    # A partner that has never been heard cannot be known to speak MigrOS: it can be found at the same address only.
    keep_address = keep_address or not moving.context.peer_migros
    migrate(scene.world, moving, scene.hosts[2], keep_address=keep_address)
    scene.finish()
    if moving.context.peer_migros and frames_of(scene.world, is_resume):
        assert scene.total("resume_acked") == 1
        assert moving.context.resume_acked_at is not None


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
    # The partner asks for something meanwhile, and is told to wait.
    more = Direction(scene.a, scene.b, [Op(WrOpcode.RDMA_WRITE, 5000)], 7)
    lost = [True, True]
    scene.link.drop = lambda frame: is_resume(frame) and bool(lost) and lost.pop()
    scene.a.scq.entries.clear()
    scene.a.scq.on_push = None
    scene.world.settle(0.05)
    assert scene.a.context.paused
    assert not frames_of(scene.world, is_resume)
    migrate(scene.world, scene.b, scene.hosts[2])
    scene.world.run(lambda: len(scene.a.scq.entries) == 1, limit=1.0)
    assert scene.a.scq.entries[0].status == WcStatus.SUCCESS
    assert len(frames_of(scene.world, is_resume)) == 3
    assert more.sent[0].data == scene.b.ram.data[more.sent[0].address - BASE :][:5000]


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
    assert acks and all(int.from_bytes(frame[51:54]) == scene.a.context.una_psn - 1 & 0xFFFFFF for frame in acks)
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
    images = [json.loads(json.dumps(moving.context.to_plain())) for moving in (first, second)]
    for moving in (first, second):
        moving.host.engine.remove_qp(moving.context.qpn)
    restore(scene.world, first, images[0], scene.hosts[2])
    scene.world.settle(0.3)  # its RESUMEs go nowhere yet
    restore(scene.world, second, images[1], scene.hosts[3])
    scene.finish()


def test_resume_to_a_stopped_partner_is_acknowledged_only_where_it_finally_runs() -> None:
    """One end moves to a new address while the other is stopped and dumped: the RESUME must reach the *new* place."""
    scene = Scene()
    scene.world.run(lambda: scene.a.context.peer_migros)
    scene.a.qp.stop()
    scene.b.qp.stop()
    image = json.loads(json.dumps(scene.b.context.to_plain()))
    migrate(scene.world, scene.a, scene.hosts[2], keep_address=False)
    scene.world.settle(0.5)
    assert scene.a.context.resume_pending and scene.a.qp.resume_settled
    assert not frames_of(scene.world, is_resume_ack)
    scene.hosts[1].engine.remove_qp(scene.b.context.qpn)
    restore(scene.world, scene.b, image, scene.hosts[3])
    scene.finish()


@pytest.mark.parametrize("step", range(STEPS))
def test_rollback(step: int) -> None:
    """Defect 6: the restore failed; the source is still there, un-stops and resumes."""
    scene = Scene()
    scene.step(step)
    moving = scene.b if step % 2 else scene.a
    moving.qp.stop()
    moving.context.to_plain()
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


@pytest.mark.parametrize("seed", range(25))
def test_move_over_a_bad_link(seed: int) -> None:
    scene = Scene(Link(seed, 0.15, 0.15, 0.15, 0.05))
    scene.step(2 + seed)
    moving = scene.a if seed % 2 else scene.b
    moving.qp.stop()
    scene.step(seed % 6)
    migrate(scene.world, moving, scene.hosts[2], keep_address=seed % 3 != 0 or not moving.context.peer_migros)
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
    assert not scene.a.context.peer_migros or not scene.b.context.peer_migros


def test_without_migros_no_reserved_bit_is_sent() -> None:
    scene = Scene(configs=(EngineConfig(migros=False), EngineConfig(migros=False)))
    scene.finish()
    assert not any(frame[50] & 0x7F for _, frame in scene.world.trace)
    scene = Scene()
    scene.finish()
    assert all(frame[50] & 0x7F == MIGROS_CAPABLE for _, frame in scene.world.trace)


def test_a_paused_partner_spends_no_retry_and_waits() -> None:
    """Longer than all its retries would last."""
    scene = Scene()
    for here in (scene.a, scene.b):
        here.context.retry_cnt = here.context.retry_left = 1
    scene.step(6)
    scene.b.qp.stop()
    scene.world.settle(20)
    assert scene.a.context.paused
    before = len(scene.world.trace)
    scene.world.settle(20)
    assert len(scene.world.trace) == before, "a Paused queue pair sends nothing"
    migrate(scene.world, scene.b, scene.hosts[2])
    scene.finish()


def test_pause_has_an_end() -> None:
    """The mover vanished for good: after the limit ordinary retries run out and the application learns it."""
    scene = Scene()
    scene.a.context.retry_cnt = scene.a.context.retry_left = 2
    scene.a.scq.on_push = None
    scene.step(6)
    scene.b.qp.stop()
    scene.world.settle(1)
    assert scene.a.context.paused
    scene.hosts[1].alive = False
    scene.world.run(lambda: scene.a.context.state == QpState.ERR, limit=70)
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
    scene.world.run(lambda: scene.b.context.state == QpState.ERR, limit=70)
    assert (scene.b.context.qpn, QpEvent.QP_FATAL) in scene.b.events.seen


def one_sided(scene_link: Link | None = None) -> tuple[World, End, End, Host]:
    """As perftest's servers do: `b` stays in RTR and only answers. Host 3 is free."""
    hosts = [Host(1), Host(2), Host(3)]
    a, b = end(hosts[0], 17, MEMORY), end(hosts[1], 65553, MEMORY)
    to_rts(a, path_between(a, b), 65553, sq_psn=0xFFFFF0, path_mtu=256)
    b.qp.modify({"qp_state": 1, "pkey_index": 0, "port_num": 1, "qp_access_flags": ALL_ACCESS})
    b.qp.modify(
        {
            "qp_state": 2, "path": path_between(b, a), "path_mtu": 256, "destination_qpn": 17, "rq_psn": 0xFFFFF0,
            "max_dest_rd_atomic": 16, "min_rnr_timer": 12,
        }
    )  # fmt: skip
    return World(*hosts, link=scene_link or Link(spacing=1e-6)), a, b, hosts[2]


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
    migrate(world, b, free, keep_address=keep_address or not b.context.peer_migros)
    world.run(direction.done, limit=10)
    world.settle(3)
    direction.check_end()
    assert not b.context.resume_pending and not a.context.paused
    assert b.context.state == QpState.RTR


def test_the_partner_of_an_end_in_rtr_moves() -> None:
    world, a, b, free = one_sided()
    direction = Direction(a, b, FORTH, 1)
    world.run(lambda: a.context.peer_migros)
    a.qp.stop()
    migrate(world, a, free, keep_address=False)
    world.run(direction.done, limit=10)
    direction.check_end()


def test_a_resume_of_a_receiver_out_of_what_was_sent_is_refused() -> None:
    world, a, b, _ = one_sided()
    direction = Direction(a, b, FORTH[:2], 1)
    world.run(direction.done)
    for psn in (a.context.una_psn + 1, a.context.una_psn - 1):
        path = b.context.path
        assert path is not None
        sink = ByteSink()
        headers = BTH_AETH.pack(0x1900FFFF, 17, 0xD0 << 24 | psn & 0xFFFFFF, 0)
        sink.add(path.replace(source_ip=ip(9)), headers, b"", 0)
        world.send(sink.frames)
    world.settle(0.01)
    assert world.hosts[0].engine.counters["refused_resume"] == 2


def forged_resume(scene: Scene, psn: int, source: int = 4, capable: bool = True) -> bytes:
    """A RESUME to `a` from host `source`, as anyone on the wire could send it."""
    assert scene.a.context.path is not None
    path = scene.b.context.path
    assert path is not None
    sink = ByteSink()
    ack_byte = 0x80 | (MIGROS_CAPABLE if capable else 0)
    headers = BTH_AETH.pack(0x1900FFFF, scene.a.context.qpn, ack_byte << 24 | psn, 0)
    sink.add(path.replace(source_ip=ip(source), source_mac=b"\2" * 6), headers, b"", 0)
    return sink.frames[0]


@pytest.mark.parametrize("offset", [1, 0x800000, -200, -(1 << 20)])
def test_a_resume_out_of_the_window_is_refused(offset: int) -> None:
    """Defect 5, as far as a PSN can guard: old and stray RESUMEs do not move a connection."""
    scene = Scene()
    scene.finish()
    before = scene.a.context.path
    scene.world.send([forged_resume(scene, scene.a.context.expected_psn + offset & 0xFFFFFF)])
    scene.world.settle(0.01)
    assert scene.a.context.path == before
    assert scene.hosts[0].engine.counters["refused_resume"] == 1
    assert scene.hosts[0].engine.counters["rcvd_resume"] == 0


def test_a_resume_without_the_capability_bit_is_refused() -> None:
    scene = Scene()
    scene.finish()
    before = scene.a.context.path
    scene.world.send([forged_resume(scene, scene.a.context.expected_psn, capable=False)])
    scene.world.settle(0.01)
    assert scene.a.context.path == before


def test_what_the_guard_does_not_cover() -> None:
    """Honesty: somebody who knows QPN and PSN can move a connection, as they can inject data in any RoCE network."""
    scene = Scene()
    scene.finish()
    scene.world.send([forged_resume(scene, scene.a.context.expected_psn)])
    scene.world.settle(0.01)
    assert scene.a.context.path is not None and scene.a.context.path.destination_ip == ip(4)


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
        if not here.context.stopped:
            here.qp.stop()
        elif randomness.random() < 0.3:
            here.qp.resume()
        else:
            # A new address only while the partner can hear of it: it is not being moved, and neither was this end
            # before the partner heard.
            free = not there.context.stopped and not here.context.resume_pending and not there.context.resume_pending
            keep = not (free and here.context.peer_migros and randomness.random() < 0.5)
            place = next(host for host in scene.hosts if not host.engine.qps)
            migrate(scene.world, here, place, keep_address=keep, restore_delay=randomness.choice([0, 1e-4, 0.1]))
            if not keep:
                scene.world.run(lambda here=here: not here.context.resume_pending)  # type: ignore[misc]
    for here in (scene.a, scene.b):
        if here.context.stopped:
            here.qp.resume()
    scene.finish(limit=30.0)


def test_a_stale_nak_stopped_from_the_old_place_is_ignored() -> None:
    """It was reordered behind the RESUME: pausing on it would wait for a RESUME that has come already."""
    scene = Scene()
    scene.step(4)
    scene.b.qp.stop()
    scene.world.run(lambda: bool(frames_of(scene.world, is_nak_stopped)), limit=10)
    stale = frames_of(scene.world, is_nak_stopped)[0]
    migrate(scene.world, scene.b, scene.hosts[2])
    scene.world.run(lambda: scene.b.context.resume_acked_at is not None)
    scene.world.send([stale])
    scene.finish(limit=5.0)


def test_dump_is_complete_and_pure() -> None:
    """to_plain is JSON, from_plain its inverse, at every step of the traffic; dumping changes nothing."""
    scene = Scene(Link(5, 0.1, 0.1, 0.1))

    def check(here: End) -> None:
        plain = here.context.to_plain()
        again = QpContext.from_plain(json.loads(json.dumps(plain)))
        assert again == here.context
        assert again.to_plain() == plain

    while not scene.ends():
        scene.world.step()
        check(scene.a)
        check(scene.b)
    for nonsense in ({}, {"version": 1}, {"version": 99}, {**scene.a.context.to_plain(), "inflight": [1]}):
        with pytest.raises(ValueError):
            QpContext.from_plain(nonsense)


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
