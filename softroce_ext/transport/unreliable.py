"""Unreliable connections (IBA 9.8): messages as RC's SENDs and WRITEs, but nothing is acknowledged or sent again.

A request is complete when its last packet has left. The responder takes a message only whole and in order: one that
misses a packet is dropped in silence, and the next FIRST or ONLY begins anew, whatever its PSN (IBA 9.8.2.2.3; rxe
drops that message too). A receive that a cut-off SEND had taken serves the next message.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from softroce_ext.transport import completion, migros, requester, responder
from softroce_ext.transport.answers import RequestFault
from softroce_ext.transport.interfaces import MemoryFault, ProtectionError
from softroce_ext.transport.qp import QueuePair
from softroce_ext.transport.verbs import QpState, QpType, WcStatus, WrOpcode
from softroce_ext.wire import opcodes as op
from softroce_ext.wire.frame import Packet
from softroce_ext.wire.headers import NAK_REMOTE_OPERATIONAL, PKEY_PARTITION, PSN_MASK
from softroce_ext.wire.opcodes import FLAGS, OpFlag

if TYPE_CHECKING:
    from softroce_ext.transport.engine import FrameSink

_RTS = int(QpState.RTS)
_START, _WRITE = int(OpFlag.START), int(OpFlag.WRITE)


class UnreliableQueuePair(QueuePair, qp_type=QpType.UC):
    """A UC queue pair."""

    __slots__ = ()

    service: ClassVar[int] = op.UC
    ack_request: ClassVar[int] = 0
    announces_migros: ClassVar[bool] = False

    def receive(self, packet: Packet, now: float) -> None:
        """HOT. Take a packet that names this queue pair."""
        context = self.context
        counters = self.counters
        path = context.path
        if packet.opcode & 0xE0 != op.UC or context.state not in migros.CONNECTED or path is None:
            counters["refused_state"] += 1
            return
        if packet.first_word & 0x7FFF != PKEY_PARTITION:
            counters["refused_pkey"] += 1
            return
        if packet.addresses != path.answers_from:
            counters["refused_address"] += 1
            return
        if context.stopped:
            counters["dropped_stopped"] += 1
            return
        if not self.touched:
            self.touched = True
            self.batch_psn = context.expected_psn
            self.engine.touched.append(self)
        self._message(packet, now)

    def _message(self, packet: Packet, now: float) -> None:
        context = self.context
        flags = FLAGS[packet.opcode]
        if flags & _START:
            if context.message:
                self.counters["dropped_incomplete"] += 1
                context.message = 0
        elif not context.message or packet.psn != context.expected_psn:
            self._drop("dropped_out_of_sequence")
            return
        try:
            if flags & _WRITE:
                done = responder.write(self, packet, flags, now)
            else:
                done = responder.send(self, packet, flags, now)
        except RequestFault as fault:
            if fault.syndrome == NAK_REMOTE_OPERATIONAL:  # this side's own fault: its receive, its memory
                completion.enter_error(self, fault.receive_status, fault.event)
            else:
                self._drop("dropped_invalid_request")
        else:
            context.expected_psn = packet.psn + 1 & PSN_MASK
            if not done:
                context.message = 0

    def _drop(self, counter: str) -> None:
        """Forget the message in progress; its other packets will be dropped as they come."""
        self.counters[counter] += 1
        self.context.message = 0
        self.write_target = None

    def transmit(self, now: float, sink: FrameSink, budget: int) -> int:
        """HOT. Send up to `budget` frames; returns how many. `more` says whether there would have been more."""
        context = self.context
        if not completion.may_send(self):
            return 0
        sent = 0
        while sent < budget:
            if context.inflight:
                record = context.inflight[0]
            else:
                wqe = self.send_queue.fetch() if context.state == _RTS else None
                if wqe is None:
                    break
                record = requester.admit(context, wqe)
                if wqe.opcode == WrOpcode.SEND_WITH_INV:  # UC has no such opcode
                    record.status = WcStatus.LOC_QP_OP_ERR
            if record.status:
                completion.settle(self, now)
                return sent
            if record.packets == 0:
                requester.local_operation(self, record, now)
                budget -= 1  # it sends nothing, but a program may post them for ever
                continue
            try:
                sent += requester.send_data(self, record, sink, budget - sent)
            except (ProtectionError, MemoryFault, ValueError):
                record.status = WcStatus.LOC_PROT_ERR
                completion.settle(self, now)
                return sent
            context.una_psn = context.send_psn
            if context.cursor:
                completion.retire_oldest(self, now)
        else:
            self.more = True
        if context.sq_draining:
            completion.check_drained(self)
        return sent
