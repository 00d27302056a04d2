"""The responder: executes the partner's requests in PSN order and answers them (IBA 9.7.4, 9.7.5.1, 9.9.3).

What arrives out of order is not kept: a packet ahead of the expected PSN is answered by one NAK, one behind it is a
duplicate. Writes to memory are flushed, completions published and ACKs sent only at the end of the batch that a packet
came in with, so nobody can see a completion or an acknowledgement before its data. Answers leave in PSN order through
`QpContext.answers`; READ responses are generated from there a few at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softroce_ext.transport import migros
from softroce_ext.transport.answers import (
    InvalidationFault,
    RequestFault,
    flush_ack,
    invalid_request,
    refuse,
    remote_access,
    remote_operational,
)
from softroce_ext.transport.completion import complete_receive
from softroce_ext.transport.context import (
    Acknowledge,
    AtomicAnswer,
    ReadAnswer,
    ResponderResource,
)
from softroce_ext.transport.interfaces import MemoryFault, ProtectionError
from softroce_ext.transport.scatter import resolve, scatter
from softroce_ext.transport.verbs import Access, WcFlag, WcOpcode
from softroce_ext.wire import opcodes as op
from softroce_ext.wire.frame import Packet
from softroce_ext.wire.headers import (
    ACK_REQ,
    AETH_RNR_NAK,
    ATOMIC_ETH,
    MAX_MESSAGE,
    NAK_PSN_SEQUENCE,
    PSN_HALF,
    PSN_MASK,
    RETH,
    SOLICITED,
    WORD,
)
from softroce_ext.wire.opcodes import OpFlag

if TYPE_CHECKING:
    from softroce_ext.transport.qp import QueuePair

_START = int(OpFlag.START)
_END = int(OpFlag.END)
_SEND = int(OpFlag.SEND)
_WRITE = int(OpFlag.WRITE)
_DATA = _SEND | _WRITE
_READ = int(OpFlag.READ)
_ATOMIC = int(OpFlag.ATOMIC)
_IMM = int(OpFlag.IMM)
_INVALIDATE = int(OpFlag.INVALIDATE)
_RESUME = int(OpFlag.RESUME)

_RECV = int(WcOpcode.RECV)
_WITH_IMM = int(WcFlag.WITH_IMM)
_WITH_INVALIDATE = int(WcFlag.WITH_INVALIDATE)
_REMOTE_WRITE = int(Access.REMOTE_WRITE)
_REMOTE_READ = int(Access.REMOTE_READ)
_REMOTE_ATOMIC = int(Access.REMOTE_ATOMIC)
_LOCAL_WRITE = int(Access.LOCAL_WRITE)

MAX_PENDING_ANSWERS = 512
"""Answers that may wait to be sent; a partner that asks for more than that while none leaves is not listened to."""


def receive_request(qp: QueuePair, packet: Packet, flags: int, now: float) -> None:
    """HOT. Take one request packet. `flags`: the opcode's OpFlag bits."""
    context = qp.context
    psn = packet.psn
    if flags & _RESUME:
        if len(context.answers) > MAX_PENDING_ANSWERS:
            qp.counters["dropped_busy"] += 1
        else:
            migros.receive_resume(qp, packet, now)
        return
    if psn != context.expected_psn:
        if (psn - context.expected_psn & PSN_MASK) < PSN_HALF:
            _ahead(qp)
        else:
            _duplicate(qp, packet, flags)
        return
    if context.stopped:
        qp.counters["dropped_stopped"] += 1
        if len(context.answers) <= MAX_PENDING_ANSWERS:
            migros.refuse_while_stopped(qp)
        return
    if len(context.answers) > MAX_PENDING_ANSWERS:
        qp.counters["dropped_busy"] += 1
        return
    try:
        if flags & _WRITE:
            done = write(qp, packet, flags, now)
        elif flags & _SEND:
            done = send(qp, packet, flags, now)
        elif flags & _READ:
            done = _read(qp, packet)
        else:
            done = _atomic(qp, packet)
    except RequestFault as fault:
        refuse(qp, psn, fault)
        return
    if done:
        context.expected_psn = psn + done & PSN_MASK
        context.nak_sent = False
        if packet.ack_byte & ACK_REQ and flags & _DATA:
            qp.ack_pending = True


def _ahead(qp: QueuePair) -> None:
    """A gap: ask once for the expected PSN."""
    context = qp.context
    if context.nak_sent or (context.stopped and not migros.speaks(qp)) or len(context.answers) > MAX_PENDING_ANSWERS:
        qp.counters["dropped_ahead"] += 1
        return
    qp.counters["out_of_seq_request"] += 1
    context.nak_sent = True
    flush_ack(qp)
    context.answers.append(Acknowledge(context.expected_psn, NAK_PSN_SEQUENCE, context.msn))


def _duplicate(qp: QueuePair, packet: Packet, flags: int) -> None:
    """A request that was executed: SEND and WRITE are ACKed again, READ and atomic answered from what is saved."""
    context = qp.context
    qp.counters["duplicate_request"] += 1
    if flags & _DATA:
        qp.ack_pending = True
        return
    psn = packet.psn
    for resource in context.resources:
        index = psn - resource.first_psn & PSN_MASK
        if index < resource.packets:
            break
    else:
        return  # too old: its answer was acknowledged long ago
    if resource.atomic != bool(flags & _ATOMIC) or len(context.answers) > MAX_PENDING_ANSWERS:
        return
    flush_ack(qp)
    if resource.atomic:
        context.answers.append(AtomicAnswer(resource))
        return
    address, rkey, length = RETH.unpack_from(packet.raw, packet.headers_at)
    done = index * context.path_mtu
    if rkey != resource.rkey or address != (resource.remote_address + done) & (1 << 64) - 1:
        return
    if length != resource.length - done:
        return
    for answer in context.answers:
        if isinstance(answer, ReadAnswer) and answer.resource is resource:
            # Still being answered: the rest is on its way; only what has left is sent again.
            answer.next_packet = min(answer.next_packet, index)
            return
    context.answers.append(ReadAnswer(resource, index, True))


def write(qp: QueuePair, packet: Packet, flags: int, now: float) -> int:
    """HOT. One packet of an RDMA WRITE. Returns 1, or 0 when it was not executed (RNR)."""
    context = qp.context
    payload = packet.payload
    length = len(payload)
    if flags & _START:
        if context.message or not context.qp_access_flags & _REMOTE_WRITE:
            raise invalid_request()
        address, rkey, total = RETH.unpack_from(packet.raw, packet.headers_at)
        left = total
        qp.write_target = None
    else:
        if context.message != _WRITE:
            raise invalid_request()
        address = context.write_address
        rkey = context.write_rkey
        total = context.write_length
        left = context.write_left
    if flags & _END:
        if length != left or length > context.path_mtu:
            raise invalid_request()
    elif length != context.path_mtu or length >= left:  # so a LAST has at least one byte
        raise invalid_request()
    if flags & _IMM and context.recv_wqe is None and not fetch_receive(qp, packet.psn):
        return 0
    if length:
        target = qp.write_target
        if target is None:
            # Once per message and batch: everything that is left of the message.
            try:
                memory, local = qp.pd.remote(rkey, address, left, _REMOTE_WRITE, context.qpn)
            except ProtectionError:
                raise remote_access() from None
            qp.will_write(memory, True)
            qp.write_target = target = (memory, local - address)
        try:
            target[0].write(address + target[1], payload)
        except MemoryFault:
            raise remote_operational() from None
    if flags & _END:
        context.message = 0
        context.write_left = 0
        context.msn = context.msn + 1 & PSN_MASK
        if flags & _IMM:
            at = packet.headers_at + (16 if flags & _START else 0)
            imm = int.from_bytes(packet.raw[at : at + 4], "little")
            complete_receive(
                qp, now, WcOpcode.RECV_RDMA_WITH_IMM, total, imm, WcFlag.WITH_IMM, bool(packet.first_word & SOLICITED)
            )
    else:
        context.message = _WRITE
        context.write_address = address + length
        context.write_left = left - length
        context.write_rkey = rkey
        context.write_length = total
    return 1


def send(qp: QueuePair, packet: Packet, flags: int, now: float) -> int:
    """HOT. One packet of a SEND. Returns 1, or 0 when no receive is posted (RNR)."""
    context = qp.context
    if bool(flags & _START) == bool(context.message) or context.message == _WRITE:
        raise invalid_request()
    payload = packet.payload
    length = len(payload)
    if not flags & _END:
        if length != context.path_mtu:
            raise invalid_request()
    elif length > context.path_mtu or (length == 0 and not flags & _START):
        raise invalid_request()
    if flags & _START:
        if context.recv_wqe is None and not fetch_receive(qp, packet.psn):  # UC: one may be left of a message cut short
            return 0
        context.recv_offset = 0
    receive = context.recv_wqe
    if receive is None:
        raise remote_operational()
    offset = context.recv_offset
    if offset + length > receive.length:
        raise remote_operational()  # NAK 0x63, as rxe
    if length:
        segments = qp.recv_segments
        if segments is None:
            try:
                segments = resolve(qp.pd, receive.sges, _LOCAL_WRITE)
            except ProtectionError:
                raise remote_operational() from None
            qp.recv_segments = segments
            for segment in segments:
                qp.will_write(segment[1], True)
        try:
            if len(segments) == 1:
                _, memory, address = segments[0]
                memory.write(address + offset, payload)
            else:
                scatter(segments, offset, payload)
        except MemoryFault:
            raise remote_operational() from None
    if not flags & _END:
        context.message = _SEND
        context.recv_offset = offset + length
        return 1
    imm = 0
    wc_flags = 0
    if flags & _IMM:
        imm = int.from_bytes(packet.raw[packet.headers_at : packet.headers_at + 4], "little")
        wc_flags = _WITH_IMM
    elif flags & _INVALIDATE:
        imm = WORD.unpack_from(packet.raw, packet.headers_at)[0]
        wc_flags = _WITH_INVALIDATE
        try:
            qp.pd.invalidate(imm, context.qpn)
        except ProtectionError:
            raise InvalidationFault from None
    context.message = 0
    context.msn = context.msn + 1 & PSN_MASK
    complete_receive(qp, now, _RECV, offset + length, imm, wc_flags, bool(packet.first_word & SOLICITED))
    return 1


def fetch_receive(qp: QueuePair, psn: int) -> bool:
    """Take a posted receive into use. When there is none, return False, and have RC queue an RNR NAK."""
    context = qp.context
    receive = qp.receive_queue.fetch()
    if receive is None:
        if not qp.ack_request:
            qp.counters["dropped_no_receive"] += 1
            return False
        qp.counters["send_rnr_err"] += 1
        flush_ack(qp)
        # Packets behind this one are ahead of what is expected now: they are dropped in silence.
        context.nak_sent = True
        context.answers.append(Acknowledge(psn, AETH_RNR_NAK | context.min_rnr_timer, context.msn))
        return False
    if context.srq:
        qp.receive_queue.retire()
    context.recv_wqe = receive
    qp.recv_segments = None
    return True


def _read(qp: QueuePair, packet: Packet) -> int:
    """An RDMA READ request: check it, remember it, queue its answer. Returns the PSNs that it takes."""
    context = qp.context
    if context.message or not context.qp_access_flags & _REMOTE_READ or context.max_dest_rd_atomic == 0:
        raise invalid_request()
    address, rkey, length = RETH.unpack_from(packet.raw, packet.headers_at)
    if length > MAX_MESSAGE:
        raise invalid_request()
    if length:
        try:
            qp.pd.remote(rkey, address, length, _REMOTE_READ, context.qpn)
        except ProtectionError:
            raise remote_access() from None
    flush_ack(qp)
    context.msn = context.msn + 1 & PSN_MASK
    packets: int = -(-length // context.path_mtu) or 1
    resource = ResponderResource(packet.psn, packets, context.msn, False, 0, address, rkey, length)
    _remember(qp, resource)
    context.answers.append(ReadAnswer(resource, 0))
    return packets


def _atomic(qp: QueuePair, packet: Packet) -> int:
    """COMPARE SWAP or FETCH ADD on 8 bytes in this machine's byte order, exactly once."""
    context = qp.context
    if context.message or not context.qp_access_flags & _REMOTE_ATOMIC or context.max_dest_rd_atomic == 0:
        raise invalid_request()
    address, rkey, swap_or_add, compare = ATOMIC_ETH.unpack_from(packet.raw, packet.headers_at)
    if address & 7:
        raise invalid_request()
    try:
        memory, local = qp.pd.remote(rkey, address, 8, _REMOTE_ATOMIC, context.qpn)
    except ProtectionError:
        raise remote_access() from None
    try:
        original = int.from_bytes(memory.read(local, 8), "little")  # with what earlier packets of the batch wrote
        if packet.opcode == op.FETCH_ADD:
            value = original + swap_or_add & (1 << 64) - 1
        else:
            value = swap_or_add if original == compare else original
        memory.write(local, value.to_bytes(8, "little"))
        # Others may reach the word through another program's memory, in this same batch: now, not at its end.
        memory.read(local, 8)
    except MemoryFault:
        raise remote_operational() from None
    qp.will_write(memory, True)
    flush_ack(qp)
    context.msn = context.msn + 1 & PSN_MASK
    resource = ResponderResource(packet.psn, 1, context.msn, True, original)
    _remember(qp, resource)
    context.answers.append(AtomicAnswer(resource))
    return 1


def _remember(qp: QueuePair, resource: ResponderResource) -> None:
    resources = qp.context.resources
    resources.append(resource)
    while len(resources) > qp.context.max_dest_rd_atomic:
        resources.popleft()
