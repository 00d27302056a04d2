"""The work queues of a queue pair, and how requests and receives come back: completed, failed, or flushed.

Source: IBA 10.8.6 and 11.4.2. A slot of a queue is given back before its completion is published, and completions are
published by the engine at the end of a batch, after the batch's data have been flushed to memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from softroce_ext.transport.interfaces import (
    CompletionQueue,
    EventSink,
    FrameSink,
    Memory,
    ProtectionDomain,
    ReceiveQueue,
    RecvWqe,
    SendQueue,
    SendWqe,
    Sge,
    WorkCompletion,
)
from softroce_ext.transport.scatter import Segment, resolve
from softroce_ext.transport.state.queue_pair import QueuePairState
from softroce_ext.transport.verbs import (
    Access,
    QpEvent,
    QpState,
    SendFlag,
    WcFlag,
    WcOpcode,
    WcStatus,
    WrOpcode,
)

if TYPE_CHECKING:
    from softroce_ext.transport.engine import Engine

COMPLETION_OPCODE: dict[int, int] = {
    WrOpcode.RDMA_WRITE: int(WcOpcode.RDMA_WRITE),
    WrOpcode.RDMA_WRITE_WITH_IMM: int(WcOpcode.RDMA_WRITE),
    WrOpcode.SEND: int(WcOpcode.SEND),
    WrOpcode.SEND_WITH_IMM: int(WcOpcode.SEND),
    WrOpcode.SEND_WITH_INV: int(WcOpcode.SEND),
    WrOpcode.RDMA_READ: int(WcOpcode.RDMA_READ),
    WrOpcode.ATOMIC_CMP_AND_SWP: int(WcOpcode.COMP_SWAP),
    WrOpcode.ATOMIC_FETCH_AND_ADD: int(WcOpcode.FETCH_ADD),
    WrOpcode.LOCAL_INV: int(WcOpcode.LOCAL_INV),
    WrOpcode.BIND_MW: int(WcOpcode.BIND_MW),
}
_WITH_IMM = frozenset({int(WrOpcode.RDMA_WRITE_WITH_IMM), int(WrOpcode.SEND_WITH_IMM)})
_BIND_MW = int(WrOpcode.BIND_MW)
_SENDS = frozenset({int(WrOpcode.SEND), int(WrOpcode.SEND_WITH_IMM), int(WrOpcode.SEND_WITH_INV)})
_IMM_FLAG = int(WcFlag.WITH_IMM)
_GRH_FLAG = int(WcFlag.GRH)
_SIGNALED = int(SendFlag.SIGNALED)
_LOCAL_WRITE = int(Access.LOCAL_WRITE)
_FAILED = 0
"""The opcode of a completion with an error: undefined (IBA 11.4.2.1), and 0 in rxe, whatever failed."""
_FLUSHED = int(WcStatus.WR_FLUSH_ERR)
_ERR = int(QpState.ERR)

_new: Any = tuple.__new__
"""Makes a named tuple without the cost of its generated constructor, which would show once per message."""

FLUSH_LIMIT = 1024
"""Work requests of one queue that one turn flushes."""


class WorkQueues(ABC):
    """What every queue pair has: its state, what it was handed, and its place in the engine."""

    __slots__ = (
        "attributes",
        "counters",
        "engine",
        "events",
        "heap_at",
        "more",
        "movement",
        "pd",
        "ready",
        "receive_queue",
        "receiver",
        "recv_cq",
        "recv_segments",
        "send_cq",
        "send_queue",
        "sender",
        "state",
        "statistics",
        "touched",
    )

    engine: Engine
    counters: dict[str, int]

    def __init__(
        self,
        state: QueuePairState,
        send_queue: SendQueue,
        receive_queue: ReceiveQueue,
        send_cq: CompletionQueue,
        recv_cq: CompletionQueue,
        pd: ProtectionDomain,
        events: EventSink,
    ) -> None:
        """A restored queue pair's queues must have the indices of the dump.

        Requests that were fetched and not retired are copied in the state, in order, and are not fetched again.
        """
        self.state = state
        self.attributes = state.attributes
        self.sender = state.sender
        self.receiver = state.receiver
        self.movement = state.movement
        self.statistics = state.statistics
        self.send_queue = send_queue
        self.receive_queue = receive_queue
        self.send_cq = send_cq
        self.recv_cq = recv_cq
        self.pd = pd
        self.events = events
        self.ready = False
        """It waits for its turn to send."""
        self.touched = False
        """It received something in this batch."""
        self.more = False
        """It could have sent more than its budget."""
        self.heap_at: float | None = None
        """The time of its earliest entry in the engine's timer heap."""
        self.recv_segments: list[Segment] | None = None
        """Where the receive in use goes, once it was resolved in this batch."""

    @property
    def qpn(self) -> int:
        """Its number on the wire."""
        return self.attributes.qpn

    def fetch_send(self) -> SendWqe | None:
        """HOT. The next posted send request, or None."""
        wqe = self.send_queue.fetch()
        if wqe is not None and self.engine.observer is not None:
            self.engine.observer.fetched(self.attributes.qpn, wqe)
        return wqe

    def fetch_receive(self) -> RecvWqe | None:
        """HOT. The next posted receive, or None."""
        wqe = self.receive_queue.fetch()
        if wqe is not None and self.engine.observer is not None:
            self.engine.observer.fetched(self.attributes.qpn, wqe)
        return wqe

    def make_ready(self) -> None:
        """Have the engine give this queue pair a turn to send."""
        if not self.ready:
            self.ready = True
            self.engine.ready.append(self)

    @abstractmethod
    def transmit(self, now: float, sink: FrameSink, budget: int) -> int:
        """HOT. Send up to `budget` frames; returns how many. `more` says whether there would have been more."""

    # -- memory ----------------------------------------------------------------------------------------------------

    def will_write(self, memory: Memory, as_responder: bool) -> None:
        """`memory` must be flushed at the end of the batch; as_responder: it was the peer's request."""
        writers = self.engine.written.setdefault(id(memory), (memory, {}))[1]
        writers[self] = writers.get(self, False) or as_responder

    def resolve_for_writing(self, sges: tuple[Sge, ...], as_responder: bool) -> list[Segment]:
        """The places of a message that will be written in this batch. Raises ProtectionError."""
        segments = resolve(self.pd, sges, _LOCAL_WRITE)
        for segment in segments:
            self.will_write(segment[1], as_responder)
        return segments

    # -- success ---------------------------------------------------------------------------------------------------

    def settle(self, now: float) -> None:
        """Deal with an oldest request that has failed at this end or was a local operation; notice a drained queue."""
        inflight = self.sender.inflight
        while inflight:
            oldest = inflight[0]
            if oldest.status:
                self.fail_oldest(oldest.status)
                return
            if oldest.packets or not oldest.done:
                return
            self.retire_oldest(now)
        if self.sender.sq_draining:
            self.check_drained()

    def retire_oldest(self, now: float) -> None:
        """HOT. The oldest request is complete: give its slot back, then (deferred) publish its completion."""
        wqe = self.sender.retire().wqe
        opcode = wqe.opcode
        attributes = self.attributes
        self.send_queue.retire()
        self.statistics.send_completed(now)
        if opcode in _SENDS:
            self.counters["rdma_sends"] += 1
        if wqe.flags & _SIGNALED or attributes.sq_sig_all:
            byte_len = 0 if opcode == _BIND_MW else wqe.length
            wc_flags = _IMM_FLAG if opcode in _WITH_IMM else 0
            completion: WorkCompletion = _new(
                WorkCompletion,
                (wqe.wr_id, 0, COMPLETION_OPCODE[opcode], byte_len, 0, attributes.qpn, 0, wc_flags, False),
            )
            self.engine.completions.append((self, self.send_cq, completion, 0, 0))

    def complete_receive(
        self,
        now: float,
        receive: RecvWqe | None,
        opcode: int,
        byte_len: int,
        imm: int,
        wc_flags: int,
        solicited: bool,
        source_qpn: int = 0,
    ) -> None:
        """HOT. A receive is complete: give its slot back, then (deferred) publish its completion.

        source_qpn: of a datagram; rxe leaves a connection's 0, and says of every receive that it came with a GRH.
        """
        if receive is None:
            return
        receiver = self.receiver
        self.recv_segments = None
        attributes = self.attributes
        if not attributes.srq:
            self.receive_queue.retire()
        self.statistics.receive_completed(now)
        self.counters["rdma_recvs"] += 1
        completion: WorkCompletion = _new(
            WorkCompletion,
            (
                receive.wr_id, 0, opcode, byte_len, imm, attributes.qpn, source_qpn, wc_flags | _GRH_FLAG, solicited,
            ),
        )  # fmt: skip
        self.engine.completions.append((self, self.recv_cq, completion, receiver.expected_psn, receiver.msn))

    def check_drained(self) -> None:
        """SQD: report that the last request which was started is complete."""
        if self.sender.end_draining() and self.attributes.en_sqd_async_notify:
            self.events.qp_event(self.attributes.qpn, QpEvent.SQ_DRAINED)

    # -- failure ---------------------------------------------------------------------------------------------------

    def fail_oldest(self, status: int) -> None:
        """The oldest request fails with `status`, and the queue pair with it."""
        if self.sender.inflight:
            self.sender.inflight[0].status = status
        if status == WcStatus.RNR_RETRY_EXC_ERR:
            self.counters["retry_rnr_exceeded_err"] += 1
        self.enter_error(None, None)

    def fail_receive(self, status: int, event: QpEvent) -> None:
        """The receive in use fails with `status` by this end's own fault, and the queue pair with it.

        Of a process that has ended nothing is reported: its memory went with it.
        """
        if self.events.owner_gone(self.attributes.qpn):
            self.enter_error(status, None)
        elif self.attributes.state != _ERR:
            self.enter_error(status, event)

    def completion_lost(self, psn: int, msn: int) -> None:
        """The completion of a received message (its last packet's PSN, its MSN) did not fit into its queue."""
        self.enter_error(None, None)

    def memory_gone(self, as_responder: bool) -> None:
        """This batch's data could not be stored; as_responder: they were the peer's."""
        if as_responder:
            self.fail_receive(WcStatus.LOC_PROT_ERR, QpEvent.QP_FATAL)
        else:
            self.enter_error(None, None)

    def enter_error(self, receive_status: int | None, event: QpEvent | None) -> None:
        """To ERR: every request and receive comes back, failed ones with their status, the others flushed.

        receive_status: of the receive in use (None: flushed like the others); event: to report besides.
        """
        attributes = self.attributes
        attributes.state = _ERR
        self.movement.fail()
        self.receiver.abandon_message()
        for record in self.sender.abort():
            self._flush_send(record.wqe.wr_id, record.wqe.opcode, record.status or _FLUSHED)
        receive = self.receiver.release_receive()
        if receive is not None:
            self._push_failed(self.recv_cq, receive.wr_id, receive_status or _FLUSHED)
            if not attributes.srq:
                self.receive_queue.retire()
        self.flush()
        if attributes.srq:
            self.events.qp_event(attributes.qpn, QpEvent.QP_LAST_WQE_REACHED)
        if event is not None:
            self.events.qp_event(attributes.qpn, event)
        self.make_ready()

    def flush(self) -> None:
        """ERR: return what is posted, at most FLUSH_LIMIT of each kind at a time (a program may post without end)."""
        for _ in range(FLUSH_LIMIT):
            wqe = self.fetch_send()
            if wqe is None:
                break
            self._flush_send(wqe.wr_id, wqe.opcode, _FLUSHED)
        else:
            self.more = True
        if self.attributes.srq:
            return
        for _ in range(FLUSH_LIMIT):
            receive = self.fetch_receive()
            if receive is None:
                break
            self._push_failed(self.recv_cq, receive.wr_id, _FLUSHED)
            self.receive_queue.retire()
        else:
            self.more = True

    def _flush_send(self, wr_id: int, opcode: int, status: int) -> None:
        """A request comes back with an error."""
        self.send_queue.retire()
        if opcode in _SENDS:
            self.counters["rdma_sends"] += 1  # rxe counts what came back, successful or not
        self._push_failed(self.send_cq, wr_id, status)

    def _push_failed(self, cq: CompletionQueue, wr_id: int, status: int) -> None:
        completion = WorkCompletion(wr_id, int(status), _FAILED, 0, 0, self.attributes.qpn, 0, 0, solicited=True)
        self.engine.completions.append((self, cq, completion, 0, 0))


PendingCompletion = tuple[WorkQueues, CompletionQueue, WorkCompletion, int, int]
"""A completion that waits until its batch's data are in memory: its queue pair, its queue, the completion, and of a
received message the PSN of its last packet and its MSN (else 0). A plain tuple, because there is one per message."""
