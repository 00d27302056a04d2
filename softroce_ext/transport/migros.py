"""MigrOS: a queue pair that stands still while it is moved, and its partner that waits (paper and facts: docs).

*Stopped* is the end that moves: it sends no request, takes no answer, and answers the next request in order by
NAK_STOPPED (AETH 0x65). *Paused* is its partner after that NAK: it sends no request until a RESUME (opcode 0x19)
tells it that the other end runs again, and from which address.

Differences from the proof of concept, each for a fault of it:

* Both messages go only to a partner that announced the extension (reserved bit 0x40 of BTH byte 8 in each of its
  packets): a stock NIC fails the connection on 0x65. A stock partner of a stopped queue pair gets silence.
* The ACK of a RESUME carries `expected PSN - 1`, as any ACK: it acknowledges what was executed, and nothing more. It
  is marked by reserved bit 0x20 of BTH byte 8.
* RESUME has a timer of its own, with back-off and an end.
* A partner from which nothing has ever come is not known to speak MigrOS or not to. It is sent RESUME when this end's
  address changes, for without that it could not find this end anyhow.
* RESUME is believed only if its PSN lies within what the sender can have on the way. That keeps out old and stray
  packets, not an attacker on the path: RoCE has no authentication.
* It is always taken, also while one's own is unanswered. A Stopped end answers it by NAK_STOPPED, not by an ACK: that
  only the end that finally runs may give, because what a stopped end learns after its dump is lost with it.
* A Paused end takes answers still (they are true), pauses for a limited time, and goes on by itself when an answer
  shows that the partner has executed what it had refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softroce_ext.transport.answers import flush_ack
from softroce_ext.transport.completion import enter_error
from softroce_ext.transport.context import Acknowledge, QpContext
from softroce_ext.transport.retry import arm, go_back
from softroce_ext.transport.verbs import QpEvent, QpState, QpType
from softroce_ext.wire import opcodes as op
from softroce_ext.wire.frame import Packet, Path
from softroce_ext.wire.headers import (
    ACK_REQ,
    ACK_UNLIMITED,
    AETH_ACK,
    AETH_KIND,
    BTH_AETH,
    MIGROS_CAPABLE,
    MIGROS_RECEIVER,
    MIGROS_RESUMED,
    NAK_STOPPED,
    PKEY_DEFAULT,
    PSN_MASK,
)

if TYPE_CHECKING:
    from softroce_ext.transport.engine import FrameSink
    from softroce_ext.transport.qp import QueuePair

CONNECTED = frozenset({int(QpState.RTR), int(QpState.RTS), int(QpState.SQD)})
"""States in which there is a partner to speak to."""


def speaks(qp: QueuePair) -> bool:
    """Whether both ends speak MigrOS."""
    return qp.config.migros and qp.context.peer_migros


# --- the end that moves ---


def stop(qp: QueuePair) -> None:
    """Become Stopped; all that is unacknowledged stays as it is."""
    context = qp.context
    context.stopped = True
    context.ack_deadline = context.rnr_deadline = context.resume_deadline = None


def unstop(qp: QueuePair) -> None:
    """Leave Stopped: as after a long silence, go back to the first unacknowledged PSN, with fresh retry counts."""
    context = qp.context
    context.stopped = False
    context.nak_sent = False
    for answer in [a for a in context.answers if isinstance(a, Acknowledge) and a.syndrome == NAK_STOPPED]:
        context.answers.remove(answer)  # it has not left, and is no longer true
    context.retry_left = context.retry_cnt
    context.rnr_left = context.rnr_retry
    context.retry_started = False
    context.rnr_deadline = None
    context.pause_deadline = None
    go_back(qp)


def address_changed(context: QpContext) -> None:
    """A queue pair gets another address: `resume` will tell its partner even if nothing has ever come from it."""
    unheard = context.expected_psn == context.rq_psn and context.una_psn == context.sq_psn
    if context.qp_type == QpType.RC and context.state in CONNECTED and unheard:
        context.resume_pending = True


def resume(qp: QueuePair, path: Path | None) -> None:
    """Leave Stopped on `path` and have RESUME sent until it is acknowledged, if the partner may understand it."""
    context = qp.context
    if path is not None:
        if context.path is not None and context.path.source_ip != path.source_ip:
            address_changed(context)
        context.path = path
    unstop(qp)
    asked = speaks(qp) or (context.resume_pending and bool(qp.capability))
    context.resume_pending = context.state in CONNECTED and asked
    if context.resume_pending:
        context.resume_deadline = None
        context.resume_wait = qp.config.resume_interval
        context.resume_since = None


def refuse_while_stopped(qp: QueuePair) -> None:
    """The expected request came to a Stopped end: it is dropped, and the partner told if it understands."""
    context = qp.context
    if not speaks(qp):
        return
    flush_ack(qp)
    last = context.answers[-1] if context.answers else None
    if isinstance(last, Acknowledge) and last.syndrome == NAK_STOPPED:
        return  # one in a batch is enough
    qp.counters["sent_nak_stopped"] += 1
    context.nak_sent = True  # what follows it need not be asked for
    context.answers.append(Acknowledge(context.expected_psn, NAK_STOPPED, context.msn))


def send_resume(qp: QueuePair, now: float, sink: FrameSink) -> int:
    """Send RESUME if it is due; returns the number of frames."""
    context = qp.context
    if context.resume_deadline is not None and now < context.resume_deadline:
        return 0
    if context.resume_since is None:
        context.resume_since = now
    ack_byte, psn = ACK_REQ | qp.capability, context.una_psn
    if context.state == QpState.RTR:  # perftest's servers stay there
        ack_byte, psn = ack_byte | MIGROS_RECEIVER, context.expected_psn
    headers = BTH_AETH.pack(
        op.RESUME << 24 | PKEY_DEFAULT, context.destination_qpn, ack_byte << 24 | psn, ACK_UNLIMITED << 24 | context.msn
    )
    assert context.path is not None
    sink.add(context.path, headers, b"", 0)
    qp.counters["sent_resume"] += 1
    context.resume_deadline = now + context.resume_wait
    context.resume_wait = min(2 * context.resume_wait, qp.config.resume_interval_limit)
    arm(qp, context.resume_deadline)
    return 1


def resume_timer(qp: QueuePair, now: float) -> None:
    """A RESUME went unanswered for its time: again, or give up."""
    context = qp.context
    if context.resume_since is not None and now - context.resume_since >= qp.config.resume_limit:
        context.resume_pending = False
        context.resume_deadline = None
        if context.peer_migros:
            qp.counters["resume_exceeded_err"] += 1
            enter_error(qp, None, QpEvent.QP_FATAL)
    qp.make_ready()


def resume_answer(qp: QueuePair, packet: Packet, now: float) -> bool:
    """Look at an ACKNOWLEDGE while a RESUME is unanswered. Returns whether the packet is done with."""
    context = qp.context
    outstanding = context.high_psn - context.una_psn & PSN_MASK
    executed = packet.psn + 1 - context.una_psn & PSN_MASK
    syndrome = packet.raw[packet.headers_at]
    receiver = context.state == QpState.RTR  # no PSN of its own to compare with, nothing to be acknowledged
    if packet.ack_byte & MIGROS_RESUMED and syndrome & AETH_KIND == AETH_ACK and (receiver or executed <= outstanding):
        context.resume_pending = False
        context.resume_deadline = context.resume_since = None
        context.resume_acked_at = now
        qp.counters["resume_acked"] += 1
        _unpause(qp)
        return receiver  # it acknowledges like any other
    if syndrome == NAK_STOPPED and (receiver or (packet.psn - context.una_psn & PSN_MASK) <= outstanding):
        # The partner is being moved too: it will send a RESUME; ours goes on, since its new place must hear it.
        context.resume_since = now
        pause(qp, packet.psn, now)
        return True
    if receiver:
        qp.counters["refused_state"] += 1
    return receiver


# --- its partner ---


def pause(qp: QueuePair, psn: int, now: float) -> None:
    """NAK_STOPPED for `psn`: become Paused. No completion, no error, no retry spent."""
    context = qp.context
    qp.counters["rcvd_nak_stopped"] += 1
    context.paused = True
    context.pause_psn = psn
    # Pause for a moment only on a NAK_STOPPED just after a RESUME, which may have overtaken it, and when nothing was
    # ever acknowledged: if the partner has heard of this end after its dump only, its new place tells nobody.
    resumed = context.partner_resumed_at
    doubtful = resumed is not None and 0 <= now - resumed < qp.config.stale_stop_limit
    doubtful = doubtful or context.una_psn == context.sq_psn
    context.pause_deadline = now + (qp.config.stale_stop_pause if doubtful else qp.config.pause_limit)
    arm(qp, context.pause_deadline)
    context.rnr_deadline = None
    go_back(qp)


def answered_while_paused(qp: QueuePair) -> None:
    """Something was acknowledged: when it is what the partner had refused, then it runs again."""
    context = qp.context
    if (context.una_psn - context.pause_psn - 1 & PSN_MASK) < PSN_MASK // 2:
        _unpause(qp)


def pause_timer(qp: QueuePair) -> None:
    """No RESUME within the limit: try ordinary retransmission, which finds out what has become of the partner."""
    qp.counters["pause_exceeded"] += 1
    _unpause(qp)


def _unpause(qp: QueuePair) -> None:
    context = qp.context
    context.paused = False
    context.pause_deadline = None
    context.rnr_deadline = None  # an RNR NAK that came meanwhile: its time has passed unseen
    context.retry_left = context.retry_cnt
    context.rnr_left = context.rnr_retry
    context.retry_started = False
    go_back(qp)


def receive_resume(qp: QueuePair, packet: Packet, now: float) -> None:
    """A RESUME that `acceptable` let through: its source is where the partner lives now."""
    context = qp.context
    path = context.path
    assert path is not None
    qp.counters["rcvd_resume"] += 1
    moved = packet.source_ip != path.destination_ip or packet.source_mac != path.destination_mac
    if moved:
        context.path = path.replace(destination_ip=packet.source_ip, destination_mac=packet.source_mac)
        qp.engine.peer_moved(context.destination_qpn, path.destination_ip, context.path)
    context.partner_resumed_at = now
    context.peer_migros = True
    context.nak_sent = False
    flush_ack(qp)
    if context.stopped:
        context.paused = False
        refuse_while_stopped(qp)
        return
    context.answers.append(Acknowledge(context.expected_psn - 1 & PSN_MASK, ACK_UNLIMITED, context.msn, True))
    if moved or context.paused:
        _unpause(qp)
        if context.resume_pending:
            context.resume_deadline = None  # the partner's new place has not heard ours
            context.resume_wait = qp.config.resume_interval


def acceptable(qp: QueuePair, packet: Packet) -> bool:
    """Whether to believe a RESUME: both speak MigrOS, it is for this address, and its PSN can be true.

    The sender's first unacknowledged PSN is at most a window, and the last READ's responses, behind what is expected.
    One in RTR says what it expects: between what was acknowledged to this end and what this end has sent.
    """
    context: QpContext = qp.context
    if not qp.config.migros or context.state not in CONNECTED or not packet.ack_byte & MIGROS_CAPABLE:
        return False
    path = context.path
    if path is None or packet.addresses[len(packet.addresses) // 2 :] != path.source_ip:
        return False
    if packet.ack_byte & MIGROS_RECEIVER:
        return (packet.psn - context.una_psn & PSN_MASK) <= (context.high_psn - context.una_psn & PSN_MASK)
    reach = qp.config.window + (context.resources[-1].packets if context.resources else 0)
    return (context.expected_psn - packet.psn & PSN_MASK) <= reach
