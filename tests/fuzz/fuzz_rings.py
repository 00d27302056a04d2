"""Hostile queues: a program scribbles on everything that it shares with the NIC, at any time, also while it works.

Invariants, for random bytes and edge values in ring headers and indices, in work requests (opcode, number of elements,
lengths, inline), in doorbell, arm and mailbox bytes; for a queue file that is cut or has holes; for FIFOs that are
filled, drained, forged or unlinked, and a directory that is removed; from one process, and from another at full speed:

* nothing is raised and each round of the NIC ends (a producer index that runs for ever gets its turn like any other);
* another program's connection sends and receives on, byte by byte;
* no byte outside registered memory changes, nor one that the access flags protect;
* what the NIC keeps for a queue pair is no more than its ring holds;
* when the program goes, nothing of it is left.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import random
import shutil
import signal
import struct
import time
from typing import Any

from fuzz_commands import Attack, descriptors, upper
from fuzz_common import Tally, Violation
from uverbs_program import IP, Program, Upper

from softroce_ext.device.queue_pair import QueuePair
from softroce_ext.native import build
from softroce_ext.nic import LOOPBACK_FULL
from softroce_ext.simulation.world import ByteSink
from softroce_ext.transport.engine import Engine
from softroce_ext.uverbs import rings
from softroce_ext.uverbs.abi import Command
from softroce_ext.uverbs.channel import AT_ARMED, AT_DIRTY, CONTROL_BYTES, FILE_BYTES
from softroce_ext.wire.frame import Path as WirePath

STEPS = 40
ROUND_LIMIT = 2.0
"""Seconds that one round of the loop may take on a loaded machine; undisturbed it takes less than a millisecond."""
PAGE = mmap.PAGESIZE
PRODUCER, CONSUMER = 128, 256
EDGES = (0, 1, 2, 7, 15, 16, 17, 255, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)

_guard_installed = False


def install_guard() -> None:
    """As the NIC does: a page of a file that a program has cut becomes zeros."""
    global _guard_installed
    if not _guard_installed:
        if ctypes.CDLL(str(build.path("guard"))).guard_install():
            raise OSError("no SIGBUS guard")
        _guard_installed = True


class Arena:
    """Memory of a program: a registered page between two that are not, all filled with a pattern."""

    def __init__(self) -> None:
        self.map = mmap.mmap(-1, 3 * PAGE)
        self.map[:] = b"\xa5" * (3 * PAGE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.map)) + PAGE

    def check(self) -> None:
        if self.map[:PAGE].strip(b"\xa5") or self.map[2 * PAGE :].strip(b"\xa5"):
            raise Violation("a byte outside the registered page changed")


class Peer:
    """A program with a pair of queue pairs connected to each other, one registered page, and the means to post."""

    def __init__(self, nic: Upper, program: Program, kind: int, srq: bool = False) -> None:
        self.nic, self.program = nic, program
        self.arena = Arena()
        context = program.context
        pd = next(h for h, o in context.objects.items() if type(o).__name__ == "ProtectionDomain")
        region = struct.pack("<QQQII", self.arena.address, PAGE, self.arena.address, pd, 0x1F)
        _, self.key, _ = struct.unpack("<III", program.call(Command.REG_MR, region, 12))
        cq, _ = struct.unpack_from("<II", program.call(18, struct.pack("<QIIiI", 7, 50, 0, -1, 0), 24))
        self.cq = context.objects[cq]
        shared = 0
        if srq:
            body = struct.pack("<QIIII", 9, pd, 10, 2, 0)
            (shared,) = struct.unpack_from("<I", program.call(Command.CREATE_SRQ, body, 40))
        self.qps: list[QueuePair] = []
        for _ in range(2):
            body = struct.pack("<QIIIIIIIIIBBBx", 8, pd, cq, cq, shared, 10, 10, 2, 2, 64, 0, kind, bool(srq))
            handle, _ = struct.unpack_from("<II", program.call(Command.CREATE_QP, body, 64))
            self.qps.append(context.objects[handle])
        self.kind = kind
        for here, there in (self.qps, self.qps[::-1]):
            self.connect(here, there)

    def connect(self, here: QueuePair, there: QueuePair) -> None:
        """To RTS."""
        modify = self.nic.adapter.modify_queue_pair
        way = WirePath(b"\2" * 6, b"\2" * 6, IP, IP, 0xC000)
        begin: dict[str, Any] = {"qp_state": 1, "pkey_index": 0, "port_num": 1}
        rtr: dict[str, Any] = {"qp_state": 2}
        rts: dict[str, Any] = {"qp_state": 3, "sq_psn": 0}
        if self.kind == 4:
            begin["qkey"] = 1
        else:
            begin["qp_access_flags"] = 15
            rtr |= {"path": way, "path_mtu": 1024, "destination_qpn": there.qpn, "rq_psn": 0}
        if self.kind == 2:
            rtr |= {"max_dest_rd_atomic": 4, "min_rnr_timer": 1}
            rts |= {"timeout": 14, "retry_cnt": 7, "rnr_retry": 7, "max_rd_atomic": 4}
        for attributes in (begin, rtr, rts):
            modify(here, attributes)

    def put(self, ring: Any, word: int, value: int) -> None:
        """Store an index in the shared file."""
        os.pwrite(self.program.queues, struct.pack("<I", value & 0xFFFFFFFF), ring.offset + word)

    def get(self, ring: Any, word: int) -> int:
        return int.from_bytes(os.pread(self.program.queues, 4, ring.offset + word), "little")

    def post(self, ring: Any, element: bytes) -> None:
        producer = self.get(ring, PRODUCER) & ring.mask
        os.pwrite(self.program.queues, element[: ring.element], ring.offset + rings.HEADER + producer * ring.element)
        self.put(ring, PRODUCER, producer + 1 & ring.mask)

    def send(self, wr_id: int, opcode: int, flags: int, sges: list[tuple[int, int, int]], **more: Any) -> bytes:
        """struct rxe_send_wqe with whatever numbers."""
        union = struct.pack("<QII", more.get("address", 0), more.get("rkey", 0), 0)
        head = struct.pack("<Q4xIII", wr_id, opcode, flags, more.get("imm", 0)).ljust(24, b"\0") + union
        dma = struct.pack("<IIIIII", more.get("length", 0), 0, 0, more.get("count", len(sges)), 0, 0)
        return head.ljust(184, b"\0") + dma + b"".join(struct.pack("<QII", *sge) for sge in sges)

    def receive(self, wr_id: int, sges: list[tuple[int, int, int]], count: int | None = None) -> bytes:
        """struct rxe_recv_wqe."""
        count = len(sges) if count is None else count
        return struct.pack("<Q8xIIIIII", wr_id, 0, 0, 0, count, 0, 0) + b"".join(struct.pack("<QII", *s) for s in sges)

    def ring(self, qp: QueuePair) -> None:
        os.pwrite(self.program.queues, b"\1", AT_DIRTY + qp.handle)


class Loop:
    """What nic.Nic's loop does in a round, without port and epoll; frames go round inside."""

    def __init__(self, nic: Upper) -> None:
        self.engine: Engine = nic.engine
        self.nic = nic
        self.frames: list[bytes] = []
        self.now = 1000.0

    def round(self) -> None:
        begun = time.monotonic()
        frames, self.frames = self.frames[:64], self.frames[64:8192]
        for frame in frames:
            self.engine.receive(memoryview(bytearray(frame)), self.now)
        self.engine.end_of_batch(self.now)
        for context in list(self.nic.adapter.contexts.values()):
            for handle in context.channel.take_dirty():
                qp = context.objects.get(handle)
                if isinstance(qp, QueuePair):
                    self.engine.ring(qp.transport)
        self.now += 0.003
        self.engine.on_timer(self.now)
        for _ in range(4 if len(self.frames) < LOOPBACK_FULL else 0):
            sink = ByteSink()
            if not self.engine.frames_to_send(self.now, sink):
                break
            self.frames += sink.frames
        took = time.monotonic() - begun
        if took > ROUND_LIMIT:
            raise Violation(f"a round took {took:.1f} s")


class Scribbler:
    """The hostile program's hand."""

    def __init__(self, peers: list[Peer], chance: random.Random, tally: Tally) -> None:
        self.peers, self.chance, self.tally = peers, chance, tally
        self.program = peers[0].program

    def rings(self, peer: Peer) -> list[Any]:
        found: list[Any] = [peer.cq.ring]
        for qp in peer.qps:
            found += [qp.send_ring, qp.receive_ring or (qp.srq.ring if qp.srq else qp.send_ring)]
        return found

    def one(self) -> None:
        """One deed."""
        chance, program = self.chance, self.program
        peer = chance.choice(self.peers)
        ring = chance.choice(self.rings(peer))
        self.tally.cases += 1
        deed = chance.randrange(14)
        self.tally.refusals[_DEEDS[deed]] += 1
        if deed == 0:
            peer.put(
                ring,
                chance.choice((0, 4, 128, 256, chance.randrange(96) * 4)),
                chance.choice((*EDGES, chance.randrange(ring.mask + 1))),
            )
        elif deed == 1:
            os.pwrite(
                program.queues,
                chance.randbytes(chance.choice((4, 64, 512))),
                ring.offset + chance.randrange(ring.size - 512),
            )
        elif deed == 2:
            os.pwrite(program.queues, chance.randbytes(chance.choice((1, 4, 64))), chance.randrange(CONTROL_BYTES - 64))
        elif deed == 3:
            os.pwrite(program.queues, bytes([chance.choice((1, 1, 2, 255))]) * 64, AT_DIRTY + chance.randrange(64))
        elif deed == 4:
            os.pwrite(program.queues, bytes([chance.randrange(256)]) * 32, AT_ARMED)
        elif deed == 5 and chance.random() < 0.1:
            os.ftruncate(program.queues, chance.choice((0, PAGE, CONTROL_BYTES, ring.offset, ring.offset + PAGE)))
            if chance.random() < 0.5:
                os.ftruncate(program.queues, FILE_BYTES)
        elif deed == 6:
            self._fifo()
        elif deed == 7 and chance.random() < 0.1:
            shutil.rmtree(program.directory, ignore_errors=True)
        elif deed == 8:
            with contextlib.suppress(OSError):
                for name in os.listdir(program.directory):
                    if chance.random() < 0.2:
                        os.unlink(program.directory / name)
        else:
            self._work(peer)
        for qp in peer.qps:
            if chance.random() < 0.6:
                with contextlib.suppress(OSError):
                    peer.ring(qp)

    def _fifo(self) -> None:
        chance = self.chance
        with contextlib.suppress(OSError, IndexError):
            name = chance.choice(os.listdir(self.program.directory))
            fd = os.open(self.program.directory / name, os.O_RDWR | os.O_NONBLOCK)
            try:
                if name != "queues":
                    with contextlib.suppress(BlockingIOError):
                        if chance.random() < 0.5:
                            while True:
                                os.write(fd, chance.randbytes(chance.choice((1, 8, 16, 4096))))
                        while os.read(fd, 65536):
                            pass
            finally:
                os.close(fd)

    def _work(self, peer: Peer) -> None:
        """A work request with one thing wrong, or nothing."""
        chance = self.chance
        base = peer.arena.address
        where = lambda: (  # noqa: E731
            chance.choice((base, base, base + 64, base - 8, base + PAGE - 4, 0, 2**64 - 1)),
            chance.choice((0, 8, 8, 300, 2000, PAGE, PAGE + 1, *EDGES)),
            chance.choice((peer.key, peer.key, peer.key, peer.key ^ 1, 0, 0xFFFFFFFF)),
        )
        sges = [where() for _ in range(chance.choice((0, 1, 1, 1, 2)))]
        qp = chance.choice(peer.qps)
        if chance.random() < 0.4:
            ring = qp.receive_ring if qp.receive_ring is not None else qp.send_ring
            if qp.srq is not None:
                ring = qp.srq.ring
            peer.post(ring, peer.receive(1, sges, chance.choice((None, None, None, *EDGES))))
            return
        flags = chance.choice((0, 2, 2, 3, 6, 8, 10, 0xFFFFFFFF))
        opcode = chance.choice((*range(16), 0, 2, 2, 4, 7, 0xFFFFFFFF))
        count = chance.choice((len(sges),) * 5 + EDGES)
        address, rkey = chance.choice((base, base + 8, base - 8)), peer.key
        peer.post(
            qp.send_ring,
            peer.send(2, opcode, flags, sges, count=count, length=chance.choice(EDGES), address=address, rkey=rkey),
        )


_DEEDS = ("index", "bytes", "control", "dirty", "armed", "truncate", "fifo", "rmtree", "unlink",
          "work", "work", "work", "work", "work")  # fmt: skip


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
    """Another process that keeps every queue of `peer` full, for ever. Returns its pid."""
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


def one_round(chance: random.Random, tally: Tally) -> None:
    """Some deeds with a bystander's traffic between; now and then with another process that never stops."""
    install_guard()
    before = descriptors()
    with upper() as nic:
        attack = Attack(nic, chance, tally)
        try:
            loop = Loop(nic)
            good = Bystander(Peer(nic, attack.bystander, 2))
            peers = [
                Peer(nic, attack.program, kind, srq) for kind, srq in ((2, False), (3, False), (4, False), (2, True))
            ]
            scribbler = Scribbler(peers, chance, tally)
            if chance.random() < 0.15:
                _race(chance, loop, good, peers)
            for _ in range(STEPS):
                scribbler.one()
                loop.round()
                good.step(loop)
                good.peer.arena.check()
                for peer in peers:
                    peer.arena.check()
                    for qp in peer.qps:
                        if len(qp.transport.context.inflight) > qp.send_ring.capacity:
                            raise Violation(f"{len(qp.transport.context.inflight)} requests of a ring of 15 are kept")
            if chance.random() < 0.5:  # it closes what it has, while all is spoiled
                for handle in [qp.handle for peer in peers for qp in peer.qps]:
                    with contextlib.suppress(AssertionError, OSError, struct.error):
                        attack.program.raw(struct.pack("<IHHQII", Command.DESTROY_QP, 6, 1, 0x1000, handle, 0))
            nic.adapter.forget(attack.program.context)
            loop.frames.clear()
            good.step(loop)
            if len(nic.engine.qps) != len(attack.bystander.context.queue_pairs):
                raise Violation("queue pairs are left of a program that has gone")
        finally:
            attack.close()
    if descriptors() != before:
        raise Violation(f"{descriptors() - before} descriptors leaked")


def _race(chance: random.Random, loop: Loop, good: Bystander, peers: list[Peer]) -> None:
    """A process that posts for ever, in RTS and in ERR, local operations and datagrams that are too long too."""
    peer = chance.choice(peers)
    pid = endless_producer(peer, chance.choice((0, 2, 7, 8, 11)))
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
