"""Unreliable datagrams (IBA 9.8.3): one packet is one message, to and from any queue pair that knows the Q_Key.

The first 40 bytes of a receive are the GRH: the packet's own IPv6 header, or 20 zeros and its IPv4 header. A datagram
that finds no receive, or one too short, is dropped without an answer.
"""

from __future__ import annotations

from typing import Any, ClassVar

from softroce_ext.transport.interfaces import FrameSink, MemoryFault, ProtectionError, SendWqe
from softroce_ext.transport.queue_pair import QueuePair
from softroce_ext.transport.reassembly import fetch_receive
from softroce_ext.transport.scatter import scatter
from softroce_ext.transport.segmentation import message_data
from softroce_ext.transport.state.movement import STOPPED_STATES
from softroce_ext.transport.verbs import (
    CONNECTED,
    QpEvent,
    QpState,
    SendFlag,
    WcFlag,
    WcOpcode,
    WcStatus,
    WrOpcode,
)
from softroce_ext.wire import opcodes as op
from softroce_ext.wire.frame import Packet, datagram_source_port
from softroce_ext.wire.headers import (
    BTH_DETH,
    BTH_DETH_IMM,
    DETH,
    PAD_SHIFT,
    PKEY_DEFAULT,
    PKEY_MASK,
    PKEY_PARTITION,
    QKEY_PRIVILEGED,
    SOLICITED,
)
from softroce_ext.wire.opcodes import TRANSPORT_MASK
from softroce_ext.wire.path import Path

GRH_BYTES = 40

_OPCODES = {int(WrOpcode.SEND): op.UD | op.SEND_ONLY, int(WrOpcode.SEND_WITH_IMM): op.UD | op.SEND_ONLY_IMM}
_RTS = int(QpState.RTS)
_WITH_IMM = int(WrOpcode.SEND_WITH_IMM)
_MAX_PATHS = 1024


class UdQueuePair(QueuePair):
    """A UD queue pair."""

    __slots__ = ("_paths",)

    service: ClassVar[int] = op.UD

    def __init__(self, *parts: Any) -> None:
        """As `QueuePair`."""
        super().__init__(*parts)
        self._paths: dict[int, tuple[Path, Path]] = {}
        """By address handle: its path, and the same with this queue pair's UDP source port."""

    # -- receiving -------------------------------------------------------------------------------------------------

    def receive(self, packet: Packet, now: float) -> None:
        """HOT. Take a packet that names this queue pair, or a multicast group that it is in."""
        attributes, receiver, counters = self.attributes, self.receiver, self.counters
        if packet.opcode & TRANSPORT_MASK != op.UD or attributes.state not in CONNECTED:
            counters["refused_state"] += 1
            return
        if packet.first_word & PKEY_MASK != PKEY_PARTITION:
            counters["refused_pkey"] += 1
            return
        qkey, source = DETH.unpack_from(packet.raw, packet.headers_at)
        if qkey != attributes.qkey:
            counters["refused_qkey"] += 1
            return
        if self.movement.state in STOPPED_STATES:
            counters["dropped_stopped"] += 1
            return
        if receiver.recv_wqe is None and not fetch_receive(self, packet.psn):
            return
        receive = receiver.recv_wqe
        payload = packet.payload
        if receive is None or GRH_BYTES + len(payload) > receive.length or len(payload) > self.engine.port_mtu:
            counters["dropped_length"] += 1
            return  # the receive stays for the next datagram
        if not self.touched:
            self.touched = True
            self.engine.touched.append(self)
        try:
            segments = self.resolve_for_writing(receive.sges, True)
            scatter(segments, 0, memoryview(packet.grh()))
            if payload:
                scatter(segments, GRH_BYTES, payload)
        except (ProtectionError, MemoryFault):
            self.enter_error(WcStatus.LOC_QP_OP_ERR, QpEvent.QP_FATAL)
            return
        imm, flags = 0, 0
        if packet.opcode == op.UD | op.SEND_ONLY_IMM:
            at = packet.headers_at + DETH.size
            imm, flags = int.from_bytes(packet.raw[at : at + 4], "little"), int(WcFlag.WITH_IMM)
        receiver.release_receive()
        self.complete_receive(
            now, receive, WcOpcode.RECV, GRH_BYTES + len(payload), imm, flags,
            packet.first_word & SOLICITED != 0, source & 0xFFFFFF,
        )  # fmt: skip

    # -- sending ---------------------------------------------------------------------------------------------------

    def transmit(self, now: float, sink: FrameSink, budget: int) -> int:
        """HOT. Send up to `budget` datagrams; returns how many. `more` says whether there would have been more."""
        if not self.may_send():
            return 0
        sender = self.sender
        sent = 0
        while sent < budget:
            wqe = self.fetch_send() if self.attributes.state == _RTS else None
            if wqe is None:
                break
            record = sender.admit(wqe, 0)  # it gets a PSN only if it is sent
            record.status = self._send(wqe, sink)
            if record.status:
                self.settle(now)
                return sent
            sent += 1
            self.retire_oldest(now)
        else:
            self.more = True
        if sender.sq_draining:
            self.check_drained()
        return sent

    def _send(self, wqe: SendWqe, sink: FrameSink) -> int:
        """HOT. Send one datagram; returns 0 or the WcStatus with which it failed."""
        attributes = self.attributes
        opcode = _OPCODES.get(wqe.opcode)
        if opcode is None or wqe.destination is None:
            return WcStatus.LOC_QP_OP_ERR
        if wqe.length > self.engine.port_mtu:
            return 0  # no packet and no error (IBA C10-93.1.1)
        ah_number, remote, qkey = wqe.destination
        if qkey & QKEY_PRIVILEGED:
            qkey = attributes.qkey
        try:
            path = self._path(ah_number)
        except ProtectionError:
            return WcStatus.LOC_QP_OP_ERR
        try:
            data = message_data(self.pd, wqe, 0, wqe.length)
        except (ProtectionError, MemoryFault, ValueError):
            return WcStatus.LOC_PROT_ERR
        pad = -wqe.length & 3
        first = opcode << 24 | pad << PAD_SHIFT | PKEY_DEFAULT
        if wqe.flags & SendFlag.SOLICITED:
            first |= SOLICITED
        psn, qpn = self.sender.take_psn(), attributes.qpn
        if wqe.opcode == _WITH_IMM:
            headers = BTH_DETH_IMM.pack(first, remote & 0xFFFFFF, psn, qkey, qpn, wqe.imm.to_bytes(4, "little"))
        else:
            headers = BTH_DETH.pack(first, remote & 0xFFFFFF, psn, qkey, qpn)
        sink.add(path, headers, data, pad)
        return 0

    def _path(self, ah_number: int) -> Path:
        """An address handle's path with this queue pair's UDP source port. Raises ProtectionError."""
        base = self.pd.address(ah_number)
        known = self._paths.get(ah_number)
        if known is not None and known[0] is base:
            return known[1]
        if len(self._paths) >= _MAX_PATHS:
            self._paths.clear()
        path = base.replace(udp_source_port=datagram_source_port(self.attributes.qpn))
        self._paths[ah_number] = base, path
        return path
