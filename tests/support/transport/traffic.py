"""Traffic whose every byte and completion is checked, for tests of a bad network and of migration.

The invariants, for each connection and both directions:

* every request completes exactly once, in order, successfully, and its slot comes back;
* every receive completes exactly once, in order, with the length and immediate that were sent;
* at the moment of a completion its data are in memory, whole;
* memory that was not written to is untouched; an atomic is executed exactly once.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from softroce_ext.simulation.hosts import BASE, End, Sge, Wc
from softroce_ext.transport.verbs import SendFlag, WcFlag, WcOpcode, WrOpcode

SOURCE, RECEIVED, WRITTEN, READ_INTO, READ_FROM, COUNTER = (BASE + part * (1 << 16) for part in range(6))
MEMORY = 6 * (1 << 16)
"""Each end's memory: what it sends, receives, is written, reads and is read, and 8 bytes of atomics; 64 KiB each."""
AREA = 1 << 16

SENDS = (WrOpcode.SEND, WrOpcode.SEND_WITH_IMM)
WRITES = (WrOpcode.RDMA_WRITE, WrOpcode.RDMA_WRITE_WITH_IMM)


@dataclass(frozen=True)
class Op:
    """One request: what, how many bytes, and whether the next ones wait for READs before it."""

    opcode: WrOpcode
    length: int
    fence: bool = False
    elements: int = 1


@dataclass
class Expected:
    op: Op
    data: bytes
    address: int
    imm: int


@dataclass
class Direction:
    """Requests of one end to the other, with what must come of them."""

    sender: End
    receiver: End
    ops: Sequence[Op]
    seed: int
    sent: list[Expected] = field(default_factory=list)
    to_receive: list[Expected] = field(default_factory=list)
    originals: list[int] = field(default_factory=list)
    added: list[int] = field(default_factory=list)
    completed: int = 0
    received: int = 0

    def __post_init__(self) -> None:
        randomness = random.Random(self.seed)
        sender, receiver = self.sender, self.receiver
        sender.ram.data[0:AREA] = randomness.randbytes(AREA)
        receiver.ram.data[READ_FROM - BASE : READ_FROM - BASE + AREA] = randomness.randbytes(AREA)
        sender.scq.on_push = self._send_completion
        receiver.rcq.on_push = self._receive_completion
        at = 0
        for number, op in enumerate(self.ops):
            assert at + op.length <= AREA, "too much traffic for the areas"
            imm = randomness.getrandbits(32)
            if op.opcode == WrOpcode.RDMA_READ:
                source = READ_FROM - BASE + at
                data = bytes(receiver.ram.data[source : source + op.length])
                local, remote = READ_INTO + at, READ_FROM + at
            else:
                data = bytes(sender.ram.data[at : at + op.length])
                local, remote = SOURCE + at, WRITTEN + at
            expected = Expected(op, data, local, imm)
            self.sent.append(expected)
            if op.opcode in SENDS:
                expected.address = RECEIVED + at
            elif op.opcode in WRITES:
                expected.address = remote
            if op.opcode in SENDS or op.opcode == WrOpcode.RDMA_WRITE_WITH_IMM:
                self.to_receive.append(expected)
                receiver.receive(1000 + len(self.to_receive), RECEIVED + at, op.length if op.opcode in SENDS else 0)
            flags = SendFlag.SIGNALED | (SendFlag.FENCE if op.fence else 0) | SendFlag.SOLICITED
            if op.opcode == WrOpcode.ATOMIC_FETCH_AND_ADD:
                self.added.append(number + 1)
                sender.post(
                    op.opcode,
                    number,
                    COUNTER + 8 + 8 * number,
                    8,
                    remote_address=COUNTER,
                    compare_add=number + 1,
                    flags=int(flags),
                )
            else:
                sender.post(
                    op.opcode, number, imm=imm, remote_address=remote, flags=int(flags),
                    sges=split(local, op.length, op.elements),
                )  # fmt: skip
            at += op.length

    def _send_completion(self, wc: Wc) -> None:
        expected = self.sent[self.completed]
        assert (wc.wr_id, wc.status) == (self.completed, 0)
        assert self.sender.sq.retired > self.completed, "the slot must be free before its completion is seen"
        op = expected.op
        ram = self.sender.ram if op.opcode == WrOpcode.RDMA_READ else self.receiver.ram
        if op.opcode == WrOpcode.ATOMIC_FETCH_AND_ADD:
            at = COUNTER + 8 + 8 * wc.wr_id - BASE
            self.originals.append(int.from_bytes(self.sender.ram.data[at : at + 8], "little"))
        else:
            at = expected.address - BASE
            assert ram.data[at : at + op.length] == expected.data, f"request {wc.wr_id} completed before its data"
        self.completed += 1

    def _receive_completion(self, wc: Wc) -> None:
        expected = self.to_receive[self.received]
        self.received += 1
        assert (wc.wr_id, wc.status, wc.byte_len) == (1000 + self.received, 0, expected.op.length)
        assert wc.solicited
        with_imm = expected.op.opcode in (WrOpcode.SEND_WITH_IMM, WrOpcode.RDMA_WRITE_WITH_IMM)
        assert bool(wc.wc_flags & WcFlag.WITH_IMM) == with_imm
        if with_imm:
            assert wc.imm == expected.imm
        is_send = expected.op.opcode in SENDS
        assert wc.opcode == (WcOpcode.RECV if is_send else WcOpcode.RECV_RDMA_WITH_IMM)
        at = expected.address - BASE
        assert self.receiver.ram.data[at : at + expected.op.length] == expected.data, "received before its data"

    def done(self) -> bool:
        return self.completed == len(self.sent)

    def check_end(self) -> None:
        """After everything: nothing missing, nothing too much."""
        assert self.completed == len(self.sent) == len(self.sender.scq.entries)
        assert self.received == len(self.to_receive) == len(self.receiver.rcq.entries)
        assert self.sender.sq.retired == self.sender.sq.fetched == len(self.sent)
        assert self.receiver.rq.retired == self.receiver.rq.fetched == len(self.to_receive)
        total = 0
        for original, added in zip(self.originals, self.added, strict=True):
            assert original == total, "an atomic was executed twice or not at all"
            total += added
        at = COUNTER - BASE
        assert int.from_bytes(self.receiver.ram.data[at : at + 8], "little") == total
        for area, wanted in ((RECEIVED, SENDS), (WRITTEN, WRITES)):
            image = bytearray(AREA)
            for expected in self.sent:
                if expected.op.opcode in wanted:
                    begin = expected.address - area
                    image[begin : begin + expected.op.length] = expected.data
            assert self.receiver.ram.data[area - BASE : area - BASE + AREA] == image, "bytes beside a message changed"


def split(address: int, length: int, elements: int) -> tuple[Sge, ...]:
    """The same bytes as so many scatter/gather elements (some may be empty)."""
    size = -(-length // elements)
    cuts = [min(length, number * size) for number in range(elements + 1)]
    return tuple(Sge(address + low, high - low, 1) for low, high in itertools.pairwise(cuts))
