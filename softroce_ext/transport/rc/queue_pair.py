"""A reliable connection: gives each packet, each turn and each timer to the role that it concerns."""

from __future__ import annotations

from softroce_ext.transport.interfaces import FrameSink
from softroce_ext.transport.rc import answers, completer, in_order, movement, requester, responder, timers
from softroce_ext.transport.rc.connection import Connection
from softroce_ext.transport.state.movement import RESUMING_STATES, STOPPED_STATES
from softroce_ext.transport.verbs import CONNECTED, QpState
from softroce_ext.wire import opcodes as op
from softroce_ext.wire.frame import Packet
from softroce_ext.wire.headers import MIGROS_CAPABLE, PKEY_MASK, PKEY_PARTITION
from softroce_ext.wire.opcodes import FLAGS, OpFlag
from softroce_ext.wire.path import Path

_REQUEST = int(OpFlag.REQUEST)
_RESUME = int(OpFlag.RESUME)
_RTR, _RTS, _SQD, _ERR = int(QpState.RTR), int(QpState.RTS), int(QpState.SQD), int(QpState.ERR)
_RTS_SQD = frozenset({_RTS, _SQD})


class RcQueuePair(Connection):
    """An RC queue pair."""

    __slots__ = ()

    # -- what the device calls -------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Become Stopped: send no request, take no answer; requests get NAK_STOPPED (from a stock peer: silence)."""
        movement.stop(self)
        in_order.forget(self)

    def resume(self, path: Path | None = None) -> None:
        """Leave Stopped, and have RESUME sent over `path` (None: the path it has) until it is acknowledged.

        No RESUME is sent when the peer is not known to speak MigrOS, or the queue pair is not in RTR, RTS or SQD.
        """
        movement.resume(self, path)

    @property
    def resume_settled(self) -> bool:
        """No RESUME is waiting for an answer, or the peer is itself stopped, or is not known to speak MigrOS."""
        return not self.movement.resume_pending or self.movement.paused or not self.movement.peer_migros

    def reset(self) -> None:
        super().reset()
        in_order.forget(self)

    # -- what the engine calls -------------------------------------------------------------------------------------

    def receive(self, packet: Packet, now: float) -> None:
        """HOT. Take a packet that names this queue pair."""
        attributes, receiver = self.attributes, self.receiver
        counters = self.counters
        flags = FLAGS[packet.opcode]
        path = attributes.path
        if packet.opcode >= op.UC or attributes.state not in CONNECTED or path is None:
            counters["refused_state"] += 1
            return
        if packet.first_word & PKEY_MASK != PKEY_PARTITION:
            counters["refused_pkey"] += 1
            return
        if flags & _RESUME:
            if not movement.acceptable(self, packet):
                counters["refused_resume"] += 1
                return
        elif packet.addresses != path.answers_from:
            counters["refused_address"] += 1
            return
        if packet.ack_byte & MIGROS_CAPABLE and self.capability and not self.movement.peer_migros:
            self.movement.heard()
        if not self.touched:
            self.touched = True
            self.batch_psn = receiver.expected_psn
            self.engine.touched.append(self)
        if flags & _REQUEST:
            if not (receiver.answers or self.held) or not in_order.waits(self, packet, flags):
                responder.receive_request(self, packet, flags, now)
        elif attributes.state in _RTS_SQD or self.movement.resume_pending:
            completer.receive_answer(self, packet, flags, now)
        else:
            counters["refused_state"] += 1

    def transmit(self, now: float, sink: FrameSink, budget: int) -> int:
        """HOT. Send up to `budget` frames; returns how many. `more` says whether there would have been more."""
        self.more = False
        state, moving = self.attributes.state, self.movement.state
        sent = 0
        if self.receiver.answers:
            sent = answers.send_answers(self, sink, budget)
            state, moving = (
                self.attributes.state,
                self.movement.state,
            )  # a READ whose memory is gone ends the connection
        if state in _RTS_SQD or (state == _RTR and moving in RESUMING_STATES):
            if moving in STOPPED_STATES:
                return sent
            if sent >= budget:
                self.more = True  # requests may wait, and nothing else would ask for their turn
                return sent
            if moving:
                return sent + movement.transmit(self, now, sink)
            if self.sender.rnr_deadline is None:
                sent += requester.send_requests(self, now, sink, budget - sent)
        elif state == _ERR:
            self.flush()
        return sent

    def end_of_batch(self) -> None:
        """HOT. The batch's writes are in memory: queue its ACK; forget what was resolved."""
        self.touched = False
        if self.ack_pending:
            answers.flush_ack(self)
        self.forget_targets()
        self.make_ready()

    def on_timer(self, now: float) -> None:
        timers.on_timer(self, now)

    def release_held(self, now: float) -> bool:
        return in_order.release(self, now)

    def forget_held(self) -> None:
        in_order.forget(self)

    def completion_lost(self, psn: int, msn: int) -> None:
        answers.withhold(self, psn, msn)
        self.enter_error(None, None)

    def memory_gone(self, as_responder: bool) -> None:
        if as_responder:
            answers.refuse_batch(self)
        else:
            self.enter_error(None, None)

    def no_receive(self, psn: int) -> None:
        answers.answer_not_ready(self, psn)
