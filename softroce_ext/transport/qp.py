"""A queue pair: its context, and the queues, memory and path that it was handed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from softroce_ext.transport import completer, migros, requester, responder, states
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
from softroce_ext.transport.verbs import QpEvent, QpState, SendFlag, WcFlag, WcOpcode, WcStatus, WrOpcode
from softroce_ext.wire.frame import Packet, Path
from softroce_ext.wire.headers import MIGROS_CAPABLE, PKEY_DEFAULT
from softroce_ext.wire.opcodes import FLAGS, OpFlag

if TYPE_CHECKING:
    from softroce_ext.transport.engine import Engine, EngineConfig, FrameSink

__all__ = ["InvalidTransition", "QpContext", "QueuePair"]

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
_SIGNALED = int(SendFlag.SIGNALED)
_REQUEST = int(OpFlag.REQUEST)
_RESUME = int(OpFlag.RESUME)
_RTS_SQD = frozenset({int(QpState.RTS), int(QpState.SQD)})
_IMM_FLAG = int(WcFlag.WITH_IMM)
INFINITE = 7
"""Retry count without end."""


class QueuePair:
    """One RC queue pair. Create it, `engine.add_qp(qp)`, then `modify` it through its states.

    What it remembers is in `context`; the other fields are handed in, or caches that live no longer than a batch.
    """

    __slots__ = (
        "ack_pending",
        "ack_timeout",
        "batch_psn",
        "capability",
        "config",
        "context",
        "counters",
        "engine",
        "events",
        "heap_at",
        "more",
        "pd",
        "read_record",
        "read_segments",
        "ready",
        "receive_queue",
        "recv_cq",
        "recv_segments",
        "send_cq",
        "send_queue",
        "touched",
        "write_target",
    )

    engine: Engine
    config: EngineConfig
    counters: dict[str, int]

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
        self.heap_at: float | None = None
        """Its earliest entry in the engine's timer heap."""
        self.ack_timeout: float | None = None
        """Seconds, from the context's timeout code."""
        self.forget_targets()

    # --- what the device calls ---

    def modify(self, attributes: Mapping[str, Any]) -> None:
        """ibv_modify_qp: all or nothing. Keys: `states.ATTRIBUTES`. Raises InvalidTransition.

        Completions that a move to ERR flushes are pushed before it returns. A move to RESET forgets all protocol state;
        emptying the queues is the caller's part.
        """
        context = self.context
        target = states.check(context.state, attributes)
        if target == QpState.RESET:
            self._reset()
            return
        if target == QpState.ERR:
            if context.state != QpState.ERR:
                self.enter_error(None, None)
            self.engine.publish()
            return
        before = context.state
        for name, value in attributes.items():
            if name not in ("qp_state", "cur_qp_state", "alt_path"):
                setattr(context, name, value)
        context.state = target
        if target == QpState.RTR and before == QpState.INIT:
            context.expected_psn = context.rq_psn
        if target == QpState.RTS and before == QpState.RTR:
            context.una_psn = context.send_psn = context.high_psn = context.next_psn = context.sq_psn
            context.retry_left = context.retry_cnt
            context.rnr_left = context.rnr_retry
        if target == QpState.SQD and before == QpState.RTS:
            context.sq_draining = True
            self._check_drained()
        self._derive()
        self.make_ready()

    def stop(self) -> None:
        """MigrOS Stopped: sends no request, takes no answer; requests get NAK_STOPPED (a stock partner: silence)."""
        migros.stop(self)

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
        """No RESUME is waiting for an answer, or the partner answered that it is itself stopped."""
        return not self.context.resume_pending or self.context.paused

    # --- what the engine calls ---

    def attach(self, engine: Engine) -> None:
        """The engine takes the queue pair in."""
        self.engine = engine
        self.config = engine.config
        self.counters = engine.counters
        self.capability = MIGROS_CAPABLE if engine.config.migros else 0
        self._derive()
        context = self.context
        for deadline in (
            context.ack_deadline,
            context.rnr_deadline,
            context.pause_deadline,
            context.resume_deadline,
        ):
            if deadline is not None:
                self.arm(deadline)
        self.make_ready()

    def receive(self, packet: Packet, now: float) -> None:
        """HOT. Take a packet that names this queue pair."""
        context = self.context
        counters = self.counters
        flags = FLAGS[packet.opcode]
        path = context.path
        if packet.opcode >= 0x20 or context.state not in migros.CONNECTED or path is None:
            counters["refused_state"] += 1
            return
        if packet.first_word & 0x7FFF != PKEY_DEFAULT & 0x7FFF:
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
            responder.receive_request(self, packet, flags, now)
        elif context.state in _RTS_SQD or context.resume_pending:
            completer.receive_answer(self, packet, flags, now)

    def transmit(self, now: float, sink: FrameSink, budget: int) -> int:
        """HOT. Send up to `budget` frames; returns how many. `more` says whether there would have been more."""
        self.more = False
        context = self.context
        sent = 0
        if context.answers:
            sent = responder.send_answers(self, sink, budget)
        if context.state in _RTS_SQD or (context.resume_pending and context.state == QpState.RTR):
            if context.stopped or sent >= budget:
                return sent
            if context.resume_pending:
                return sent + migros.send_resume(self, now, sink)
            if context.paused:
                if context.pause_deadline is None:  # restored in this state
                    context.pause_deadline = now + self.config.pause_limit
                    self.arm(context.pause_deadline)
                return sent
            if context.rnr_deadline is not None or context.state == QpState.RTR:
                return sent
            sent += requester.send_requests(self, now, sink, budget - sent)
        elif context.state == QpState.ERR:
            self._flush()
        return sent

    def on_timer(self, now: float) -> None:
        """Let the deadlines that have come act, and arm the next one."""
        context = self.context
        self.heap_at = None
        if context.state in migros.CONNECTED and not context.stopped:
            if context.resume_pending:
                if context.resume_deadline is not None and context.resume_deadline <= now:
                    migros.resume_timer(self, now)
            elif context.paused:
                if context.pause_deadline is not None and context.pause_deadline <= now:
                    migros.pause_timer(self)
            elif context.rnr_deadline is not None:
                if context.rnr_deadline <= now:
                    context.rnr_deadline = None
                    self.make_ready()
            elif context.ack_deadline is not None and context.ack_deadline <= now:
                self._ack_timer()
        if context.stopped or context.state == QpState.ERR:
            return
        deadlines = [
            deadline
            for deadline in (
                context.resume_deadline,
                context.pause_deadline,
                context.rnr_deadline,
                context.ack_deadline,
            )
            if deadline is not None and deadline > now
        ]
        if deadlines:
            self.arm(min(deadlines))

    def end_of_batch(self) -> None:
        """HOT. The batch's writes are in memory: queue its ACK; forget what was resolved."""
        self.touched = False
        if self.ack_pending:
            responder.flush_ack(self)
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

    def arm(self, when: float) -> None:
        """Have `on_timer` called at `when` (or before)."""
        if self.heap_at is None or when < self.heap_at:
            self.heap_at = when
            self.engine.push_timer(when, self)

    def will_write(self, memory: Memory, as_responder: bool) -> None:
        """`memory` must be flushed at the end of the batch; as_responder: it was the partner's request."""
        writers = self.engine.written.setdefault(id(memory), (memory, {}))[1]
        writers[self] = writers.get(self, False) or as_responder

    def flush_ack(self) -> None:
        """Queue the pending ACK now, so that another answer can follow it."""
        responder.flush_ack(self)

    def start_ack_timer(self, now: float) -> None:
        """Something is unacknowledged from now on."""
        if self.ack_timeout is not None:
            self.context.ack_deadline = now + self.ack_timeout
            self.arm(self.context.ack_deadline)

    def take_retry(self) -> bool:
        """Spend one retry; False when there is none left."""
        context = self.context
        self.counters["completer_retry_err"] += 1
        if context.retry_cnt != INFINITE:
            if context.retry_left == 0:
                self.counters["retry_exceeded_err"] += 1
                return False
            context.retry_left -= 1
        return True

    def progress(self, now: float) -> None:
        """HOT. `una_psn` has advanced: fresh retries, fresh timer."""
        context = self.context
        context.retry_left = context.retry_cnt
        context.rnr_left = context.rnr_retry
        context.retry_started = False
        context.rnr_deadline = None
        una = context.una_psn
        if (context.send_psn - una & 0xFFFFFF) >= 0x800000:
            context.send_psn = una  # gone back, and overtaken by late answers
        if context.send_psn == una:
            context.ack_deadline = None
        elif self.ack_timeout is not None:
            # The heap's entry is earlier: it will find this one.
            context.ack_deadline = now + self.ack_timeout
        if context.paused:
            migros.answered_while_paused(self)
        self.settle(now)

    def settle(self, now: float) -> None:
        """Deal with an oldest request that has failed here or was a local operation; notice a drained queue."""
        context = self.context
        inflight = context.inflight
        while inflight:
            oldest = inflight[0]
            if oldest.status:
                self.fail_oldest(WcStatus(oldest.status))
                return
            if oldest.packets or not oldest.done:
                return
            self.retire_oldest(now)
        if context.sq_draining:
            self._check_drained()

    def retire_oldest(self, now: float) -> None:
        """HOT. The oldest request is complete: give its slot back, then (deferred) publish its completion."""
        context = self.context
        record = context.inflight.popleft()
        wqe = record.wqe
        if context.cursor:
            context.cursor -= 1
            if wqe.opcode in requester.READS:
                context.reads_out -= 1
        self.send_queue.retire()
        self._note_completion(now)
        if wqe.flags & _SIGNALED or context.sq_sig_all:
            opcode = wqe.opcode
            self.engine.completions.append(
                (
                    self, self.send_cq, wqe.wr_id, 0, COMPLETION_OPCODE[opcode], wqe.length, 0, context.qpn, 0,
                    _IMM_FLAG if opcode in _WITH_IMM else 0, False,
                )
            )  # fmt: skip

    def complete_receive(
        self, now: float, opcode: int, byte_len: int, imm: int, wc_flags: int, solicited: bool
    ) -> None:
        """HOT. The receive in use is complete: give its slot back, then (deferred) publish its completion."""
        context = self.context
        receive = context.recv_wqe
        if receive is None:
            return
        context.recv_wqe = None
        self.recv_segments = None
        if not context.srq:
            self.receive_queue.retire()
        self._note_completion(now)
        self.engine.completions.append(
            (
                self, self.recv_cq, receive.wr_id, 0, opcode, byte_len, imm, context.qpn, context.destination_qpn,
                wc_flags, solicited,
            )
        )  # fmt: skip

    def fail_oldest(self, status: WcStatus) -> None:
        """The oldest request fails with `status`, and the queue pair with it."""
        context = self.context
        if context.inflight:
            context.inflight[0].status = status
        if status == WcStatus.RNR_RETRY_EXC_ERR:
            self.counters["retry_rnr_exceeded_err"] += 1
        self.enter_error(None, None)

    def enter_error(self, receive_status: WcStatus | None, event: QpEvent | None) -> None:
        """To ERR: every request and receive comes back, failed ones with their status, the others flushed.

        receive_status: of the receive in use (None: flushed like the others); event: to report besides.
        """
        context = self.context
        context.state = QpState.ERR
        context.ack_deadline = context.rnr_deadline = context.pause_deadline = context.resume_deadline = None
        context.paused = context.resume_pending = False
        context.message = 0
        self.ack_pending = False
        while context.inflight:
            record = context.inflight.popleft()
            self._flush_send(record.wqe.wr_id, record.wqe.opcode, record.status or WcStatus.WR_FLUSH_ERR)
        context.cursor = context.reads_out = 0
        context.send_psn = context.next_psn = context.high_psn = context.una_psn
        receive = context.recv_wqe
        if receive is not None:
            context.recv_wqe = None
            self._flush_receive(receive.wr_id, receive_status or WcStatus.WR_FLUSH_ERR)
            if not context.srq:
                self.receive_queue.retire()
        self._flush()
        if context.srq:
            self.events.qp_event(context.qpn, QpEvent.QP_LAST_WQE_REACHED)
        if event is not None:
            self.events.qp_event(context.qpn, event)
        self.make_ready()

    # --- inside ---

    def _flush(self) -> None:
        """ERR: return whatever is posted."""
        while (wqe := self.send_queue.fetch()) is not None:
            self._flush_send(wqe.wr_id, wqe.opcode, WcStatus.WR_FLUSH_ERR)
        if self.context.srq:
            return
        while (receive := self.receive_queue.fetch()) is not None:
            self._flush_receive(receive.wr_id, WcStatus.WR_FLUSH_ERR)
            self.receive_queue.retire()

    def _flush_send(self, wr_id: int, opcode: int, status: int) -> None:
        self.send_queue.retire()
        self.engine.completions.append(
            (
                self, self.send_cq, wr_id, int(status), COMPLETION_OPCODE.get(opcode, WcOpcode.SEND), 0, 0,
                self.context.qpn, 0, 0, True,
            )
        )  # fmt: skip

    def _flush_receive(self, wr_id: int, status: int) -> None:
        self.engine.completions.append(
            (self, self.recv_cq, wr_id, int(status), WcOpcode.RECV, 0, 0, self.context.qpn, 0, 0, True)
        )

    def _note_completion(self, now: float) -> None:
        context = self.context
        last = context.gap_last
        if last is not None and now - last > context.gap_longest:
            context.gap_longest = now - last
            context.gap_longest_end = now
        context.gap_last = now

    def _ack_timer(self) -> None:
        """Nothing was acknowledged in time."""
        context = self.context
        context.ack_deadline = None
        if context.send_psn == context.una_psn:
            return
        self.counters["local_ack_timeout_err"] += 1
        if not self.take_retry():
            self.fail_oldest(WcStatus.RETRY_EXC_ERR)
            return
        context.retry_started = False
        requester.go_back(self)

    def _check_drained(self) -> None:
        context = self.context
        if context.sq_draining and not context.inflight:
            context.sq_draining = False
            if context.en_sqd_async_notify:
                self.events.qp_event(context.qpn, QpEvent.SQ_DRAINED)

    def _derive(self) -> None:
        """What follows from the attributes."""
        code = self.context.timeout
        self.ack_timeout = max(4.096e-6 * (1 << code), self.config.minimum_ack_timeout) if code else None

    def _reset(self) -> None:
        old = self.context
        fresh = QpContext(old.qpn, old.sq_sig_all, old.srq, old.qp_type)
        for name in QpContext.__slots__:
            setattr(old, name, getattr(fresh, name))
        self.ack_pending = False
        self.forget_targets()
