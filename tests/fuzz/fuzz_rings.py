"""Hostile queues: a program scribbles on everything that it shares with the NIC, at any time, also while it works.

Invariants, for random bytes and edge values in ring headers and indices, in work requests (opcode, number of elements,
lengths, inline), in doorbell, arm and mailbox bytes; for a queue file that is cut or has holes; for FIFOs that are
filled, drained, forged or unlinked, and a directory that is removed; from one process, and from another at full speed:

* nothing is raised and each round of the NIC ends (a producer index that runs endlessly gets its turn like any other);
* another program's connection sends and receives on, byte by byte;
* no byte outside registered memory changes, nor one that the access flags protect;
* what the NIC keeps for a queue pair is no more than its ring holds;
* when the program goes, nothing of it is left.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import signal
import struct
import time
from collections.abc import Iterator
from typing import Any

from softroce_ext.device.user_queue_pair import UserQueuePair
from softroce_ext.process.loop import LOOPBACK_FULL
from softroce_ext.simulation.hosts import ByteSink
from softroce_ext.transport.engine import Engine
from softroce_ext.uverbs import rings
from softroce_ext.uverbs.abi import Command
from softroce_ext.uverbs.channel import AT_DIRTY, CONTROL_BYTES
from tests.fuzz.fuzz_commands import Attack, descriptors, upper
from tests.support.fuzz.rounds import Tally, Violation
from tests.support.fuzz.scribbler import CONSUMER, PAGE, PRODUCER, Peer, Scribbler, install_guard
from tests.support.nic.uverbs_program import Upper

STEPS = 40
ROUND_LIMIT = 2.0
"""Seconds that one round of the loop may take on a loaded machine; undisturbed it takes less than a millisecond."""


class Loop:
    """What loop.Loop does in a round, without port and epoll; frames go round inside."""

    def __init__(self, nic: Upper) -> None:
        self.engine: Engine = nic.engine
        self.nic = nic
        self.frames: list[bytes] = []
        self.now = 1000.0

    def round(self) -> None:
        started = time.monotonic()
        frames, self.frames = self.frames[:64], self.frames[64:8192]
        for frame in frames:
            self.engine.receive(memoryview(bytearray(frame)), self.now)
        self.engine.end_of_batch(self.now)
        for context in list(self.nic.adapter.contexts.values()):
            for handle in context.channel.take_dirty():
                qp = context.objects.get(handle)
                if isinstance(qp, UserQueuePair):
                    self.engine.ring(qp.transport)
        self.now += 0.003
        self.engine.on_timer(self.now)
        for _ in range(4 if len(self.frames) < LOOPBACK_FULL else 0):
            sink = ByteSink()
            if not self.engine.frames_to_send(self.now, sink):
                break
            self.frames += sink.frames
        took = time.monotonic() - started
        if took > ROUND_LIMIT:
            raise Violation(f"a round took {took:.1f} s")


class Bystander:
    """Sends and receives, checking every byte."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.number = 0

    def step(self, loop: Loop) -> None:
        """One SEND from one queue pair to the other must arrive within some rounds."""
        peer, ring = self.peer, self.peer.cq.ring
        self.number += 1
        here, there = peer.qps
        data = struct.pack("<Q", self.number)
        peer.arena.map[PAGE : PAGE + 8] = data
        assert there.receive_ring is not None
        peer.post(there.receive_ring, peer.receive(self.number, [(peer.arena.address + 512, 8, peer.key)]))
        peer.post(here.send_ring, peer.send(self.number, 2, 2, [(peer.arena.address, 8, peer.key)]))
        peer.ring(here)
        before = peer.get(ring, PRODUCER)
        for _ in range(400):
            loop.round()
            if (peer.get(ring, PRODUCER) - before) & ring.mask == 2:
                break
        else:
            raise Violation("the bystander's message did not arrive")
        for slot in range(2):
            at = ring.offset + rings.HEADER + ((before + slot) & ring.mask) * 64
            _, status = struct.unpack("<QI", os.pread(peer.program.queues, 12, at))
            if status:
                raise Violation(f"the bystander's completion has status {status}")
        if peer.arena.map[PAGE + 512 : PAGE + 520] != data:
            raise Violation("the bystander's data are wrong")
        peer.put(ring, CONSUMER, peer.get(ring, PRODUCER))


def endless_producer(peer: Peer, opcode: int) -> int:
    """Another process that keeps every queue of `peer` full until it is killed. Returns its pid."""
    program = peer.program
    template = peer.send(5, opcode, 2, [(peer.arena.address, 8, peer.key)])
    queues = [qp.send_ring for qp in peer.qps] + [qp.receive_ring for qp in peer.qps if qp.receive_ring]
    for ring in queues:
        for slot in range(ring.mask + 1):
            element = template if ring in [qp.send_ring for qp in peer.qps] else peer.receive(6, [])
            os.pwrite(program.queues, element[: ring.element], ring.offset + rings.HEADER + slot * ring.element)
    pid = os.fork()
    if pid:
        return pid
    try:
        views = [memoryview(mmap.mmap(program.queues, ring.size, offset=ring.offset)).cast("I") for ring in queues]
        dirty = mmap.mmap(program.queues, CONTROL_BYTES)
        until = time.monotonic() + 30
        while time.monotonic() < until:
            for _ in range(1000):
                for view in views:
                    view[32] = view[64] - 1 & 0xFFFFFFFF  # always full, wherever the NIC is
                for qp in peer.qps:
                    dirty[AT_DIRTY + qp.handle] = 1
    finally:
        os._exit(0)


class Scene:
    """A NIC, a program with pairs of queue pairs of every kind, and a bystander whose traffic is checked between."""

    def __init__(self, nic: Upper, chance: random.Random, tally: Tally) -> None:
        self.nic = nic
        self.attack = Attack(nic, chance, tally)
        self.loop = Loop(nic)
        self.good = Bystander(Peer(nic, self.attack.bystander, 2))
        kinds = ((2, False), (3, False), (4, False), (2, True))
        self.peers = [Peer(nic, self.attack.program, kind, srq) for kind, srq in kinds]
        self.scribbler = Scribbler(self.peers, chance, tally)

    def play(self, step: list[Any]) -> None:
        """A deed of `Scribbler`, ["round"], ["race", peer, opcode], or ["destroy"]: it closes what it has."""
        if step[0] == "round":
            self.round()
        elif step[0] == "race":
            _race(step[2], self.loop, self.good, self.peers[step[1]])
        elif step[0] == "destroy":
            for handle in [qp.handle for peer in self.peers for qp in peer.qps]:
                with contextlib.suppress(AssertionError, OSError, struct.error):
                    self.attack.program.raw(struct.pack("<IHHQII", Command.DESTROY_QP, 6, 1, 0x1000, handle, 0))
        else:
            self.scribbler.tally.cases += step[0] != "bell"
            self.scribbler.play(step)
            return
        self.scribbler.tally.steps.append(step)

    def round(self) -> None:
        """The NIC goes round, and everything is looked at."""
        self.loop.round()
        self.good.step(self.loop)
        self.good.peer.arena.check()
        for peer in self.peers:
            peer.arena.check()
            for qp in peer.qps:
                if len(qp.transport.sender.inflight) > qp.send_ring.capacity:
                    raise Violation(f"{len(qp.transport.sender.inflight)} requests of a ring of 15 are kept")

    def end(self) -> None:
        """The program goes, and nothing of it is left."""
        self.nic.adapter.forget(self.attack.program.context)
        self.loop.frames.clear()
        self.good.step(self.loop)
        if len(self.nic.engine.qps) != len(self.attack.bystander.context.queue_pairs):
            raise Violation("queue pairs are left of a program that has gone")


@contextlib.contextmanager
def scene(chance: random.Random, tally: Tally) -> Iterator[Scene]:
    """Set it up, and end it when the body is through."""
    install_guard()
    before = descriptors()
    with upper() as nic:
        made = Scene(nic, chance, tally)
        try:
            yield made
            made.end()
        finally:
            made.attack.close()
    if descriptors() != before:
        raise Violation(f"{descriptors() - before} descriptors leaked")


def one_round(chance: random.Random, tally: Tally) -> None:
    """Some deeds with a bystander's traffic between; now and then with another process that never stops."""
    tally.begin()
    with scene(chance, tally) as here:
        if chance.random() < 0.15:
            here.play(["race", chance.randrange(len(here.peers)), chance.choice((0, 2, 7, 8, 11))])
        for _ in range(STEPS):
            here.scribbler.one()
            here.play(["round"])
        if chance.random() < 0.5:  # while everything is damaged
            here.play(["destroy"])


def replay(_: Any, steps: list[Any], tally: Tally) -> None:
    """What a round has noted."""
    with scene(random.Random(0), tally) as here:
        for step in steps:
            here.play(step)


def _race(opcode: int, loop: Loop, good: Bystander, peer: Peer) -> None:
    """A process that posts without end, in RTS and in ERR, local operations and datagrams that are too long too."""
    pid = endless_producer(peer, opcode)
    try:
        for step in range(6):
            if step == 3:
                for qp in peer.qps:
                    peer.nic.adapter.modify_queue_pair(qp, {"qp_state": 6})
            loop.round()
            good.step(loop)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
