"""How requests and receives come back to the application: completed, failed, or flushed (IBA 10.8.6, 11.4.2).

A slot of a queue is given back before its completion is published, and completions are published by the engine at the
end of a batch, after the batch's data have been flushed to memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from softroce_ext.transport.interfaces import CompletionQueue, WorkCompletion
from softroce_ext.transport.verbs import READS, QpEvent, QpState, SendFlag, WcFlag, WcOpcode, WcStatus, WrOpcode

if TYPE_CHECKING:
    from softroce_ext.transport.qp import QueuePair

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
_FAILED = 0
"""The opcode of a completion with an error: undefined (IBA 11.4.2.1), and 0 in rxe, whatever failed."""
_FLUSHED = int(WcStatus.WR_FLUSH_ERR)
_ERR = int(QpState.ERR)
_SENDING = (int(QpState.RTS), int(QpState.SQD))

_new: Any = tuple.__new__
"""Makes a named tuple without the cost of its generated constructor, which would show once per message."""

FLUSH_LIMIT = 1024
"""Work requests of one queue that one turn flushes."""


class PendingCompletion(NamedTuple):
    """A completion that waits until its batch's data are in memory."""

    queue_pair: QueuePair
    cq: CompletionQueue
    completion: WorkCompletion
    psn: int
    """Of a received message: the PSN of its last packet."""
    msn: int
    """Of a received message: its MSN."""


def settle(qp: QueuePair, now: float) -> None:
    """Deal with an oldest request that has failed here or was a local operation; notice a drained queue."""
    context = qp.context
    inflight = context.inflight
    while inflight:
        oldest = inflight[0]
        if oldest.status:
            fail_oldest(qp, oldest.status)
            return
        if oldest.packets or not oldest.done:
            return
        retire_oldest(qp, now)
    if context.sq_draining:
        check_drained(qp)


def retire_oldest(qp: QueuePair, now: float) -> None:
    """HOT. The oldest request is complete: give its slot back, then (deferred) publish its completion."""
    context = qp.context
    record = context.inflight.popleft()
    wqe = record.wqe
    if context.cursor:
        context.cursor -= 1
        if wqe.opcode in READS:
            context.reads_out -= 1
    qp.send_queue.retire()
    context.completed_sends += 1
    if wqe.opcode in _SENDS:
        qp.counters["rdma_sends"] += 1
    _note_completion(qp, now)
    if wqe.flags & _SIGNALED or context.sq_sig_all:
        opcode = wqe.opcode
        completion: WorkCompletion = _new(
            WorkCompletion,
            (
                wqe.wr_id, 0, COMPLETION_OPCODE[opcode], 0 if opcode == _BIND_MW else wqe.length, 0, context.qpn, 0,
                _IMM_FLAG if opcode in _WITH_IMM else 0, False,
            ),
        )  # fmt: skip
        qp.engine.completions.append(_new(PendingCompletion, (qp, qp.send_cq, completion, 0, 0)))


def complete_receive(
    qp: QueuePair,
    now: float,
    opcode: int,
    byte_len: int,
    imm: int,
    wc_flags: int,
    solicited: bool,
    source_qpn: int = 0,
) -> None:
    """HOT. The receive in use is complete: give its slot back, then (deferred) publish its completion.

    source_qpn: of a datagram; rxe leaves a connection's 0, and says of every receive that it came with a GRH.
    """
    context = qp.context
    receive = context.recv_wqe
    if receive is None:
        return
    context.recv_wqe = None
    qp.recv_segments = None
    if not context.srq:
        qp.receive_queue.retire()
    context.completed_receives += 1
    qp.counters["rdma_recvs"] += 1
    _note_completion(qp, now)
    completion: WorkCompletion = _new(
        WorkCompletion,
        (
            receive.wr_id, 0, opcode, byte_len, imm, context.qpn, source_qpn, wc_flags | _GRH_FLAG, solicited,
        ),
    )  # fmt: skip
    pending: PendingCompletion = _new(
        PendingCompletion, (qp, qp.recv_cq, completion, context.expected_psn, context.msn)
    )
    qp.engine.completions.append(pending)


def fail_oldest(qp: QueuePair, status: int) -> None:
    """The oldest request fails with `status`, and the queue pair with it."""
    context = qp.context
    if context.inflight:
        context.inflight[0].status = status
    if status == WcStatus.RNR_RETRY_EXC_ERR:
        qp.counters["retry_rnr_exceeded_err"] += 1
    enter_error(qp, None, None)


def enter_error(qp: QueuePair, receive_status: int | None, event: QpEvent | None) -> None:
    """To ERR: every request and receive comes back, failed ones with their status, the others flushed.

    receive_status: of the receive in use (None: flushed like the others); event: to report besides.
    """
    context = qp.context
    context.state = _ERR
    context.ack_deadline = context.rnr_deadline = context.pause_deadline = context.resume_deadline = None
    context.paused = context.resume_pending = context.sq_draining = False
    context.message = 0
    qp.ack_pending = False
    while context.inflight:
        record = context.inflight.popleft()
        _flush_send(qp, record.wqe.wr_id, record.wqe.opcode, record.status or _FLUSHED)
    context.cursor = context.reads_out = 0
    context.send_psn = context.next_psn = context.high_psn = context.una_psn
    receive = context.recv_wqe
    if receive is not None:
        context.recv_wqe = None
        _flush_receive(qp, receive.wr_id, receive_status or _FLUSHED)
        if not context.srq:
            qp.receive_queue.retire()
    flush(qp)
    if context.srq:
        qp.events.qp_event(context.qpn, QpEvent.QP_LAST_WQE_REACHED)
    if event is not None:
        qp.events.qp_event(context.qpn, event)
    qp.make_ready()


def flush(qp: QueuePair) -> None:
    """ERR: return whatever is posted, at most FLUSH_LIMIT of each kind at a time (a program may post for ever)."""
    for _ in range(FLUSH_LIMIT):
        wqe = qp.send_queue.fetch()
        if wqe is None:
            break
        _flush_send(qp, wqe.wr_id, wqe.opcode, _FLUSHED)
    else:
        qp.more = True
    if qp.context.srq:
        return
    for _ in range(FLUSH_LIMIT):
        receive = qp.receive_queue.fetch()
        if receive is None:
            break
        _flush_receive(qp, receive.wr_id, _FLUSHED)
        qp.receive_queue.retire()
    else:
        qp.more = True


def may_send(qp: QueuePair) -> bool:
    """The beginning of a turn of UC or UD: whether it may send. In ERR what is posted is flushed."""
    context = qp.context
    qp.more = False
    if context.state == _ERR:
        flush(qp)
    return not context.stopped and context.state in _SENDING


def _flush_send(qp: QueuePair, wr_id: int, opcode: int, status: int) -> None:
    """A request comes back with an error."""
    qp.send_queue.retire()
    if opcode in _SENDS:
        qp.counters["rdma_sends"] += 1  # rxe counts what came back, however
    _push_failed(qp, qp.send_cq, wr_id, status)


def _flush_receive(qp: QueuePair, wr_id: int, status: int) -> None:
    """A receive comes back with an error."""
    _push_failed(qp, qp.recv_cq, wr_id, status)


def _push_failed(qp: QueuePair, cq: CompletionQueue, wr_id: int, status: int) -> None:
    completion = WorkCompletion(wr_id, int(status), _FAILED, 0, 0, qp.context.qpn, 0, 0, solicited=True)
    qp.engine.completions.append(PendingCompletion(qp, cq, completion, 0, 0))


def _note_completion(qp: QueuePair, now: float) -> None:
    """HOT. Keep the longest time between two completions."""
    context = qp.context
    last = context.gap_last
    if last is not None and now - last > context.gap_longest:
        context.gap_longest = now - last
        context.gap_longest_end = now
    context.gap_last = now


def check_drained(qp: QueuePair) -> None:
    """SQD: say so when the last request that was begun is complete."""
    context = qp.context
    if context.sq_draining and not context.inflight:
        context.sq_draining = False
        if context.en_sqd_async_notify:
            qp.events.qp_event(context.qpn, QpEvent.SQ_DRAINED)
