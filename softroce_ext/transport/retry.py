"""Going back to the first unacknowledged PSN, how often, and the clock that asks for it (IBA 9.7.5.2.8, 9.9.2.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

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


def start_ack_timer(qp: QueuePair, now: float) -> None:
    """Something is unacknowledged from now on."""
    if qp.ack_timeout is not None:
        qp.context.ack_deadline = now + qp.ack_timeout
        arm(qp, qp.context.ack_deadline)


def arm(qp: QueuePair, when: float) -> None:
    """Have `on_timer` called at `when` (or before)."""
    if qp.heap_at is None or when < qp.heap_at:
        qp.heap_at = when
        qp.engine.push_timer(when, qp)
