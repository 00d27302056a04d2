"""Unreliable datagrams (IBA 9.8.3): one packet is one message, to and from any queue pair that knows the Q_Key.

The first 40 bytes of a receive are the GRH: the packet's own IPv6 header, or 20 zeros and its IPv4 header. A datagram
that finds no receive, or one too short, is dropped in silence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from softroce_ext.transport import completion, migros
from softroce_ext.transport.context import SendRecord
from softroce_ext.transport.interfaces import MemoryFault, ProtectionError, SendWqe
from softroce_ext.transport.qp import QueuePair
from softroce_ext.transport.requester import message_data
from softroce_ext.transport.responder import fetch_receive
from softroce_ext.transport.scatter import resolve, scatter
from softroce_ext.transport.verbs import (
    Access,
    QpEvent,
    QpState,
    QpType,
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
    PKEY_PARTITION,
    PSN_MASK,
    QKEY_PRIVILEGED,
    SOLICITED,
)
from softroce_ext.wire.path import Path

if TYPE_CHECKING:
    from softroce_ext.transport.engine import FrameSink

GRH_BYTES = 40

_OPCODES = {int(WrOpcode.SEND): op.UD | op.SEND_ONLY, int(WrOpcode.SEND_WITH_IMM): op.UD | op.SEND_ONLY_IMM}
_RTS = int(QpState.RTS)
_WITH_IMM = int(WrOpcode.SEND_WITH_IMM)
_MAX_PATHS = 1024


class DatagramQueuePair(QueuePair, qp_type=QpType.UD):
    """A UD queue pair."""

    __slots__ = ("_paths",)

    service: ClassVar[int] = op.UD
    ack_request: ClassVar[int] = 0
    announces_migros: ClassVar[bool] = False

    def __init__(self, *parts: Any) -> None:
        """As `QueuePair`."""
        super().__init__(*parts)
        self._paths: dict[int, tuple[Path, Path]] = {}
        """By address handle: its path, and the same with this queue pair's UDP source port."""

    # --- receiving ---

    def receive(self, packet: Packet, now: float) -> None:
        """HOT. Take a packet that names this queue pair, or a multicast group that it is in."""
        context = self.context
        counters = self.counters
        if packet.opcode & 0xE0 != op.UD or context.state not in migros.CONNECTED:
            counters["refused_state"] += 1
            return
        if packet.first_word & 0x7FFF != PKEY_PARTITION:
            counters["refused_pkey"] += 1
            return
        qkey, source = DETH.unpack_from(packet.raw, packet.headers_at)
        if qkey != context.qkey:
            counters["refused_qkey"] += 1
            return
        if context.stopped:
            counters["dropped_stopped"] += 1
            return
        if context.recv_wqe is None and not fetch_receive(self, packet.psn):
            return
        receive = context.recv_wqe
        payload = packet.payload
        if receive is None or GRH_BYTES + len(payload) > receive.length or len(payload) > self.engine.port_mtu:
            counters["dropped_length"] += 1
            return  # the receive stays for the next datagram
        if not self.touched:
            self.touched = True
            self.engine.touched.append(self)
        try:
            segments = resolve(self.pd, receive.sges, Access.LOCAL_WRITE)
            for segment in segments:
                self.will_write(segment[1], True)
            scatter(segments, 0, memoryview(packet.grh()))
            if payload:
                scatter(segments, GRH_BYTES, payload)
        except (ProtectionError, MemoryFault):
            completion.enter_error(self, WcStatus.LOC_QP_OP_ERR, QpEvent.QP_FATAL)
            return
        imm, flags = 0, 0
        if packet.opcode == op.UD | op.SEND_ONLY_IMM:
            at = packet.headers_at + DETH.size
            imm, flags = int.from_bytes(packet.raw[at : at + 4], "little"), int(WcFlag.WITH_IMM)
        completion.complete_receive(
            self, now, WcOpcode.RECV, GRH_BYTES + len(payload), imm, flags,
            bool(packet.first_word & SOLICITED), source & 0xFFFFFF,
        )  # fmt: skip

    # --- sending ---

    def transmit(self, now: float, sink: FrameSink, budget: int) -> int:
        """HOT. Send up to `budget` datagrams; returns how many. `more` says whether there would have been more."""
        context = self.context
        if not completion.may_send(self):
            return 0
        sent = 0
        while sent < budget:
            wqe = self.send_queue.fetch() if context.state == _RTS else None
            if wqe is None:
                break
            record = SendRecord(wqe, context.send_psn, 1)
            context.inflight.append(record)
            record.status = self._send(wqe, sink)
            if record.status:
                completion.settle(self, now)
                return sent
            sent += 1
            completion.retire_oldest(self, now)
        else:
            self.more = True
        if context.sq_draining:
            completion.check_drained(self)
        return sent

    def _send(self, wqe: SendWqe, sink: FrameSink) -> int:
        """HOT. Send one datagram; returns 0 or the WcStatus with which it failed."""
        context = self.context
        opcode = _OPCODES.get(wqe.opcode)
        if opcode is None or wqe.destination is None:
            return WcStatus.LOC_QP_OP_ERR
        if wqe.length > self.engine.port_mtu:
            return 0  # no packet and no error (IBA C10-93.1.1)
        ah_number, remote, qkey = wqe.destination
        if qkey & QKEY_PRIVILEGED:
            qkey = context.qkey
        try:
            path = self._path(ah_number)
        except ProtectionError:
            return WcStatus.LOC_QP_OP_ERR
        try:
            data = message_data(self, wqe, 0, wqe.length)
        except (ProtectionError, MemoryFault, ValueError):
            return WcStatus.LOC_PROT_ERR
        pad = -wqe.length & 3
        first = opcode << 24 | pad << PAD_SHIFT | PKEY_DEFAULT
        if wqe.flags & SendFlag.SOLICITED:
            first |= SOLICITED
        psn = context.send_psn
        if wqe.opcode == _WITH_IMM:
            headers = BTH_DETH_IMM.pack(first, remote & 0xFFFFFF, psn, qkey, context.qpn, wqe.imm.to_bytes(4, "little"))
        else:
            headers = BTH_DETH.pack(first, remote & 0xFFFFFF, psn, qkey, context.qpn)
        sink.add(path, headers, data, pad)
        context.send_psn = context.una_psn = context.high_psn = context.next_psn = psn + 1 & PSN_MASK
        return 0

    def _path(self, ah_number: int) -> Path:
        """An address handle's path with this queue pair's UDP source port. Raises ProtectionError."""
        base = self.pd.address(ah_number)
        known = self._paths.get(ah_number)
        if known is not None and known[0] is base:
            return known[1]
        if len(self._paths) >= _MAX_PATHS:
            self._paths.clear()
        path = base.replace(udp_source_port=datagram_source_port(self.context.qpn))
        self._paths[ah_number] = base, path
        return path
