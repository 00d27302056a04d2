"""Retries and the local ACK timeout (IBA 9.7.5.2.8, 9.7.6.1.3, 9.9.2.1).

The timeout that a program has set may be shorter than the answers take, because the other end is slow. It is doubled
then (the IBA wants a timeout between T and 4 T), and halved again when enough packets were acknowledged without one.
"""

from __future__ import annotations

from typing import Final

from softroce_ext.transport.rc.connection import Connection
from softroce_ext.wire.headers import PSN_HALF, PSN_MASK

BACKOFF_PACKETS: Final = 4096
"""Packets that must be acknowledged without a timeout before a prolonged one is shortened again."""


def take_retry(qp: Connection) -> bool:
    """Spend one retry; False when none is left."""
    if not qp.sender.take_retry(qp.attributes.retry_cnt):
        qp.counters["retry_exceeded_err"] += 1
        return False
    qp.counters["completer_retry_err"] += 1
    return True


def on_late_duplicate_ack(qp: Connection, now: float) -> None:
    """What was retransmitted after a timeout is acknowledged once more. If that took long, the timeout was too short.

    A second ACK that comes at once says nothing: rxe answers each duplicate packet, so after the loss of an ACK all the
    packets of its message are answered.
    """
    qp.repeated_until = -1
    if qp.ack_wait is None or qp.ack_timeout is None:
        return
    if now - qp.repeated_at >= qp.ack_wait / 2:
        longest = min(4 * qp.ack_timeout, max(qp.ack_timeout, qp.config.ack_patience))
        qp.ack_wait = min(2 * qp.ack_wait, longest)
        qp.calm_psn = qp.sender.high_psn + BACKOFF_PACKETS & PSN_MASK


def restore_ack_timeout(qp: Connection) -> None:
    """Something was acknowledged while the timeout is prolonged: shorten it if that has been so for long enough."""
    una = qp.sender.una_psn
    if (una - qp.calm_psn & PSN_MASK) < PSN_HALF and qp.ack_wait is not None and qp.ack_timeout is not None:
        qp.ack_wait = max(qp.ack_wait / 2, qp.ack_timeout)
        qp.calm_psn = una + BACKOFF_PACKETS & PSN_MASK


def start_ack_timer(qp: Connection, now: float) -> None:
    """Something is unacknowledged from now on."""
    if qp.ack_wait is not None:
        deadline = now + qp.ack_wait
        qp.sender.expect_answer_by(deadline)
        qp.arm(deadline)
