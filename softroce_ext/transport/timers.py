"""When something should have happened: local ACK timeout, RNR wait, pause and RESUME (IBA 9.7.6.1.3, 9.7.5.2.8).

Each queue pair has at most one live entry in the engine's heap, for its earliest deadline. A deadline that moves away
is not taken out: the entry comes early, finds nothing due, and is entered anew.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softroce_ext.transport import migros
from softroce_ext.transport.completion import fail_oldest
from softroce_ext.transport.retry import CALM, arm, go_back, take_retry
from softroce_ext.transport.verbs import QpState, WcStatus
from softroce_ext.wire.headers import PSN_MASK

if TYPE_CHECKING:
    from softroce_ext.transport.qp import QueuePair


def on_timer(qp: QueuePair, now: float) -> None:
    """Let the deadlines that have come act, and arm the next one."""
    context = qp.context
    qp.heap_at = None
    if context.state in migros.CONNECTED and not context.stopped:
        if context.resume_pending:
            if context.resume_deadline is not None and context.resume_deadline <= now:
                migros.resume_timer(qp, now)
        elif context.paused:
            if context.pause_deadline is not None and context.pause_deadline <= now:
                migros.pause_timer(qp)
        elif context.rnr_deadline is not None:
            if context.rnr_deadline <= now:
                context.rnr_deadline = None
                qp.make_ready()
        elif context.ack_deadline is not None and context.ack_deadline <= now:
            _ack_timer(qp, now)
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
        arm(qp, min(deadlines))


def _ack_timer(qp: QueuePair, now: float) -> None:
    """Nothing was acknowledged in time."""
    context = qp.context
    context.ack_deadline = None
    if context.send_psn == context.una_psn:
        return
    qp.counters["local_ack_timeout_err"] += 1
    if not take_retry(qp):
        fail_oldest(qp, WcStatus.RETRY_EXC_ERR)
        return
    context.retry_started = False
    qp.repeated_until, qp.repeated_at = context.high_psn, now
    qp.calm_psn = context.high_psn + CALM & PSN_MASK
    go_back(qp)
