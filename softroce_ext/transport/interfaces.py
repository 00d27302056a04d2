"""What the sans-IO transport core asks of the world around it, and the records that cross that border.

The core never opens a socket, reads a clock or touches another process. Whoever runs it (the NIC process, a unit
test, the simulator) hands in objects of these shapes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

from softroce_ext.wire.frame import Packet
from softroce_ext.wire.path import Path

Buffer = bytes | bytearray | memoryview


class MemoryFault(Exception):
    """The process's address space could not be read or written at `address` (unmapped, read-only, process gone)."""

    def __init__(self, address: int, length: int) -> None:
        super().__init__(f"cannot access {length} bytes at {address:#x}")
        self.address = address
        self.length = length


class ProtectionError(Exception):
    """A key, bound, access right or protection domain does not allow the access (IBA 10.6.3)."""


class Memory(Protocol):
    """One process's address space. Addresses are that process's virtual addresses, lengths are bytes."""

    def read(self, address: int, length: int) -> Buffer:
        """Return `length` bytes, as earlier writes left them; the buffer is valid until the next call of `read`.

        Raises MemoryFault for what is read; that of an earlier write is kept for `flush`.
        """

    def write(self, address: int, data: Buffer) -> None:
        """Store `data`; may be deferred until `flush`, but `data` stays valid until then. Raises MemoryFault."""

    def flush(self) -> None:
        """Make every earlier `write` visible to the process. Raises MemoryFault for the first that failed."""


class Sge(NamedTuple):
    """A scatter/gather element, as in ibv_sge: address and length in bytes, local key."""

    address: int
    length: int
    lkey: int


class SendWqe(NamedTuple):
    """A send work request, copied once out of the queue that the application shares with the NIC.

    opcode: enum ib_wr_opcode (0 RDMA_WRITE, 1 WRITE_WITH_IMM, 2 SEND, 3 SEND_WITH_IMM, 4 RDMA_READ, 5 CMP_AND_SWP,
    6 FETCH_AND_ADD, 7 LOCAL_INV, 8 BIND_MW, 9 SEND_WITH_INV); flags: IB_SEND_FENCE 1, SIGNALED 2, SOLICITED 4,
    INLINE 8; imm: immediate data in network byte order as the application stored it, or the rkey to invalidate.
    """

    wr_id: int
    opcode: int
    flags: int
    imm: int
    length: int
    sges: tuple[Sge, ...]
    inline: bytes | None
    remote_address: int
    rkey: int
    compare_add: int
    swap: int
    destination: tuple[int, int, int] | None  # UD only: (ah number, remote qpn, qkey)


class RecvWqe(NamedTuple):
    """A receive work request: `length` is the sum of its scatter elements in bytes."""

    wr_id: int
    length: int
    sges: tuple[Sge, ...]


class SendQueue(Protocol):
    """The requester's side of a send queue; WQEs are fetched in order and retired in the same order."""

    def fetch(self) -> SendWqe | None:
        """Copy out the next posted WQE, or None. Advances a private index only."""

    def retire(self) -> None:
        """Give the oldest fetched WQE's slot back to the application."""


class ReceiveQueue(Protocol):
    """A receive queue or an SRQ."""

    def fetch(self) -> RecvWqe | None:
        """Copy out the next posted receive, or None when the application has posted none (RNR)."""

    def retire(self) -> None:
        """Give the oldest fetched receive's slot back to the application."""


class WorkCompletion(NamedTuple):
    """A work completion: the fields of struct ib_uverbs_wc (kernel header rdma/ib_user_verbs.h) that this NIC fills in.

    status, opcode and wc_flags are numbers of `verbs.WcStatus`, `verbs.WcOpcode` and `verbs.WcFlag`; imm is the
    immediate data as they were sent, or the rkey that was invalidated.
    """

    wr_id: int
    status: int
    opcode: int
    byte_len: int
    imm: int
    qp_num: int
    src_qp: int
    wc_flags: int
    solicited: bool
    """The peer asked for a solicited event, or the completion is an error: no part of the kernel's structure."""


class CompletionQueue(Protocol):
    """Where work completions go."""

    def push(self, completion: WorkCompletion) -> bool:
        """Publish a completion. False when the queue is full and the completion is lost."""


class FrameSink(Protocol):
    """Where frames to send go: the port's arena, or a list in a test."""

    room: int
    """Frames that still fit; `add` lowers it."""

    def add(self, path: Path, headers: bytes, payload: Buffer, pad: int) -> None:
        """HOT. Build one frame (`wire.frame.build`, taking and advancing `path.ip_id`).

        headers: BTH and extended headers; payload: may be empty, valid only during this call; pad: 0..3.
        """


class Observer(Protocol):
    """Follows what an engine does, for a trace (`Engine.observer`). It must change nothing.

    Queue pairs are named by their QPN; 1 is QP1.
    """

    def changed(self, qpns: Iterable[int]) -> None:
        """The state of these queue pairs may have changed: they are new, or a step of the engine has ended."""

    def removed(self, qpn: int) -> None:
        """A queue pair was taken out of the engine."""

    def refused(self, reason: str, length: int) -> None:
        """A frame of `length` bytes is not a packet; reason: as from `wire.frame.parse`."""

    def receiving(self, packet: Packet) -> None:
        """HOT. A packet is about to be received."""

    def received(self, packet: Packet) -> None:
        """HOT. The packet of the last `receiving` was received."""

    def sink(self, qpn: int, inner: FrameSink) -> FrameSink:
        """HOT. A sink for one turn of a queue pair; each frame must go on to `inner`."""

    def fetched(self, qpn: int, wqe: SendWqe | RecvWqe) -> None:
        """A work request was taken from its queue."""

    def completed(self, qpn: int, completion: WorkCompletion) -> None:
        """A completion is about to be pushed."""

    def timer(self, qpn: int, kind: str) -> None:
        """A timer acts now; kind: ack, rnr, pause or resume."""


class ProtectionDomain(Protocol):
    """Key lookups of one protection domain. The answer is the memory and the address in it."""

    def local(self, lkey: int, address: int, length: int, access: int) -> tuple[Memory, int]:
        """`access` are IB_ACCESS_* bits that the region must have (0 to read). Raises ProtectionError."""

    def remote(self, rkey: int, address: int, length: int, access: int, qpn: int) -> tuple[Memory, int]:
        """As `local`, for a remote key (a memory region or window) that came to queue pair `qpn`."""

    def address(self, ah_number: int) -> Path:
        """The path to an address handle's destination; its UDP source port is the sender's to choose.

        Raises ProtectionError when this domain has no such address handle.
        """

    def invalidate(self, rkey: int, qpn: int) -> None:
        """The peer's SEND_WITH_INV ends the use of `rkey` for queue pair `qpn`. Raises ProtectionError."""

    def local_operation(self, wqe: SendWqe, qpn: int) -> None:
        """Perform a LOCAL_INV or BIND_MW request of queue pair `qpn`. Raises ProtectionError when it is not allowed."""


class EventSink(Protocol):
    """The owner of a queue pair: its asynchronous events (enum ib_event_type: 1 QP_FATAL, 2 QP_REQ_ERR, …), its end."""

    def qp_event(self, qpn: int, event: int) -> None: ...

    def owner_gone(self, qpn: int) -> bool:
        """Whether the process that the queue pair belongs to has ended, even if the device was not told yet."""
