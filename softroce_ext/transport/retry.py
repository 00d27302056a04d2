"""Going back to the first unacknowledged PSN, how often, and the clock that asks for it (IBA 9.7.5.2.8, 9.9.2.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from softroce_ext.wire.headers import PSN_HALF, PSN_MASK

if TYPE_CHECKING:
    from softroce_ext.transport.qp import QueuePair

INFINITE = 7
"""Retry count without end."""


def go_back(qp: QueuePair) -> None:
    """Send again from the first unacknowledged PSN on."""
    context = qp.context
    context.send_psn = context.una_psn
    context.cursor = 0
    context.reads_out = 0
    context.ack_deadline = None
    qp.make_ready()


def take_retry(qp: QueuePair) -> bool:
    """Spend one retry; False when there is none left."""
    context = qp.context
    if context.retry_cnt != INFINITE:
        if context.retry_left == 0:
            qp.counters["retry_exceeded_err"] += 1
            return False
        context.retry_left -= 1
    qp.counters["completer_retry_err"] += 1
    return True


CALM: Final = 4096
"""Packets that must be acknowledged without a timeout until a prolonged one is shortened again."""


def answered_twice(qp: QueuePair, now: float) -> None:
    """What was sent again after a timeout has been answered once more. If that took long, the timeout was too short.

    A quick second answer says nothing: rxe answers each packet that comes twice, so if an ACK was lost, all the packets
    of its message are answered at once.
    """
    qp.repeated_until = -1
    if qp.ack_wait is None or qp.ack_timeout is None:
        return
    if now - qp.repeated_at >= qp.ack_wait / 2:
        longest = min(4 * qp.ack_timeout, max(qp.ack_timeout, qp.config.ack_patience))
        qp.ack_wait = min(2 * qp.ack_wait, longest)
        qp.calm_psn = qp.context.high_psn + CALM & PSN_MASK


def calm_down(qp: QueuePair) -> None:
    """Something was acknowledged while timeouts are prolonged."""
    una = qp.context.una_psn
    if (una - qp.calm_psn & PSN_MASK) < PSN_HALF and qp.ack_wait is not None and qp.ack_timeout is not None:
        qp.ack_wait = max(qp.ack_wait / 2, qp.ack_timeout)
        qp.calm_psn = una + CALM & PSN_MASK


def start_ack_timer(qp: QueuePair, now: float) -> None:
    """Something is unacknowledged from now on."""
    if qp.ack_wait is not None:
        qp.context.ack_deadline = now + qp.ack_wait
        arm(qp, qp.context.ack_deadline)


def arm(qp: QueuePair, when: float) -> None:
    """Have `on_timer` called at `when` (or before)."""
    if qp.heap_at is None or when < qp.heap_at:
        qp.heap_at = when
        qp.engine.push_timer(when, qp)
