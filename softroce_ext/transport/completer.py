"""The completer: the requester's other half, which takes the answers (IBA 9.7.5 and 9.7.6, 9.9.2).

An answer is believed only when it can be true: its PSN was sent and is not yet acknowledged, a READ's data have the
length and the place that was asked for, a READ or atomic is completed by its own answer alone. Everything before an
answer's PSN is acknowledged with it, up to the first READ or atomic that has no answer: that one's answer was lost,
and the requester goes back to it (an implied NAK).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softroce_ext.transport import migros
from softroce_ext.transport.completion import fail_oldest, retire_oldest, settle
from softroce_ext.transport.context import QpContext, SendRecord
from softroce_ext.transport.interfaces import MemoryFault, ProtectionError
from softroce_ext.transport.retry import answered_twice, arm, calm_down, go_back, take_retry
from softroce_ext.transport.scatter import resolve, scatter
from softroce_ext.transport.verbs import READS, Access, WcStatus, WrOpcode
from softroce_ext.wire.frame import Packet
from softroce_ext.wire.headers import (
    AETH_ACK,
    AETH_ATOMIC,
    AETH_KIND,
    AETH_NAK,
    AETH_RNR_NAK,
    NAK_INVALID_REQUEST,
    NAK_PSN_SEQUENCE,
    NAK_REMOTE_ACCESS,
    NAK_REMOTE_OPERATIONAL,
    NAK_STOPPED,
    PSN_HALF,
    PSN_MASK,
    RNR_TIMER,
)
from softroce_ext.wire.opcodes import OpFlag

if TYPE_CHECKING:
    from softroce_ext.transport.qp import QueuePair

NAK_STATUS = {
    NAK_INVALID_REQUEST: WcStatus.REM_INV_REQ_ERR,
    NAK_REMOTE_ACCESS: WcStatus.REM_ACCESS_ERR,
    NAK_REMOTE_OPERATIONAL: WcStatus.REM_OP_ERR,
}
"""Work completion of a NAK that ends the connection; reserved codes count as remote operational, as in rxe."""

_RDMA_READ = int(WrOpcode.RDMA_READ)
_START = int(OpFlag.START)
_END = int(OpFlag.END)
_READ = int(OpFlag.READ)
_ATOMIC = int(OpFlag.ATOMIC)
_ACK = int(OpFlag.ACK)


def receive_answer(qp: QueuePair, packet: Packet, flags: int, now: float) -> None:
    """HOT. Take one response packet. `flags`: the opcode's OpFlag bits."""
    context = qp.context
    if context.stopped:
        qp.counters["dropped_stopped"] += 1
        return  # frozen: what was not acknowledged at the stop comes again after the move
    if context.resume_pending and flags & _ACK and migros.resume_answer(qp, packet, now):
        return
    psn = packet.psn
    ahead = psn - context.una_psn & PSN_MASK
    if ahead >= (context.high_psn - context.una_psn & PSN_MASK):
        # Acknowledged already (harmless) or never sent (a lie); neither completes anything.
        qp.counters["rcvd_unsent_ack" if ahead < PSN_HALF else "rcvd_old_answer"] += 1
        if ahead >= PSN_HALF and qp.repeated_until >= 0 and (psn - qp.repeated_until & PSN_MASK) >= PSN_HALF:
            answered_twice(qp, now)
        return
    if flags & _READ:
        _read_response(qp, packet, flags, now)
        return
    syndrome = packet.raw[packet.headers_at]
    kind = syndrome & AETH_KIND
    if flags & _ATOMIC:
        _atomic_answer(qp, packet, kind, now)
    elif kind == AETH_ACK:
        if not acknowledge(qp, psn + 1 & PSN_MASK, now):
            _answer_lost(qp)
    elif kind == AETH_RNR_NAK:
        _rnr_nak(qp, psn, syndrome & 0x1F, now)
    elif kind == AETH_NAK:
        _nak(qp, packet, syndrome, now)
    else:
        qp.counters["rcvd_bad_answer"] += 1


def acknowledge(qp: QueuePair, until: int, now: float) -> bool:
    """Everything before PSN `until` was executed; retire what is complete.

    Returns False when a READ or atomic before `until` has no answer yet: it stays the oldest.
    """
    context = qp.context
    inflight = context.inflight
    distance = until - context.una_psn & PSN_MASK
    advanced = False
    complete = True
    while distance and inflight:
        record = inflight[0]
        if record.status:
            break  # it failed here: acknowledgements do not make it good
        if record.packets and record.wqe.opcode in READS:
            complete = False
            break
        left = record.first_psn + record.packets - context.una_psn & PSN_MASK
        if left > distance:
            context.una_psn = until
            advanced = True
            break
        if left:
            advanced = True
            context.una_psn = context.una_psn + left & PSN_MASK
            distance -= left
        elif not record.done:
            break
        retire_oldest(qp, now)
    if advanced:
        progress(qp, now)
    return complete


def progress(qp: QueuePair, now: float) -> None:
    """HOT. `una_psn` has advanced: fresh retries, fresh timer."""
    context = qp.context
    context.retry_left = context.retry_cnt
    context.rnr_left = context.rnr_retry
    context.retry_started = False
    context.rnr_deadline = None
    una = context.una_psn
    if (context.send_psn - una & PSN_MASK) >= PSN_HALF:
        context.send_psn = una  # gone back, and overtaken by late answers
    if qp.ack_wait != qp.ack_timeout:
        calm_down(qp)
    if context.send_psn == una:
        context.ack_deadline = None
    elif qp.ack_wait is not None:
        # The heap's entry is earlier: it will find this one.
        context.ack_deadline = now + qp.ack_wait
    if context.paused:
        migros.answered_while_paused(qp)
    settle(qp, now)


def _answer_lost(qp: QueuePair) -> None:
    """The oldest READ's or atomic's answer was lost: ask again, once until something is acknowledged."""
    context = qp.context
    if context.retry_started:
        qp.counters["dropped_answer_ahead"] += 1
        return
    if not take_retry(qp):
        fail_oldest(qp, WcStatus.RETRY_EXC_ERR)
        return
    context.retry_started = True
    qp.counters["implied_nak_seq_err"] += 1
    go_back(qp)


def _oldest_for(qp: QueuePair, psn: int, now: float) -> SendRecord | None:
    """The oldest request, when an answer with data and this PSN is the next one that it waits for.

    Acknowledges what is before it. None when an earlier answer is missing (then it is asked for again).
    """
    context = qp.context
    if psn != context.una_psn:
        if not acknowledge(qp, psn, now) or context.una_psn != psn:
            _answer_lost(qp)
            return None
    # (A local operation that waits for its turn before the READ has no PSN: it is retired by `progress`.)
    return context.inflight[0] if context.inflight else None


def _within_oldest_read(context: QpContext, psn: int) -> bool:
    """Whether `psn` is one of the oldest request's responses, but not the next one, and the request a READ."""
    if psn == context.una_psn or not context.inflight:
        return False
    oldest = context.inflight[0]
    return oldest.wqe.opcode == WrOpcode.RDMA_READ and (psn - oldest.first_psn & PSN_MASK) < oldest.packets


def _read_response(qp: QueuePair, packet: Packet, flags: int, now: float) -> None:
    """HOT. A READ response: place its data if it is the very next one."""
    context = qp.context
    psn = packet.psn
    if psn == context.una_psn:
        record = context.inflight[0]
    else:
        if not qp.config.retry_read_gaps and _within_oldest_read(context, psn):
            qp.counters["dropped_answer_ahead"] += 1
            return
        found = _oldest_for(qp, psn, now)
        if found is None:
            return
        record = found
    if record.wqe.opcode != _RDMA_READ:
        _bad_answer(qp)
        return
    index = psn - record.first_psn & PSN_MASK
    mtu = context.path_mtu
    offset = index * mtu
    last = index == record.packets - 1
    payload = packet.payload
    if (
        len(payload) != (record.wqe.length - offset if last else mtu)
        or bool(flags & _END) != last
        or (index == 0 and not flags & _START)
        or (flags & (_START | _END) and packet.raw[packet.headers_at] & AETH_KIND != AETH_ACK)
    ):
        _bad_answer(qp)
        return
    if payload and not _place(qp, record, offset, payload):
        return
    context.una_psn = psn + 1 & PSN_MASK
    if last:
        retire_oldest(qp, now)
    elif not (context.retry_started or context.paused or context.send_psn == psn):
        # `progress`, without what cannot be in the middle of an undisturbed READ.
        context.retry_left = context.retry_cnt
        if qp.ack_wait is not None:
            context.ack_deadline = now + qp.ack_wait
        return
    progress(qp, now)


def _atomic_answer(qp: QueuePair, packet: Packet, kind: int, now: float) -> None:
    """An ATOMIC ACKNOWLEDGE: the value before goes, in this machine's byte order, to the request's element."""
    record = _oldest_for(qp, packet.psn, now)
    if record is None:
        return
    if record.wqe.opcode not in READS or record.wqe.opcode == WrOpcode.RDMA_READ or kind != AETH_ACK:
        _bad_answer(qp)
        return
    _, original = AETH_ATOMIC.unpack_from(packet.raw, packet.headers_at)
    if not _place(qp, record, 0, memoryview(original.to_bytes(8, "little"))):
        return
    qp.context.una_psn = packet.psn + 1 & PSN_MASK
    retire_oldest(qp, now)
    progress(qp, now)


def _place(qp: QueuePair, record: SendRecord, offset: int, payload: memoryview) -> bool:
    """HOT. Write answered data to the request's elements. False (and the request failed) when that is not allowed."""
    segments = qp.read_segments
    if segments is None or qp.read_record is not record:
        try:
            segments = resolve(qp.pd, record.wqe.sges, Access.LOCAL_WRITE)
        except ProtectionError:
            fail_oldest(qp, WcStatus.LOC_PROT_ERR)
            return False
        qp.read_segments = segments
        qp.read_record = record
        for segment in segments:
            qp.will_write(segment[1], False)
    try:
        if len(segments) == 1:
            _, memory, address = segments[0]
            memory.write(address + offset, payload)
        else:
            scatter(segments, offset, payload)
    except MemoryFault:
        fail_oldest(qp, WcStatus.LOC_PROT_ERR)
        return False
    return True


def _bad_answer(qp: QueuePair) -> None:
    """An answer of the wrong kind or length for the oldest request: the connection cannot be trusted any more."""
    qp.counters["rcvd_bad_answer"] += 1
    fail_oldest(qp, WcStatus.BAD_RESP_ERR)


def _rnr_nak(qp: QueuePair, psn: int, code: int, now: float) -> None:
    """Receiver not ready: wait the time that it asks for, then go back."""
    context = qp.context
    qp.counters["rcvd_rnr_err"] += 1
    if not acknowledge(qp, psn, now) or context.una_psn != psn:
        _answer_lost(qp)
        return
    if context.rnr_deadline is not None:
        return  # a second one for the same PSN: the wait has begun
    if context.rnr_left == 0:
        fail_oldest(qp, WcStatus.RNR_RETRY_EXC_ERR)
        return
    if context.rnr_retry != 7:
        context.rnr_left -= 1
    go_back(qp)
    context.rnr_deadline = now + RNR_TIMER[code] / 1000
    arm(qp, context.rnr_deadline)


def _nak(qp: QueuePair, packet: Packet, syndrome: int, now: float) -> None:
    """NAK: everything before its PSN was executed; what happens to the rest depends on the code."""
    context = qp.context
    psn = packet.psn
    if syndrome == NAK_STOPPED and qp.config.migros:
        acknowledge(qp, psn, now)
        migros.pause(qp, psn, now)
        return
    before = context.una_psn
    complete = acknowledge(qp, psn, now)
    if syndrome == NAK_PSN_SEQUENCE:
        qp.counters["rcvd_nak_sequence"] += 1
        if psn != before:
            qp.counters["rcvd_seq_err"] += 1  # rxe counts those only that acknowledge something, too
        if context.rnr_deadline is not None or context.send_psn == context.una_psn:
            return  # about to send from there anyway
        if context.retry_started and psn == before:
            return  # a responder asks once for a gap: the link has doubled it
        if not complete:
            _answer_lost(qp)
            return
        if not take_retry(qp):
            fail_oldest(qp, WcStatus.RETRY_EXC_ERR)
            return
        context.retry_started = True
        go_back(qp)
        return
    fail_oldest(qp, NAK_STATUS.get(syndrome, WcStatus.REM_OP_ERR))
