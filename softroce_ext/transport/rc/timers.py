"""What happens when a deadline has come: local ACK timeout, RNR wait, pause and RESUME (IBA 9.7.6.1.3, 9.7.5.2.8).

Each queue pair has at most one live entry in the engine's heap, for its earliest deadline. A deadline that is postponed
is not taken out: the entry comes early, finds nothing due, and is entered again.
"""

from __future__ import annotations

from softroce_ext.transport.rc import movement
from softroce_ext.transport.rc.connection import Connection
from softroce_ext.transport.rc.retry import take_retry
from softroce_ext.transport.state.movement import MovementState
from softroce_ext.transport.verbs import CONNECTED, QpState, WcStatus


def on_timer(qp: Connection, now: float) -> None:
    """Let the deadline that counts act if it has come, and arm the next one."""
    qp.heap_at = None
    if qp.attributes.state in CONNECTED:
        match qp.movement.state:
            case MovementState.RESUMING | MovementState.RESUMING_PAUSED:
                if _due(qp.movement.resume_deadline, now):
                    qp.observe_timer("resume")
                    movement.resume_timer(qp, now)
            case MovementState.PAUSED:
                if _due(qp.movement.pause_deadline, now):
                    qp.observe_timer("pause")
                    movement.pause_timer(qp, now)
            case MovementState.RUNNING:
                _retransmission_timer(qp, now)
    if qp.movement.stopped or qp.attributes.state == QpState.ERR:
        return
    later = [when for when in (*qp.retransmission_deadlines(), *qp.movement_deadlines()) if when > now]
    if later:
        qp.arm(min(later))


def _due(deadline: float | None, now: float) -> bool:
    return deadline is not None and deadline <= now


def _retransmission_timer(qp: Connection, now: float) -> None:
    """While the receiver is not ready, only the end of that wait counts."""
    sender = qp.sender
    if sender.rnr_deadline is not None:
        if _due(sender.rnr_deadline, now):
            qp.observe_timer("rnr")
            sender.end_rnr_wait()
            qp.make_ready()
    elif _due(sender.ack_deadline, now):
        qp.observe_timer("ack")
        _ack_timer(qp, now)


def _ack_timer(qp: Connection, now: float) -> None:
    """Nothing was acknowledged in time."""
    sender = qp.sender
    if not sender.expire_ack_timer():
        return
    qp.counters["local_ack_timeout_err"] += 1
    if not take_retry(qp):
        qp.fail_oldest(WcStatus.RETRY_EXC_ERR)
        return
    sender.begin_timeout_retry(now)
    qp.go_back()
