"""MigrOS: the messages and the actions of the state machine in `state.movement`.

Its rules, and the differences from the authors' proof of concept, are written above the table there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from softroce_ext.transport.interfaces import FrameSink
from softroce_ext.transport.rc.answers import flush_ack
from softroce_ext.transport.rc.connection import Connection
from softroce_ext.transport.state.movement import RESUMING_STATES, MovementAction, MovementEvent
from softroce_ext.transport.state.receiver import Acknowledge
from softroce_ext.transport.verbs import CONNECTED, QpEvent, QpState
from softroce_ext.wire import opcodes as op
from softroce_ext.wire.frame import Packet
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
from softroce_ext.wire.path import Path

# -- events of the program and of timers -------------------------------------------------------------------------------


def stop(qp: Connection) -> None:
    """Freeze this end; all that is unacknowledged stays as it is."""
    _handle(qp, MovementEvent.STOP, 0.0)


def resume(qp: Connection, path: Path | None) -> None:
    """Run again on `path`, and have RESUME sent until it is acknowledged, if the peer may understand it."""
    if path is not None:
        qp.state.move_to(path)
    announced = qp.speaks_migros or (qp.movement.resume_pending and bool(qp.capability))
    connected = qp.attributes.state in CONNECTED
    _handle(qp, MovementEvent.RESUME if connected and announced else MovementEvent.RESUME_SILENTLY, 0.0)


def resume_timer(qp: Connection, now: float) -> None:
    """A RESUME went unanswered for its time: repeat it, or give up."""
    since = qp.movement.resume_since
    if since is not None and now - since >= qp.config.resume_limit:
        _handle(qp, MovementEvent.RESUME_EXPIRED, now)
    qp.make_ready()


def pause_timer(qp: Connection, now: float) -> None:
    """No RESUME within the limit: ordinary retransmission finds out what has become of the peer."""
    _handle(qp, MovementEvent.PAUSE_EXPIRED, now)


# -- events of the wire ------------------------------------------------------------------------------------------------


def pause(qp: Connection, psn: int, now: float) -> None:
    """NAK_STOPPED for `psn`. No completion, no error, no retry spent."""
    qp.counters["rcvd_nak_stopped"] += 1
    qp.movement.pause_psn = psn
    _handle(qp, MovementEvent.NAK_STOPPED, now)


def acknowledged_while_paused(qp: Connection, now: float) -> None:
    """Something was acknowledged: if it is what the peer had refused, the peer runs again."""
    if (qp.sender.una_psn - qp.movement.pause_psn - 1 & PSN_MASK) < PSN_MASK // 2:
        _handle(qp, MovementEvent.REFUSED_EXECUTED, now)


def resume_answer(qp: Connection, packet: Packet, now: float) -> bool:
    """Look at an ACKNOWLEDGE while a RESUME is unanswered. Returns whether the packet is done with."""
    sender = qp.sender
    outstanding = sender.high_psn - sender.una_psn & PSN_MASK
    executed = packet.psn + 1 - sender.una_psn & PSN_MASK
    syndrome = packet.raw[packet.headers_at]
    receiver = qp.attributes.state == QpState.RTR  # no PSN of its own to compare with, nothing to be acknowledged
    if packet.ack_byte & MIGROS_RESUMED and syndrome & AETH_KIND == AETH_ACK and (receiver or executed <= outstanding):
        _handle(qp, MovementEvent.RESUME_ACKED, now)
        return receiver  # it acknowledges like any other
    if syndrome == NAK_STOPPED and (receiver or (packet.psn - sender.una_psn & PSN_MASK) <= outstanding):
        # The peer is being moved too and will send a RESUME; this end's is repeated, since the new place must hear it.
        pause(qp, packet.psn, now)
        return True
    if receiver:
        qp.counters["refused_state"] += 1
    return receiver


def receive_resume(qp: Connection, packet: Packet, now: float) -> None:
    """A RESUME that `acceptable` let through: its source is where the peer is now."""
    attributes, movement = qp.attributes, qp.movement
    path = attributes.path
    assert path is not None
    qp.counters["rcvd_resume"] += 1
    moved = packet.source_ip != path.destination_ip or packet.source_mac != path.destination_mac
    if moved:
        new = path.replace(destination_ip=packet.source_ip, destination_mac=packet.source_mac)
        attributes.replace_path(new)
        qp.engine.peer_moved(attributes.destination_qpn, path.destination_ip, new)
    movement.peer_resumed_at = now
    movement.heard()
    qp.receiver.ask_again()
    flush_ack(qp)
    _handle(qp, MovementEvent.PEER_MOVED if moved else MovementEvent.PEER_RESUMED, now)


def acceptable(qp: Connection, packet: Packet) -> bool:
    """Whether to believe a RESUME: both ends speak MigrOS, it is for this address, and its PSN can be true.

    The sender's first unacknowledged PSN is at most a window, and the last READ's responses, behind what is expected.
    One in RTR says what it expects: between what was acknowledged to this end and what this end has sent.
    """
    attributes, sender, receiver = qp.attributes, qp.sender, qp.receiver
    if not qp.config.migros or attributes.state not in CONNECTED or not packet.ack_byte & MIGROS_CAPABLE:
        return False
    path = attributes.path
    if path is None or packet.destination_ip != path.source_ip:
        return False
    if packet.ack_byte & MIGROS_RECEIVER:
        return (packet.psn - sender.una_psn & PSN_MASK) <= (sender.high_psn - sender.una_psn & PSN_MASK)
    reach = qp.config.window + (receiver.resources[-1].packets if receiver.resources else 0)
    return (receiver.expected_psn - packet.psn & PSN_MASK) <= reach


# -- sending -----------------------------------------------------------------------------------------------------------


def transmit(qp: Connection, now: float, sink: FrameSink) -> int:
    """The turn of a queue pair that is Paused or Resuming: RESUME if it is due; returns the number of frames."""
    movement = qp.movement
    if movement.state in RESUMING_STATES:
        return _send_resume(qp, now, sink)
    if movement.pause_deadline is None:  # it was restored in this state
        movement.pause_deadline = now + qp.config.pause_limit
        qp.arm(movement.pause_deadline)
    return 0


def _send_resume(qp: Connection, now: float, sink: FrameSink) -> int:
    attributes, movement = qp.attributes, qp.movement
    if movement.resume_deadline is not None and now < movement.resume_deadline:
        return 0
    if movement.resume_since is None:
        movement.resume_since = now
    ack_byte, psn = ACK_REQ | qp.capability, qp.sender.una_psn
    if attributes.state == QpState.RTR:  # perftest's servers stay there
        ack_byte, psn = ack_byte | MIGROS_RECEIVER, qp.receiver.expected_psn
    headers = BTH_AETH.pack(
        op.RESUME << 24 | PKEY_DEFAULT, attributes.destination_qpn, ack_byte << 24 | psn,
        ACK_UNLIMITED << 24 | qp.receiver.msn,
    )  # fmt: skip
    assert attributes.path is not None
    sink.add(attributes.path, headers, b"", 0)
    qp.counters["sent_resume"] += 1
    movement.resume_deadline = now + movement.resume_wait
    movement.resume_wait = min(2 * movement.resume_wait, qp.config.resume_interval_limit)
    qp.arm(movement.resume_deadline)
    return 1


def refuse_while_stopped(qp: Connection) -> None:
    """A request reached a Stopped end: the peer is told, if it understands that."""
    if not qp.speaks_migros:
        return
    flush_ack(qp)
    receiver = qp.receiver
    last = receiver.answers[-1] if receiver.answers else None
    if isinstance(last, Acknowledge) and last.syndrome == NAK_STOPPED:
        return  # one in a batch is enough
    qp.counters["sent_nak_stopped"] += 1
    receiver.nak(receiver.expected_psn, NAK_STOPPED)


# -- the actions of the table ------------------------------------------------------------------------------------------


def _handle(qp: Connection, event: MovementEvent, now: float) -> None:
    for action in qp.movement.handle(event):
        _PERFORM[action](qp, now)


def _freeze(qp: Connection, _: float) -> None:
    qp.sender.stop_timers()
    qp.movement.resume_deadline = None


def _keep_announcing(qp: Connection, _: float) -> None:
    qp.movement.request_announcement()


def _thaw(qp: Connection, _: float) -> None:
    movement, receiver = qp.movement, qp.receiver
    movement.announce = False
    movement.pause_deadline = None
    receiver.ask_again()
    receiver.withdraw_answers(NAK_STOPPED)  # no longer true
    qp.sender.refresh_retries(qp.attributes)
    qp.sender.forget_retransmission()  # the time in which it was frozen says nothing about the path
    qp.go_back()


def _announce(qp: Connection, _: float) -> None:
    qp.movement.resume_since = None
    _repeat(qp, 0.0)


def _confirm(qp: Connection, now: float) -> None:
    movement = qp.movement
    movement.resume_deadline = movement.resume_since = None
    movement.resume_acked_at = now
    qp.counters["resume_acked"] += 1


def _give_up(qp: Connection, _: float) -> None:
    qp.movement.resume_deadline = None
    if qp.movement.peer_migros:
        qp.counters["resume_exceeded_err"] += 1
        qp.enter_error(None, QpEvent.QP_FATAL)


def _wait(qp: Connection, now: float) -> None:
    qp.movement.resume_since = now


def _pause(qp: Connection, now: float) -> None:
    # Pause for a moment only on a NAK_STOPPED just after a RESUME, which may have overtaken it, and when nothing was
    # ever acknowledged: if the peer has heard of this end after its dump only, its new place sends no RESUME.
    movement, config = qp.movement, qp.config
    resumed = movement.peer_resumed_at
    doubtful = resumed is not None and 0 <= now - resumed < config.stale_stop_limit
    doubtful = doubtful or qp.sender.una_psn == qp.attributes.sq_psn
    movement.pause_deadline = now + (config.stale_stop_pause if doubtful else config.pause_limit)
    qp.arm(movement.pause_deadline)
    qp.sender.end_rnr_wait()
    qp.go_back()


def _expire(qp: Connection, _: float) -> None:
    qp.counters["pause_exceeded"] += 1


def _restart(qp: Connection, _: float) -> None:
    qp.movement.pause_deadline = None
    qp.sender.refresh_retries(qp.attributes)  # the wait of an RNR NAK that came meanwhile has passed unseen
    qp.go_back()


def _acknowledge(qp: Connection, _: float) -> None:
    receiver = qp.receiver
    receiver.answer(receiver.expected_psn - 1 & PSN_MASK, ACK_UNLIMITED, resumed=True)


def _refuse(qp: Connection, _: float) -> None:
    refuse_while_stopped(qp)


def _repeat(qp: Connection, _: float) -> None:
    qp.movement.resume_deadline = None
    qp.movement.resume_wait = qp.config.resume_interval


def _clear(_: Connection, __: float) -> None:
    """Done by `Movement.fail`, which every service needs."""


_PERFORM: Final[dict[MovementAction, Callable[[Connection, float], None]]] = {
    MovementAction.FREEZE: _freeze,
    MovementAction.KEEP_ANNOUNCING: _keep_announcing,
    MovementAction.THAW: _thaw,
    MovementAction.ANNOUNCE: _announce,
    MovementAction.CONFIRM: _confirm,
    MovementAction.GIVE_UP: _give_up,
    MovementAction.WAIT: _wait,
    MovementAction.PAUSE: _pause,
    MovementAction.EXPIRE: _expire,
    MovementAction.RESTART: _restart,
    MovementAction.ACKNOWLEDGE: _acknowledge,
    MovementAction.REFUSE: _refuse,
    MovementAction.REPEAT: _repeat,
    MovementAction.CLEAR: _clear,
}
