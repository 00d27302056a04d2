"""One end of a simulated connection: what its program asked for, and whether what happens is what was asked for.

Memory of each end, from BASE: SOURCE (its messages; key 1), LAND (its receives; key 2), TARGET (the peer's WRITEs;
key 3), READABLE (the peer's READs; key 3), RESULTS (what its READs and atomics bring; key 4), CELLS (the peer's
atomics; key 5). Each message has a slot of its own in each; everything else is a guard that must not change.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from softroce_ext.simulation.hosts import BASE, End, Host, Region, Wc, end
from softroce_ext.transport.interfaces import Sge
from softroce_ext.transport.verbs import Access, QpState, QpType, WrOpcode

SLOT = 1536
"""Bytes of a message's slot; the last 64 are never used by a message."""
SLOTS = 7
SOURCE, LAND, TARGET, READABLE, RESULTS = (k * SLOTS * SLOT for k in range(5))
CELLS = 5 * SLOTS * SLOT
CELL = 8
MEMORY = CELLS + 64
GUARD = 0xA5
GRH = 40
CHUNK = 256

_READ, _ADD, _SWAP = WrOpcode.RDMA_READ, WrOpcode.ATOMIC_FETCH_AND_ADD, WrOpcode.ATOMIC_CMP_AND_SWP
_ATOMICS = (_ADD, _SWAP)
_WRITES = (WrOpcode.RDMA_WRITE, WrOpcode.RDMA_WRITE_WITH_IMM)
_RECEIVING = (WrOpcode.SEND, WrOpcode.SEND_WITH_IMM, WrOpcode.RDMA_WRITE_WITH_IMM)
_IMM = (WrOpcode.SEND_WITH_IMM, WrOpcode.RDMA_WRITE_WITH_IMM)


@dataclass
class Message:
    """One request of a program. `data`: what it carries (READ: what it must bring)."""

    index: int
    kind: WrOpcode
    size: int
    data: bytes
    imm: int
    signalled: bool
    before: int = 0
    """Atomics: what the cell held before."""

    @property
    def receives(self) -> bool:
        """It consumes a receive of the peer."""
        return self.kind in _RECEIVING


@dataclass
class Side:
    """One end and its program."""

    end: End
    peer: Side | None = None
    messages: list[Message] = field(default_factory=list)
    completed: int = 0
    """Signalled requests that have completed."""
    received: int = 0
    failed: str = ""
    cell: int = 0
    """What the peer's cell holds after this side's atomics so far."""
    landed: dict[int, Message] = field(default_factory=dict)
    """By receive slot: the peer's message that completed it."""

    @property
    def done(self) -> bool:
        """Nothing more is to be waited for."""
        return self.end.attributes.state == QpState.ERR or self.completed == len(self.signalled)

    @property
    def signalled(self) -> list[Message]:
        return [message for message in self.messages if message.signalled]

    def receive_at(self, slot: int) -> int:
        """Address of a receive's buffer."""
        return BASE + LAND + slot * SLOT

    def at(self, area: int, index: int, length: int) -> bytes:
        """Bytes of a message's slot."""
        begin = area + index * SLOT
        return bytes(self.end.ram.data[begin : begin + length])

    # -- asking ----------------------------------------------------------------------------------------------------

    def prepare(self, message: Message) -> None:
        """Lay the message's data ready (for a READ, at the peer)."""
        assert self.peer is not None
        if message.kind in _ATOMICS:
            message.before = self.cell
            operand = int.from_bytes(message.data[:8], "little")
            if message.kind == _ADD:
                self.cell = self.cell + operand & (1 << 64) - 1
            elif message.imm & 1:  # the comparison holds
                self.cell = operand
            return
        holder = self.peer if message.kind == _READ else self
        begin = (READABLE if message.kind == _READ else SOURCE) + message.index * SLOT
        holder.end.ram.data[begin : begin + message.size] = message.data

    def request(self, message: Message) -> dict[str, Any]:
        """The arguments of `End.post` for a message."""
        index, size = message.index, message.size
        if message.kind in _ATOMICS:
            operand = int.from_bytes(message.data[:8], "little")
            compare = message.before if message.imm & 1 else message.before ^ 1
            add = message.kind == _ADD
            return {
                "sges": (Sge(BASE + RESULTS + index * SLOT, 8, 4),),
                "remote_address": BASE + CELLS,
                "rkey": 5,
                "compare_add": operand if add else compare,
                "swap": 0 if add else operand,
            }
        if message.kind == _READ:
            return {
                "sges": (Sge(BASE + RESULTS + index * SLOT, size, 4),),
                "remote_address": BASE + READABLE + index * SLOT,
                "rkey": 3,
            }
        cut = size // 3
        at = BASE + SOURCE + index * SLOT
        more: dict[str, Any] = {"sges": (Sge(at, cut, 1), Sge(at + cut, size - cut, 1)), "imm": message.imm}
        if message.kind in _WRITES:
            more |= {"remote_address": BASE + TARGET + index * SLOT, "rkey": 3}
        return more

    # -- checking --------------------------------------------------------------------------------------------------

    def watch(self, kind: QpType, orderly: bool) -> None:
        """Check each completion at the moment that it is pushed."""
        self.end.scq.on_push = lambda wc: self._sent(wc, kind)
        self.end.rcq.on_push = lambda wc: self._received(wc, kind, orderly)

    def _sent(self, wc: Wc, kind: QpType) -> None:
        if wc.status:
            self.failed = self.failed or f"request {wc.wr_id} ended with status {int(wc.status)}"
            return
        assert not self.failed, "a request succeeded after one that failed"
        expected = self.signalled
        assert self.completed < len(expected), f"request {wc.wr_id} completed once more"
        message = expected[self.completed]
        assert wc.wr_id == message.index, f"request {wc.wr_id} completed, {message.index} is the next"
        self.completed += 1
        if kind != QpType.RC:
            return
        assert self.peer is not None
        if message.kind in _ATOMICS:
            got = int.from_bytes(self.at(RESULTS, message.index, 8), "little")
            assert got == message.before, f"atomic {message.index} returned {got:#x}, not {message.before:#x}"
        elif message.kind == _READ:
            assert self.at(RESULTS, message.index, message.size) == message.data, "a READ completed before its data"
        elif message.kind in _WRITES:
            assert self.peer.at(TARGET, message.index, message.size) == message.data, "a WRITE completed too early"
        if message.receives:
            number = sum(other.receives for other in self.messages[: message.index + 1])
            assert self.peer.received >= number, "a message completed that was not received"

    def _received(self, wc: Wc, kind: QpType, orderly: bool) -> None:
        assert self.peer is not None
        if wc.status:
            self.failed = self.failed or f"receive {wc.wr_id} ended with status {int(wc.status)}"
            return
        sent = [message for message in self.peer.messages if message.receives]
        head = GRH if kind == QpType.UD else 0
        if kind == QpType.RC:
            assert self.received < len(sent), "a message was received once more"
            candidates = [sent[self.received]]
            assert wc.wr_id == self.received, f"receive {wc.wr_id} was used, {self.received} is the next"
        else:
            last = max((message.index for message in self.landed.values()), default=-1)
            candidates = [message for message in sent if not orderly or message.index > last]
        self.received += 1
        for message in candidates:
            if self._matches(wc, message, head):
                self.landed[wc.wr_id] = message
                return
        raise AssertionError(f"receive {wc.wr_id} holds no message that was sent, or not the next")

    def _matches(self, wc: Wc, message: Message, head: int) -> bool:
        write = message.kind in _WRITES
        if wc.byte_len != message.size + head or wc.imm != (message.imm if message.kind in _IMM else 0):
            return False
        if write:
            return self.at(TARGET, message.index, message.size) == message.data
        return self.at(LAND, wc.wr_id, head + message.size)[head:] == message.data

    def check_memory(self, exact: bool) -> None:
        """Every byte is what it was, or what a request may have made of it; `exact`: what all of them made of it."""
        assert self.peer is not None
        data = self.end.ram.data
        expected = bytearray(bytes((GUARD,)) * MEMORY)
        expected[CELLS : CELLS + CELL] = bytes(CELL)
        free: list[tuple[int, int]] = []  # ranges that may hold anything: cut-off messages, failed requests
        for message in self.messages:
            begin = SOURCE + message.index * SLOT
            if message.kind not in (*_ATOMICS, _READ):
                expected[begin : begin + message.size] = message.data
            else:
                begin = RESULTS + message.index * SLOT
                value = message.before.to_bytes(8, "little") if message.kind in _ATOMICS else message.data
                expected[begin : begin + message.size] = value
                free.append((begin, message.size))
        receives = 0
        for message in self.peer.messages:
            begin = TARGET + message.index * SLOT
            if message.kind == _READ:
                begin = READABLE + message.index * SLOT
                expected[begin : begin + message.size] = message.data
            elif message.kind in _WRITES:
                expected[begin : begin + message.size] = message.data
                free.append((begin, message.size))
            if message.receives:
                begin = LAND + receives * SLOT
                receives += 1
                free.append((begin, SLOT))
                if message.kind not in _WRITES:
                    expected[begin : begin + message.size] = message.data
        expected[CELLS : CELLS + CELL] = self.peer.cell.to_bytes(CELL, "little")
        free.append((CELLS, CELL))
        actual = bytearray(data)
        if not exact:
            for begin, size in free:
                expected[begin : begin + size] = actual[begin : begin + size] = bytes(size)
        if actual != expected:
            wrong = next(k for k in range(MEMORY) if actual[k] != expected[k])
            raise AssertionError(f"byte {wrong:#x} of the memory is {actual[wrong]:#x}, not {expected[wrong]:#x}")


def new_side(host: Host, qpn: int, kind: QpType) -> Side:
    """An end in RESET with the memory above."""
    made = end(host, qpn, MEMORY, kind=kind)
    made.ram.data[:] = bytes((GUARD,)) * MEMORY
    made.ram.data[CELLS : CELLS + CELL] = bytes(CELL)
    local, far = int(Access.LOCAL_WRITE), int(Access.REMOTE_WRITE | Access.REMOTE_READ)
    area = SLOTS * SLOT
    made.pd.regions = {
        1: Region(BASE + SOURCE, area, 0),
        2: Region(BASE + LAND, area, local),
        3: Region(BASE + TARGET, 2 * area, local | far),
        4: Region(BASE + RESULTS, area, local),
        5: Region(BASE + CELLS, CELL, local | int(Access.REMOTE_ATOMIC)),
    }
    return Side(made)
