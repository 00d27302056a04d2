"""A hostile program's means: memory with guards, queue pairs to post to, and a hand that scribbles on all it shares."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import random
import shutil
import struct
from typing import Any

from softroce_ext.device.user_queue_pair import UserQueuePair
from softroce_ext.native import build
from softroce_ext.uverbs import rings
from softroce_ext.uverbs.abi import Command
from softroce_ext.uverbs.channel import AT_ARMED, AT_DIRTY, CONTROL_BYTES, FILE_BYTES
from softroce_ext.wire.frame import Path as WirePath
from tests.support.fuzz.rounds import Tally, Violation
from tests.support.nic.uverbs_program import IP, Program, Upper

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
        self.qps: list[UserQueuePair] = []
        for _ in range(2):
            body = struct.pack("<QIIIIIIIIIBBBx", 8, pd, cq, cq, shared, 10, 10, 2, 2, 64, 0, kind, bool(srq))
            handle, _ = struct.unpack_from("<II", program.call(Command.CREATE_QP, body, 64))
            self.qps.append(context.objects[handle])
        self.kind = kind
        for here, there in (self.qps, self.qps[::-1]):
            self.connect(here, there)

    def connect(self, here: UserQueuePair, there: UserQueuePair) -> None:
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

    def ring(self, qp: UserQueuePair) -> None:
        os.pwrite(self.program.queues, b"\1", AT_DIRTY + qp.handle)


class Scribbler:
    """The hostile program's hand."""

    def __init__(self, peers: list[Peer], chance: random.Random, tally: Tally) -> None:
        """`tally` notes the deeds, each as a list that `play` takes."""
        self.peers, self.chance, self.tally = peers, chance, tally
        self.program = peers[0].program

    def rings(self, peer: Peer) -> list[Any]:
        found: list[Any] = [peer.cq.ring]
        for qp in peer.qps:
            found += [qp.send_ring, qp.receive_ring or (qp.srq.ring if qp.srq else qp.send_ring)]
        return found

    def one(self) -> None:
        """One deed, and the bell for some queue pairs."""
        chance = self.chance
        number = chance.randrange(len(self.peers))
        peer = self.peers[number]
        which = chance.randrange(len(self.rings(peer)))
        ring = self.rings(peer)[which]
        self.tally.cases += 1
        deed = _DEEDS[chance.randrange(len(_DEEDS))]
        self.tally.refusals[deed] += 1
        if deed == "index":
            word = chance.choice((0, 4, 128, 256, chance.randrange(96) * 4))
            value = chance.choice((*EDGES, chance.randrange(ring.mask + 1)))
            self.play(["ring", number, which, word, value.to_bytes(4, "little").hex()])
        elif deed == "bytes":
            data = chance.randbytes(chance.choice((4, 64, 512)))
            self.play(["ring", number, which, chance.randrange(ring.size - 512), data.hex()])
        elif deed == "control":
            data = chance.randbytes(chance.choice((1, 4, 64)))
            self.play(["control", chance.randrange(CONTROL_BYTES - 64), data.hex()])
        elif deed == "dirty":
            self.play(["control", AT_DIRTY + chance.randrange(64), (bytes([chance.choice((1, 1, 2, 255))]) * 64).hex()])
        elif deed == "armed":
            self.play(["control", AT_ARMED, (bytes([chance.randrange(256)]) * 32).hex()])
        elif deed == "truncate" and chance.random() < 0.1:
            size = chance.choice((0, PAGE, CONTROL_BYTES, ring.offset, ring.offset + PAGE))
            self.play(["cut", size, chance.random() < 0.5])
        elif deed == "fifo":
            self._fifo()
        elif deed == "rmtree" and chance.random() < 0.1:
            self.play(["rmtree"])
        elif deed == "unlink":
            with contextlib.suppress(OSError):
                self.play(["unlink", [name for name in self._names() if chance.random() < 0.2]])
        elif deed == "work":
            self.play(self._work(number))
        for index in range(len(peer.qps)):
            if chance.random() < 0.6:
                self.play(["bell", number, index])

    def play(self, step: list[Any]) -> None:
        """One deed as data, noted before it is done."""
        self.tally.steps.append(step)
        with contextlib.suppress(OSError):  # what it needs may be gone
            getattr(self, "_do_" + step[0])(*step[1:])

    def _do_ring(self, peer: int, ring: int, at: int, data: str) -> None:
        os.pwrite(self.program.queues, bytes.fromhex(data), self.rings(self.peers[peer])[ring].offset + at)

    def _do_control(self, at: int, data: str) -> None:
        os.pwrite(self.program.queues, bytes.fromhex(data), at)

    def _do_cut(self, size: int, grow: bool) -> None:
        os.ftruncate(self.program.queues, size)
        if grow:
            os.ftruncate(self.program.queues, FILE_BYTES)

    def _do_rmtree(self) -> None:
        shutil.rmtree(self.program.directory, ignore_errors=True)

    def _do_unlink(self, names: list[str]) -> None:
        for name in names:
            os.unlink(self.program.directory / name)

    def _do_bell(self, peer: int, qp: int) -> None:
        self.peers[peer].ring(self.peers[peer].qps[qp])

    def _names(self) -> list[str]:
        return sorted(os.listdir(self.program.directory))

    def _fifo(self) -> None:
        chance = self.chance
        with contextlib.suppress(OSError, IndexError):
            size = chance.choice((0, 0, 1, 8, 16, 4096))
            self.play(["fifo", chance.choice(self._names()), chance.randbytes(size).hex()])

    def _do_fifo(self, name: str, filling: str) -> None:
        """Fill a FIFO, or drain it."""
        if name == "queues":
            return
        fd = os.open(self.program.directory / name, os.O_RDWR | os.O_NONBLOCK)
        try:
            while filling:
                os.write(fd, bytes.fromhex(filling))
            while os.read(fd, 65536):
                pass
        finally:
            os.close(fd)

    def _work(self, number: int) -> list[Any]:
        """A work request with one thing wrong, or nothing. Addresses and keys as differences from the right ones."""
        chance = self.chance
        far = [0, 0, 64, -8, PAGE - 4, "0", "ffffffffffffffff"]
        sges = [
            [chance.choice(far), chance.choice((0, 8, 8, 300, 2000, PAGE, PAGE + 1, *EDGES)),
             chance.choice((0, 0, 0, 1, 0x80000000, 0xFFFFFFFF))]
            for _ in range(chance.choice((0, 1, 1, 1, 2)))
        ]  # fmt: skip
        qp = chance.randrange(2)
        if chance.random() < 0.4:
            return ["receive", number, qp, sges, chance.choice((None, None, None, *EDGES))]
        flags = chance.choice((0, 2, 2, 3, 6, 8, 10, 0xFFFFFFFF))
        opcode = chance.choice((*range(16), 0, 2, 2, 4, 7, 0xFFFFFFFF))
        count = chance.choice((len(sges),) * 5 + EDGES)
        return ["send", number, qp, opcode, flags, sges, count, chance.choice(EDGES), chance.choice((0, 8, -8))]

    def _elements(self, peer: Peer, sges: list[Any]) -> list[tuple[int, int, int]]:
        base = peer.arena.address
        return [(int(at, 16) if isinstance(at, str) else base + at, length, peer.key ^ key) for at, length, key in sges]

    def _do_receive(self, number: int, index: int, sges: list[Any], count: int | None) -> None:
        peer = self.peers[number]
        qp = peer.qps[index]
        ring = qp.receive_ring if qp.receive_ring is not None else qp.send_ring
        if qp.srq is not None:
            ring = qp.srq.ring
        peer.post(ring, peer.receive(1, self._elements(peer, sges), count))

    def _do_send(
        self, number: int, index: int, opcode: int, flags: int, sges: list[Any], count: int, length: int, away: int
    ) -> None:
        peer = self.peers[number]
        wqe = peer.send(2, opcode, flags, self._elements(peer, sges), count=count, length=length,
                        address=peer.arena.address + away, rkey=peer.key)  # fmt: skip
        peer.post(peer.qps[index].send_ring, wqe)


_DEEDS = ("index", "bytes", "control", "dirty", "armed", "truncate", "fifo", "rmtree", "unlink",
          "work", "work", "work", "work", "work")  # fmt: skip
