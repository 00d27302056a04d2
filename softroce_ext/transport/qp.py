"""A queue pair: its context, and the queues, memory and path that it was handed.

`QueuePair` is the reliable connection and what all services share; `unreliable` and `datagram` are the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from softroce_ext.transport import answers, completer, completion, in_order, migros, requester, responder, retry, states
from softroce_ext.transport.context import QpContext, SendRecord
from softroce_ext.transport.interfaces import (
    CompletionQueue,
    EventSink,
    Memory,
    ProtectionDomain,
    ReceiveQueue,
    SendQueue,
)
from softroce_ext.transport.scatter import Segment
from softroce_ext.transport.states import InvalidTransition
from softroce_ext.transport.verbs import QpState, QpType
from softroce_ext.wire import opcodes as op
from softroce_ext.wire.frame import Packet, Path
from softroce_ext.wire.headers import ACK_REQ, MIGROS_CAPABLE, PKEY_PARTITION
from softroce_ext.wire.opcodes import FLAGS, OpFlag

if TYPE_CHECKING:
    from softroce_ext.transport.engine import Engine, EngineConfig, FrameSink

__all__ = ["InvalidTransition", "QpContext", "QueuePair"]

_REQUEST = int(OpFlag.REQUEST)
_RESUME = int(OpFlag.RESUME)
_RTR, _RTS, _SQD, _ERR = int(QpState.RTR), int(QpState.RTS), int(QpState.SQD), int(QpState.ERR)
_RTS_SQD = frozenset({_RTS, _SQD})
"""Bit 15 of a P_Key says full or limited member; it does not count in the comparison."""


class QueuePair:
    """One queue pair. Create it, `engine.add_qp(qp)`, then `modify` it through its states.

    What it remembers is in `context`; the other fields are handed in, or caches that live no longer than a batch.
    `QueuePair(context, …)` makes one of the class that gives the service `context.qp_type`: this one for RC.
    """

    __slots__ = (
        "ack_pending",
        "ack_timeout",
        "ack_wait",
        "batch_psn",
        "calm_psn",
        "capability",
        "config",
        "context",
        "counters",
        "engine",
        "events",
        "heap_at",
        "held",
        "more",
        "pd",
        "read_record",
        "read_segments",
        "ready",
        "receive_queue",
        "recv_cq",
        "recv_segments",
        "repeated_at",
        "repeated_until",
        "send_cq",
        "send_queue",
        "touched",
        "write_target",
    )

    engine: Engine
    config: EngineConfig
    counters: dict[str, int]

    service: ClassVar[int] = op.RC
    """The opcodes' top three bits."""
    ack_request: ClassVar[int] = ACK_REQ
    """What a message's last packet says in BTH byte 8: acknowledge me."""
    announces_migros: ClassVar[bool] = True

    _classes: ClassVar[dict[int, type[QueuePair]]] = {}

    def __init_subclass__(cls, qp_type: QpType) -> None:
        QueuePair._classes[qp_type] = cls

    def __new__(cls, context: QpContext, *_: Any) -> QueuePair:
        return object.__new__(QueuePair._classes.get(context.qp_type, cls))

    def __init__(
        self,
        context: QpContext,
        send_queue: SendQueue,
        receive_queue: ReceiveQueue,
        send_cq: CompletionQueue,
        recv_cq: CompletionQueue,
        pd: ProtectionDomain,
        path: Path | None,
        events: EventSink,
    ) -> None:
        """path: overrides `context.path` when given (after a restore: this host's MAC and the same or a new IP).

        A restored QP's queues must stand where they stood at the dump: fetched-but-not-retired WQEs are copied in the
        context (in order) and are retired, not fetched again.
        """
        self.context = context
        self.send_queue = send_queue
        self.receive_queue = receive_queue
        self.send_cq = send_cq
        self.recv_cq = recv_cq
        self.pd = pd
        self.events = events
        if path is not None:
            context.path = path
        self.capability = 0
        self.ready = False
        """It waits for its turn to send."""
        self.touched = False
        """It received something in this batch."""
        self.batch_psn = 0
        """What was expected when this batch began."""
        self.more = False
        """It could have sent more than its budget."""
        self.ack_pending = False
        self.held: list[bytes] = []
        """Frames that wait until earlier READs have been answered (`in_order`)."""
        self.heap_at: float | None = None
        """Its earliest entry in the engine's timer heap."""
        self.ack_timeout: float | None = None
        """Seconds, from the context's timeout code."""
        self.ack_wait: float | None = None
        """Seconds until a timeout: `ack_timeout`, or longer when that was too short (retry.answered_twice)."""
        self.repeated_until = -1
        """One after the last PSN that a timeout had sent again; -1: none, or it is known what came of them."""
        self.repeated_at = 0.0
        """When."""
        self.calm_psn = 0
        """Once this is acknowledged, and there was no timeout since, `ack_wait` is shortened again."""
        self.forget_targets()

    # --- what the device calls ---

    def modify(self, attributes: Mapping[str, Any]) -> None:
        """ibv_modify_qp: all or nothing. Keys: `states.ATTRIBUTES`. Raises InvalidTransition.

        Completions that a move to ERR flushes are pushed before it returns. A move to RESET forgets all protocol state;
        emptying the queues is the caller's part.
        """
        context = self.context
        target = states.check(context.state, attributes, context.qp_type)
        if context.sq_draining and "qp_state" in attributes and target != QpState.ERR:
            raise InvalidTransition("the send queue is still draining: wait for SQ_DRAINED")
        if target == QpState.RESET:
            self._reset()
            return
        if target == QpState.ERR:
            if context.state != QpState.ERR:
                completion.enter_error(self, None, None)
                answers.drop_reads(context)
            self.engine.publish()
            return
        before = context.state
        for name, value in attributes.items():
            if name not in ("qp_state", "cur_qp_state", "alt_path"):
                setattr(context, name, states.rounded(value) if name in states.DEPTHS else value)
        context.state = int(target)
        if target == QpState.RTR and before == QpState.INIT:
            context.expected_psn = context.rq_psn
        if target == QpState.RTS and before == QpState.RTR:
            context.una_psn = context.send_psn = context.high_psn = context.next_psn = context.sq_psn
            context.retry_left = context.retry_cnt
            context.rnr_left = context.rnr_retry
        if target == QpState.SQD and before == QpState.RTS:
            context.sq_draining = True
            completion.check_drained(self)
        self._derive()
        self.make_ready()

    def stop(self) -> None:
        """MigrOS Stopped: sends no request, takes no answer; requests get NAK_STOPPED (a stock partner: silence)."""
        migros.stop(self)
        in_order.forget(self)

    def unstop(self) -> None:
        """Leave Stopped without telling the partner; the requester goes back to the first unacknowledged PSN."""
        migros.unstop(self)

    def resume(self, path: Path | None = None) -> None:
        """Un-stop and have RESUME sent over `path` (None: the path it has) until it is acknowledged.

        Does nothing but un-stop when the partner is not known to speak MigrOS, or the QP is not in RTR, RTS or SQD.
        """
        migros.resume(self, path)

    @property
    def resume_settled(self) -> bool:
        """No RESUME is waiting for an answer, or the partner is itself stopped, or nobody knows that it can answer."""
        return not self.context.resume_pending or self.context.paused or not self.context.peer_migros

    # --- what the engine calls ---

    def attach(self, engine: Engine) -> None:
        """The engine takes the queue pair in."""
        self.engine = engine
        self.config = engine.config
        self.counters = engine.counters
        self.capability = MIGROS_CAPABLE if engine.config.migros and self.announces_migros else 0
        self._derive()
        context = self.context
        for deadline in (
            context.ack_deadline,
            context.rnr_deadline,
            context.pause_deadline,
            context.resume_deadline,
        ):
            if deadline is not None:
                retry.arm(self, deadline)
        self.make_ready()

    def receive(self, packet: Packet, now: float) -> None:
        """HOT. Take a packet that names this queue pair."""
        context = self.context
        counters = self.counters
        flags = FLAGS[packet.opcode]
        path = context.path
        if packet.opcode >= op.UC or context.state not in migros.CONNECTED or path is None:
            counters["refused_state"] += 1
            return
        if packet.first_word & 0x7FFF != PKEY_PARTITION:
            counters["refused_pkey"] += 1
            return
        if flags & _RESUME:
            if not migros.acceptable(self, packet):
                counters["refused_resume"] += 1
                return
        elif packet.addresses != path.answers_from:
            counters["refused_address"] += 1
            return
        if packet.ack_byte & MIGROS_CAPABLE and self.capability and not context.peer_migros:
            context.peer_migros = True
        if not self.touched:
            self.touched = True
            self.batch_psn = context.expected_psn
            self.engine.touched.append(self)
        if flags & _REQUEST:
            if not (context.answers or self.held) or not in_order.waits(self, packet, flags):
                responder.receive_request(self, packet, flags, now)
        elif context.state in _RTS_SQD or context.resume_pending:
            completer.receive_answer(self, packet, flags, now)
        else:
            counters["refused_state"] += 1

    def transmit(self, now: float, sink: FrameSink, budget: int) -> int:
        """HOT. Send up to `budget` frames; returns how many. `more` says whether there would have been more."""
        self.more = False
        context = self.context
        sent = 0
        if context.answers:
            sent = answers.send_answers(self, sink, budget)
        if context.state in _RTS_SQD or (context.resume_pending and context.state == _RTR):
            if context.stopped:
                return sent
            if sent >= budget:
                self.more = True  # requests may wait, and nothing else would ask for their turn
                return sent
            if context.resume_pending:
                return sent + migros.send_resume(self, now, sink)
            if context.paused:
                if context.pause_deadline is None:  # restored in this state
                    context.pause_deadline = now + self.config.pause_limit
                    retry.arm(self, context.pause_deadline)
                return sent
            if context.rnr_deadline is not None or context.state == _RTR:
                return sent
            sent += requester.send_requests(self, now, sink, budget - sent)
        elif context.state == _ERR:
            completion.flush(self)
        return sent

    def end_of_batch(self) -> None:
        """HOT. The batch's writes are in memory: queue its ACK; forget what was resolved."""
        self.touched = False
        if self.ack_pending:
            answers.flush_ack(self)
        self.forget_targets()
        self.make_ready()

    def forget_targets(self) -> None:
        """Resolved keys are good for one batch only: the application may deregister between batches."""
        self.write_target: tuple[Memory, int] | None = None
        self.recv_segments: list[Segment] | None = None
        self.read_segments: list[Segment] | None = None
        self.read_record: SendRecord | None = None

    # --- what requester, completer, responder and migros call ---

    def make_ready(self) -> None:
        """Have the engine give this queue pair a turn to send."""
        if not self.ready:
            self.ready = True
            self.engine.ready.append(self)

    def will_write(self, memory: Memory, as_responder: bool) -> None:
        """`memory` must be flushed at the end of the batch; as_responder: it was the partner's request."""
        writers = self.engine.written.setdefault(id(memory), (memory, {}))[1]
        writers[self] = writers.get(self, False) or as_responder

    # --- inside ---

    def _derive(self) -> None:
        """What follows from the attributes."""
        code = self.context.timeout
        self.ack_timeout = max(4.096e-6 * (1 << code), self.config.minimum_ack_timeout) if code else None
        self.ack_wait = self.ack_timeout

    def _reset(self) -> None:
        old = self.context
        fresh = QpContext(old.qpn, old.sq_sig_all, old.srq, old.qp_type)
        for name in QpContext.__slots__:
            setattr(old, name, getattr(fresh, name))
        self.ack_pending = False
        in_order.forget(self)
        self.forget_targets()
