"""The responder: executes the peer's requests in PSN order and answers them (IBA 9.7.4, 9.7.5.1, 9.9.3).

What arrives out of order is not kept: a packet ahead of the expected PSN is answered by one NAK, one behind it is a
duplicate. ACKs are sent only at the end of the batch that a packet came in with, after its data have been flushed, so
no acknowledgement can be seen before them. Answers leave in PSN order (`answers`).
"""

from __future__ import annotations

from softroce_ext.transport.interfaces import MemoryFault, ProtectionError
from softroce_ext.transport.rc import movement
from softroce_ext.transport.rc.answers import flush_ack, refuse
from softroce_ext.transport.rc.connection import Connection
from softroce_ext.transport.reassembly import (
    RequestFault,
    execute_send,
    execute_write,
    invalid_request,
    remote_access,
    remote_operational,
)
from softroce_ext.transport.state.movement import STOPPED_STATES
from softroce_ext.transport.state.receiver import AtomicAnswer, ReadAnswer, ResponderResource
from softroce_ext.transport.verbs import Access
from softroce_ext.wire import opcodes as op
from softroce_ext.wire.frame import Packet
from softroce_ext.wire.headers import (
    ACK_REQ,
    ATOMIC_ETH,
    MAX_MESSAGE,
    NAK_PSN_SEQUENCE,
    PSN_HALF,
    PSN_MASK,
    RETH,
)
from softroce_ext.wire.opcodes import OpFlag

_SEND = int(OpFlag.SEND)
_WRITE = int(OpFlag.WRITE)
_DATA = _SEND | _WRITE
_READ = int(OpFlag.READ)
_ATOMIC = int(OpFlag.ATOMIC)
_RESUME = int(OpFlag.RESUME)

_REMOTE_READ = int(Access.REMOTE_READ)
_REMOTE_ATOMIC = int(Access.REMOTE_ATOMIC)

MAX_PENDING_ANSWERS = 512
"""Answers that may wait to be sent; further requests are dropped until some have left."""


def receive_request(qp: Connection, packet: Packet, flags: int, now: float) -> None:
    """HOT. Take one request packet. `flags`: the opcode's OpFlag bits."""
    receiver = qp.receiver
    psn = packet.psn
    if flags & _RESUME:
        if len(receiver.answers) > MAX_PENDING_ANSWERS:
            qp.counters["dropped_busy"] += 1
        else:
            movement.receive_resume(qp, packet, now)
        return
    if psn != receiver.expected_psn:
        if (psn - receiver.expected_psn & PSN_MASK) < PSN_HALF:
            _ahead(qp)
        else:
            _duplicate(qp, packet, flags)
        return
    if qp.movement.state in STOPPED_STATES:
        qp.counters["dropped_stopped"] += 1
        if len(receiver.answers) <= MAX_PENDING_ANSWERS:
            movement.refuse_while_stopped(qp)
        return
    if len(receiver.answers) > MAX_PENDING_ANSWERS:
        qp.counters["dropped_busy"] += 1
        return
    try:
        if flags & _WRITE:
            done: int = execute_write(qp, packet, flags, now)
        elif flags & _SEND:
            done = execute_send(qp, packet, flags, now)
        elif flags & _READ:
            done = _read(qp, packet)
        else:
            done = _atomic(qp, packet)
    except RequestFault as fault:
        refuse(qp, psn, fault)
        return
    if done:
        receiver.expected_psn = psn + done & PSN_MASK
        receiver.nak_sent = False
        if packet.ack_byte & ACK_REQ and flags & _DATA:
            qp.ack_pending = True


def _ahead(qp: Connection) -> None:
    """A gap: ask once for the expected PSN."""
    receiver = qp.receiver
    unheard = qp.movement.stopped and not qp.speaks_migros
    if receiver.nak_sent or unheard or len(receiver.answers) > MAX_PENDING_ANSWERS:
        qp.counters["dropped_ahead"] += 1
        return
    qp.counters["out_of_seq_request"] += 1
    flush_ack(qp)
    receiver.nak(receiver.expected_psn, NAK_PSN_SEQUENCE)


def _duplicate(qp: Connection, packet: Packet, flags: int) -> None:
    """A request that was executed: SEND and WRITE are ACKed again, READ and atomic answered from what is saved."""
    receiver = qp.receiver
    qp.counters["duplicate_request"] += 1
    if flags & _DATA:
        qp.ack_pending = True
        return
    psn = packet.psn
    for resource in receiver.resources:
        index = psn - resource.first_psn & PSN_MASK
        if index < resource.packets:
            break
    else:
        return  # too old: its answer was acknowledged long ago
    if resource.atomic != bool(flags & _ATOMIC) or len(receiver.answers) > MAX_PENDING_ANSWERS:
        return
    flush_ack(qp)
    if resource.atomic:
        receiver.queue(AtomicAnswer(resource))
        return
    address, rkey, length = RETH.unpack_from(packet.raw, packet.headers_at)
    done = index * qp.attributes.path_mtu
    if rkey != resource.rkey or address != (resource.remote_address + done) & (1 << 64) - 1:
        return
    if length != resource.length - done:
        return
    for answer in receiver.answers:
        if isinstance(answer, ReadAnswer) and answer.resource is resource:
            # Still being answered: only what has left already is sent again.
            answer.next_packet = min(answer.next_packet, index)
            return
    receiver.queue(ReadAnswer(resource, index, True))


def _read(qp: Connection, packet: Packet) -> int:
    """An RDMA READ request: check it, remember it, queue its answer. Returns the PSNs that it takes."""
    attributes, receiver = qp.attributes, qp.receiver
    if receiver.message or not attributes.qp_access_flags & _REMOTE_READ or attributes.max_dest_rd_atomic == 0:
        raise invalid_request()
    address, rkey, length = RETH.unpack_from(packet.raw, packet.headers_at)
    if length > MAX_MESSAGE:
        raise invalid_request()
    if length:
        try:
            qp.pd.remote(rkey, address, length, _REMOTE_READ, attributes.qpn)
        except ProtectionError:
            raise remote_access() from None
    flush_ack(qp)
    packets: int = -(-length // attributes.path_mtu) or 1
    resource = ResponderResource(packet.psn, packets, receiver.next_msn(), False, 0, address, rkey, length)
    receiver.remember(resource, attributes.max_dest_rd_atomic)
    receiver.queue(ReadAnswer(resource, 0))
    return packets


def _atomic(qp: Connection, packet: Packet) -> int:
    """COMPARE SWAP or FETCH ADD on 8 bytes in this machine's byte order, exactly once."""
    attributes, receiver = qp.attributes, qp.receiver
    if receiver.message or not attributes.qp_access_flags & _REMOTE_ATOMIC or attributes.max_dest_rd_atomic == 0:
        raise invalid_request()
    address, rkey, swap_or_add, compare = ATOMIC_ETH.unpack_from(packet.raw, packet.headers_at)
    if address & 7:
        raise invalid_request()
    try:
        memory, local = qp.pd.remote(rkey, address, 8, _REMOTE_ATOMIC, attributes.qpn)
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
    resource = ResponderResource(packet.psn, 1, receiver.next_msn(), True, original)
    receiver.remember(resource, attributes.max_dest_rd_atomic)
    receiver.queue(AtomicAnswer(resource))
    return 1
