"""The completer: the requester's other half, which takes the answers (IBA 9.7.5 and 9.7.6, 9.9.2).

An answer is believed only when it can be true: its PSN was sent and is not yet acknowledged, a READ's data have the
length and the place that was asked for, a READ or atomic is completed by its own answer alone. Everything before an
answer's PSN is acknowledged with it, up to the first READ or atomic that has no answer: that one's answer was lost,
and the requester goes back to it (an implied NAK).
"""

from __future__ import annotations

from softroce_ext.transport.interfaces import MemoryFault, ProtectionError
from softroce_ext.transport.rc import movement
from softroce_ext.transport.rc.connection import Connection
from softroce_ext.transport.rc.retry import on_late_duplicate_ack, restore_ack_timeout, take_retry
from softroce_ext.transport.scatter import Segment, scatter
from softroce_ext.transport.state.movement import PAUSED_STATES, RESUMING_STATES, STOPPED_STATES
from softroce_ext.transport.state.sender import Sender, SendRecord
from softroce_ext.transport.verbs import READS, WcStatus, WrOpcode
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


def receive_answer(qp: Connection, packet: Packet, flags: int, now: float) -> None:
    """HOT. Take one response packet. `flags`: the opcode's OpFlag bits."""
    sender = qp.sender
    moving = qp.movement.state
    if moving:
        if moving in STOPPED_STATES:
            qp.counters["dropped_stopped"] += 1
            return  # frozen: what was not acknowledged at the stop is retransmitted after the move
        if moving in RESUMING_STATES and flags & _ACK and movement.resume_answer(qp, packet, now):
            return
    psn = packet.psn
    ahead = psn - sender.una_psn & PSN_MASK
    if ahead >= (sender.high_psn - sender.una_psn & PSN_MASK):
        # Acknowledged already (harmless) or never sent (invalid); neither completes anything.
        qp.counters["rcvd_unsent_ack" if ahead < PSN_HALF else "rcvd_old_answer"] += 1
        until = sender.retransmitted_until_psn
        if until is not None and ahead >= PSN_HALF and (psn - until & PSN_MASK) >= PSN_HALF:
            on_late_duplicate_ack(qp, now)
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


def acknowledge(qp: Connection, until: int, now: float) -> bool:
    """HOT. Everything before PSN `until` was executed; retire what is complete.

    Returns False when a READ or atomic before `until` has no answer yet: it stays the oldest.
    """
    sender = qp.sender
    inflight = sender.inflight
    distance = until - sender.una_psn & PSN_MASK
    advanced = False
    complete = True
    while distance and inflight:
        record = inflight[0]
        if record.status:
            break  # it failed at this end: acknowledgements do not change that
        if record.packets and record.wqe.opcode in READS:
            complete = False
            break
        left = record.first_psn + record.packets - sender.una_psn & PSN_MASK
        if left > distance:
            sender.una_psn = until
            advanced = True
            break
        if left:
            advanced = True
            sender.una_psn = sender.una_psn + left & PSN_MASK
            distance -= left
        elif not record.done:
            break
        qp.retire_oldest(now)
    if advanced:
        progress(qp, now)
    return complete


def progress(qp: Connection, now: float) -> None:
    """HOT. `una_psn` has advanced: all retries are available again, and the timer restarts."""
    sender = qp.sender
    sender.on_progress(qp.attributes)
    if sender.ack_timeout_now != qp.ack_timeout:
        restore_ack_timeout(qp)
    timeout = sender.ack_timeout_now
    if sender.send_psn == sender.una_psn:
        sender.ack_deadline = None
    elif timeout is not None:
        # The heap's entry is earlier: it will find this one.
        sender.ack_deadline = now + timeout
    if qp.movement.state in PAUSED_STATES:
        movement.acknowledged_while_paused(qp, now)
    qp.settle(now)


def _answer_lost(qp: Connection) -> None:
    """The oldest READ's or atomic's answer was lost: ask again, once until something is acknowledged."""
    sender = qp.sender
    if sender.retry_started:
        qp.counters["dropped_answer_ahead"] += 1
        return
    if not take_retry(qp):
        qp.fail_oldest(WcStatus.RETRY_EXC_ERR)
        return
    sender.retry_started = True
    qp.counters["implied_nak_seq_err"] += 1
    qp.go_back()


def _oldest_for(qp: Connection, psn: int, now: float) -> SendRecord | None:
    """The oldest request, when an answer with data and this PSN is the next one that it waits for.

    Acknowledges what is before it. None when an earlier answer is missing (then it is asked for again).
    """
    sender = qp.sender
    if psn != sender.una_psn:
        if not acknowledge(qp, psn, now) or sender.una_psn != psn:
            _answer_lost(qp)
            return None
    # (A local operation that waits for its turn before the READ has no PSN: it is retired by `progress`.)
    return sender.inflight[0] if sender.inflight else None


def _within_oldest_read(sender: Sender, psn: int) -> bool:
    """Whether `psn` is one of the oldest request's responses, but not the next one, and the request a READ."""
    if psn == sender.una_psn or not sender.inflight:
        return False
    oldest = sender.inflight[0]
    return oldest.wqe.opcode == _RDMA_READ and (psn - oldest.first_psn & PSN_MASK) < oldest.packets


def _read_response(qp: Connection, packet: Packet, flags: int, now: float) -> None:
    """HOT. A READ response: place its data if it is the very next one."""
    sender, attributes = qp.sender, qp.attributes
    psn = packet.psn
    if psn == sender.una_psn:
        record = sender.inflight[0]
    else:
        if not qp.config.retry_read_gaps and _within_oldest_read(sender, psn):
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
    mtu = attributes.path_mtu
    offset = index * mtu
    last = index == record.packets - 1
    payload = packet.payload
    if (
        len(payload) != (record.wqe.length - offset if last else mtu)
        or (flags & _END != 0) != last
        or (index == 0 and not flags & _START)
        or (flags & (_START | _END) and packet.raw[packet.headers_at] & AETH_KIND != AETH_ACK)
    ):
        _bad_answer(qp)
        return
    if payload:
        try:
            scatter(qp.read_segments if qp.read_record is record else _resolve(qp, record), offset, payload)
        except (ProtectionError, MemoryFault):
            qp.fail_oldest(WcStatus.LOC_PROT_ERR)
            return
    sender.una_psn = psn + 1 & PSN_MASK
    if last:
        qp.retire_oldest(now)
    elif not (
        sender.retry_started or sender.send_psn == psn or ((moving := qp.movement.state) and moving in PAUSED_STATES)
    ):
        # `progress`, without what cannot be in the middle of an undisturbed READ.
        sender.retry_left = attributes.retry_cnt
        timeout = sender.ack_timeout_now
        if timeout is not None:
            sender.ack_deadline = now + timeout
        return
    progress(qp, now)


def _atomic_answer(qp: Connection, packet: Packet, kind: int, now: float) -> None:
    """An ATOMIC ACKNOWLEDGE: the original value goes, in this machine's byte order, to the request's element."""
    record = _oldest_for(qp, packet.psn, now)
    if record is None:
        return
    if record.wqe.opcode not in READS or record.wqe.opcode == _RDMA_READ or kind != AETH_ACK:
        _bad_answer(qp)
        return
    _, original = AETH_ATOMIC.unpack_from(packet.raw, packet.headers_at)
    try:
        scatter(_resolve(qp, record), 0, memoryview(original.to_bytes(8, "little")))
    except (ProtectionError, MemoryFault):
        qp.fail_oldest(WcStatus.LOC_PROT_ERR)
        return
    qp.sender.una_psn = packet.psn + 1 & PSN_MASK
    qp.retire_oldest(now)
    progress(qp, now)


def _resolve(qp: Connection, record: SendRecord) -> list[Segment]:
    """Where answered data go; kept for the other responses of the batch. Raises ProtectionError."""
    qp.read_segments = qp.resolve_for_writing(record.wqe.sges, False)
    qp.read_record = record
    return qp.read_segments


def _bad_answer(qp: Connection) -> None:
    """An answer of the wrong kind or length for the oldest request: the connection cannot be trusted any more."""
    qp.counters["rcvd_bad_answer"] += 1
    qp.fail_oldest(WcStatus.BAD_RESP_ERR)


def _rnr_nak(qp: Connection, psn: int, code: int, now: float) -> None:
    """Receiver not ready: wait the time that it asks for, then go back."""
    sender = qp.sender
    qp.counters["rcvd_rnr_err"] += 1
    if not acknowledge(qp, psn, now) or sender.una_psn != psn:
        _answer_lost(qp)
        return
    if sender.rnr_deadline is not None:
        return  # a second one for the same PSN: the wait has started
    if not sender.take_rnr_retry(qp.attributes.rnr_retry):
        qp.fail_oldest(WcStatus.RNR_RETRY_EXC_ERR)
        return
    qp.go_back()
    deadline = now + RNR_TIMER[code] / 1000
    sender.wait_for_receiver(deadline)
    qp.arm(deadline)


def _nak(qp: Connection, packet: Packet, syndrome: int, now: float) -> None:
    """NAK: everything before its PSN was executed; what happens to the rest depends on the code."""
    sender = qp.sender
    psn = packet.psn
    if syndrome == NAK_STOPPED and qp.config.migros:
        acknowledge(qp, psn, now)
        movement.pause(qp, psn, now)
        return
    before = sender.una_psn
    complete = acknowledge(qp, psn, now)
    if syndrome != NAK_PSN_SEQUENCE:
        qp.fail_oldest(NAK_STATUS.get(syndrome, WcStatus.REM_OP_ERR))
        return
    qp.counters["rcvd_nak_sequence"] += 1
    if psn != before:
        qp.counters["rcvd_seq_err"] += 1  # rxe too counts only those that acknowledge something
    if sender.rnr_deadline is not None or sender.send_psn == sender.una_psn:
        return  # about to send from there anyway
    if sender.retry_started and psn == before:
        return  # a responder asks once for a gap: the link has duplicated it
    if not complete:
        _answer_lost(qp)
        return
    if not take_retry(qp):
        qp.fail_oldest(WcStatus.RETRY_EXC_ERR)
        return
    sender.retry_started = True
    qp.go_back()
