"""Reassembly: the packets of SENDs and WRITEs to memory and receives, for RC and UC (IBA 9.7.4, 9.7.5.1, 9.8.2, 9.9.3).

What a packet asks for is checked before anything is written. A packet that cannot be executed raises RequestFault; the
service decides whether the peer hears of it. Writes to memory are flushed and completions published only at the end of
the batch that a packet came in with.
"""

from __future__ import annotations

from softroce_ext.transport.interfaces import MemoryFault, ProtectionError
from softroce_ext.transport.queue_pair import QueuePair
from softroce_ext.transport.scatter import scatter
from softroce_ext.transport.verbs import Access, QpEvent, WcFlag, WcOpcode, WcStatus
from softroce_ext.wire.frame import Packet
from softroce_ext.wire.headers import (
    ACK_UNLIMITED,
    NAK_INVALID_REQUEST,
    NAK_REMOTE_ACCESS,
    NAK_REMOTE_OPERATIONAL,
    PSN_MASK,
    RETH,
    SOLICITED,
    WORD,
)
from softroce_ext.wire.opcodes import OpFlag

_START = int(OpFlag.START)
_END = int(OpFlag.END)
_SEND = int(OpFlag.SEND)
_WRITE = int(OpFlag.WRITE)
_IMM = int(OpFlag.IMM)
_INVALIDATE = int(OpFlag.INVALIDATE)

_RECV = int(WcOpcode.RECV)
_RECV_RDMA_WITH_IMM = int(WcOpcode.RECV_RDMA_WITH_IMM)
_WITH_IMM = int(WcFlag.WITH_IMM)
_WITH_INVALIDATE = int(WcFlag.WITH_INVALIDATE)
_REMOTE_WRITE = int(Access.REMOTE_WRITE)


class RequestFault(Exception):
    """The peer's request cannot be executed: the NAK's syndrome and this side's status for the receive it used."""

    def __init__(self, syndrome: int, receive_status: WcStatus, event: QpEvent) -> None:
        super().__init__(f"NAK {syndrome:#x}")
        self.syndrome = syndrome
        self.receive_status = receive_status
        self.event = event


class InvalidationFault(RequestFault):
    """A SEND_WITH_INV whose key cannot be invalidated: acknowledged, since its data came, and fatal here (as rxe)."""

    def __init__(self) -> None:
        super().__init__(ACK_UNLIMITED, WcStatus.REM_INV_REQ_ERR, QpEvent.QP_ACCESS_ERR)


def invalid_request() -> RequestFault:
    """A request that breaks the protocol, or that this queue pair does not take."""
    return RequestFault(NAK_INVALID_REQUEST, WcStatus.REM_INV_REQ_ERR, QpEvent.QP_REQ_ERR)


def remote_access() -> RequestFault:
    """A key, bound or right that does not allow the access."""
    return RequestFault(NAK_REMOTE_ACCESS, WcStatus.WR_FLUSH_ERR, QpEvent.QP_ACCESS_ERR)


def remote_operational() -> RequestFault:
    """A fault of this end: its receive or its memory."""
    return RequestFault(NAK_REMOTE_OPERATIONAL, WcStatus.LOC_QP_OP_ERR, QpEvent.QP_FATAL)


def execute_write(qp: QueuePair, packet: Packet, flags: int, now: float) -> bool:
    """HOT. One packet of an RDMA WRITE; False when it was not executed (RNR). Raises RequestFault."""
    attributes, receiver = qp.attributes, qp.receiver
    payload = packet.payload
    length = len(payload)
    if flags & _START:
        if receiver.message or not attributes.qp_access_flags & _REMOTE_WRITE:
            raise invalid_request()
        address, rkey, total = RETH.unpack_from(packet.raw, packet.headers_at)
        left = total
        qp.write_target = None
    else:
        if receiver.message != _WRITE:
            raise invalid_request()
        address = receiver.write_address
        rkey = receiver.write_rkey
        total = receiver.write_length
        left = receiver.write_left
    if flags & _END:
        if length != left or length > attributes.path_mtu:
            raise invalid_request()
    elif length != attributes.path_mtu or length >= left:  # so a LAST has at least one byte
        raise invalid_request()
    if flags & _IMM and receiver.recv_wqe is None and not fetch_receive(qp, packet.psn):
        return False
    if length:
        target = qp.write_target
        if target is None:
            # Once per message and batch: everything that is left of the message.
            try:
                memory, local = qp.pd.remote(rkey, address, left, _REMOTE_WRITE, attributes.qpn)
            except ProtectionError:
                raise remote_access() from None
            qp.will_write(memory, True)
            qp.write_target = target = (memory, local - address)
        try:
            target[0].write(address + target[1], payload)
        except MemoryFault:
            raise remote_operational() from None
    if flags & _END:
        receiver.write_left = 0
        receiver.complete_message()
        if flags & _IMM:
            at = packet.headers_at + (RETH.size if flags & _START else 0)
            imm = int.from_bytes(packet.raw[at : at + 4], "little")
            solicited = packet.first_word & SOLICITED != 0
            receive = receiver.release_receive()
            qp.complete_receive(now, receive, _RECV_RDMA_WITH_IMM, total, imm, _WITH_IMM, solicited)
    else:
        receiver.message = _WRITE
        receiver.write_address = address + length
        receiver.write_left = left - length
        receiver.write_rkey = rkey
        receiver.write_length = total
    return True


def execute_send(qp: QueuePair, packet: Packet, flags: int, now: float) -> bool:
    """HOT. One packet of a SEND; False when no receive is posted (RNR). Raises RequestFault."""
    receiver, mtu = qp.receiver, qp.attributes.path_mtu
    payload = packet.payload
    length = len(payload)
    if (not flags & _START) == (not receiver.message) or receiver.message == _WRITE:
        raise invalid_request()
    if length > mtu if flags & _END else length != mtu:
        raise invalid_request()
    if flags & _START:
        if receiver.recv_wqe is None and not fetch_receive(qp, packet.psn):  # UC: a cut-off message may have left one
            return False
        receiver.recv_offset = 0
    elif length == 0:
        raise invalid_request()  # a LAST has at least one byte
    receive = receiver.recv_wqe
    if receive is None:
        raise remote_operational()
    offset = receiver.recv_offset
    if offset + length > receive.length:
        raise remote_operational()  # NAK 0x63, as rxe
    if length:
        try:
            segments = qp.recv_segments
            if segments is None:
                segments = qp.recv_segments = qp.resolve_for_writing(receive.sges, True)
            scatter(segments, offset, payload)
        except (ProtectionError, MemoryFault):
            raise remote_operational() from None
    if not flags & _END:
        receiver.message = _SEND
        receiver.recv_offset = offset + length
        return True
    imm, wc_flags = 0, 0
    if flags & (_IMM | _INVALIDATE):
        imm, wc_flags = _immediate(qp, packet, flags)
    receiver.message = 0
    receiver.msn = receiver.msn + 1 & PSN_MASK
    receiver.recv_wqe = None
    qp.complete_receive(now, receive, _RECV, offset + length, imm, wc_flags, packet.first_word & SOLICITED != 0)
    return True


def _immediate(qp: QueuePair, packet: Packet, flags: int) -> tuple[int, int]:
    """The immediate data of a SEND, or the rkey that it invalidates; and the completion's flag."""
    if flags & _IMM:
        return int.from_bytes(packet.raw[packet.headers_at : packet.headers_at + 4], "little"), _WITH_IMM
    rkey: int = WORD.unpack_from(packet.raw, packet.headers_at)[0]
    try:
        qp.pd.invalidate(rkey, qp.attributes.qpn)
    except ProtectionError:
        raise InvalidationFault from None
    return rkey, _WITH_INVALIDATE


def fetch_receive(qp: QueuePair, psn: int) -> bool:
    """Take a posted receive into use. Without one, returns False: the service answers or counts that."""
    receive = qp.receive_queue.fetch()
    if receive is None:
        qp.no_receive(psn)
        return False
    observer = qp.engine.observer
    if observer is not None:
        observer.fetched(qp.attributes.qpn, receive)
    if qp.attributes.srq:
        qp.receive_queue.retire()
    qp.receiver.recv_wqe = receive
    qp.recv_segments = None
    return True
