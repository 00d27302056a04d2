"""Retries and the local ACK timeout (IBA 9.7.5.2.8, 9.7.6.1.3, 9.9.2.1).

The timeout that a program has set may be shorter than the answers take, because the other end is slow. It is doubled
then (the IBA wants a timeout between T and 4 T), and halved again when enough packets were acknowledged without one.
"""

from __future__ import annotations

from softroce_ext.transport.rc.connection import Connection
from softroce_ext.wire.headers import PSN_HALF, PSN_MASK


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
    sender = qp.sender
    sender.forget_retransmission()
    if sender.ack_timeout_now is None or qp.ack_timeout is None:
        return
    if now - sender.retransmitted_at >= sender.ack_timeout_now / 2:
        sender.set_ack_timeout(min(2 * sender.ack_timeout_now, qp.longest_ack_timeout(qp.ack_timeout)))
        sender.postpone_restore(sender.high_psn)


def restore_ack_timeout(qp: Connection) -> None:
    """Something was acknowledged while the timeout is prolonged: shorten it if that has been so for long enough."""
    sender = qp.sender
    if sender.ack_timeout_now is None or qp.ack_timeout is None:
        return
    if (sender.una_psn - sender.timeout_backoff_until_psn & PSN_MASK) < PSN_HALF:
        sender.set_ack_timeout(max(sender.ack_timeout_now / 2, qp.ack_timeout))
        sender.postpone_restore(sender.una_psn)


def start_ack_timer(qp: Connection, now: float) -> None:
    """Something is unacknowledged from now on."""
    timeout = qp.sender.ack_timeout_now
    if timeout is not None:
        qp.sender.expect_answer_by(now + timeout)
        qp.arm(now + timeout)
