"""Unreliable connections (IBA 9.8): messages as RC's SENDs and WRITEs, but nothing is acknowledged or retransmitted.

A request is complete when its last packet has left. The responder takes a message only whole and in order: one that
misses a packet is dropped without an answer, and the next FIRST or ONLY begins a new message, whatever its PSN (IBA
9.8.2.2.3; rxe drops that message too). A receive that a cut-off SEND had taken serves the next message.
"""

from __future__ import annotations

from typing import ClassVar

from softroce_ext.transport.interfaces import FrameSink, MemoryFault, ProtectionError
from softroce_ext.transport.queue_pair import QueuePair
from softroce_ext.transport.reassembly import RequestFault, execute_send, execute_write
from softroce_ext.transport.segmentation import admit, local_operation, send_data
from softroce_ext.transport.state.movement import STOPPED_STATES
from softroce_ext.transport.verbs import CONNECTED, QpState, WcStatus, WrOpcode
from softroce_ext.wire import opcodes as op
from softroce_ext.wire.frame import Packet
from softroce_ext.wire.headers import NAK_REMOTE_OPERATIONAL, PKEY_MASK, PKEY_PARTITION, PSN_MASK
from softroce_ext.wire.opcodes import FLAGS, TRANSPORT_MASK, OpFlag

_RTS = int(QpState.RTS)
_START, _WRITE = int(OpFlag.START), int(OpFlag.WRITE)


class UcQueuePair(QueuePair):
    """A UC queue pair."""

    __slots__ = ()

    service: ClassVar[int] = op.UC

    def receive(self, packet: Packet, now: float) -> None:
        """HOT. Take a packet that names this queue pair."""
        attributes, counters = self.attributes, self.counters
        path = attributes.path
        if packet.opcode & TRANSPORT_MASK != op.UC or attributes.state not in CONNECTED or path is None:
            counters["refused_state"] += 1
            return
        if packet.first_word & PKEY_MASK != PKEY_PARTITION:
            counters["refused_pkey"] += 1
            return
        if packet.addresses != path.answers_from:
            counters["refused_address"] += 1
            return
        if self.movement.state in STOPPED_STATES:
            counters["dropped_stopped"] += 1
            return
        if not self.touched:
            self.touched = True
            self.engine.touched.append(self)
        self._take(packet, now)

    def _take(self, packet: Packet, now: float) -> None:
        """HOT. One packet of a message: execute it if it is the very next one, or begins a message."""
        receiver = self.receiver
        flags = FLAGS[packet.opcode]
        if flags & _START:
            if receiver.message:
                self.counters["dropped_incomplete"] += 1
                receiver.abandon_message()
        elif not receiver.message or packet.psn != receiver.expected_psn:
            self._drop("dropped_out_of_sequence")
            return
        try:
            if flags & _WRITE:
                done = execute_write(self, packet, flags, now)
            else:
                done = execute_send(self, packet, flags, now)
        except RequestFault as fault:
            if fault.syndrome == NAK_REMOTE_OPERATIONAL:  # this side's own fault: its receive, its memory
                self.enter_error(fault.receive_status, fault.event)
            else:
                self._drop("dropped_invalid_request")
        else:
            receiver.expect(packet.psn + 1 & PSN_MASK)
            if not done:
                receiver.abandon_message()

    def _drop(self, counter: str) -> None:
        """Forget the message in progress; its other packets will be dropped as they come."""
        self.counters[counter] += 1
        self.receiver.abandon_message()
        self.write_target = None

    def transmit(self, now: float, sink: FrameSink, budget: int) -> int:
        """HOT. Send up to `budget` frames; returns how many. `more` says whether there would have been more."""
        if not self.may_send():
            return 0
        attributes, sender = self.attributes, self.sender
        sent = 0
        while sent < budget:
            if sender.inflight:
                record = sender.inflight[0]
            else:
                wqe = self.fetch_send() if attributes.state == _RTS else None
                if wqe is None:
                    break
                record = admit(sender, attributes, wqe)
                if wqe.opcode == WrOpcode.SEND_WITH_INV:  # UC has no such opcode
                    record.status = WcStatus.LOC_QP_OP_ERR
            if record.status:
                self.settle(now)
                return sent
            if record.packets == 0:
                local_operation(self, record, now)
                budget -= 1  # it sends nothing, but a program may post them without end
                continue
            try:
                sent += send_data(self, record, sink, budget - sent)
            except (ProtectionError, MemoryFault, ValueError):
                record.status = WcStatus.LOC_PROT_ERR
                self.settle(now)
                return sent
            sender.expect_no_answer()
            if sender.cursor:
                self.retire_oldest(now)
        else:
            self.more = True
        if sender.sq_draining:
            self.check_drained()
        return sent
