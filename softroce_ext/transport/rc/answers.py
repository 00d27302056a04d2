"""The responder's other half: what it answers, in PSN order (IBA 9.7.5.1, 9.7.5.2, 9.9.3).

Answers wait in `Receiver.answers`. The ACKs of one batch are one ACK; READ responses are generated from the saved
request a few packets at a time, whenever the queue pair has its turn to send.
"""

from __future__ import annotations

from softroce_ext.transport.interfaces import FrameSink, MemoryFault, ProtectionError
from softroce_ext.transport.rc.connection import Connection
from softroce_ext.transport.reassembly import RequestFault, remote_access, remote_operational
from softroce_ext.transport.state.receiver import Acknowledge, ReadAnswer
from softroce_ext.transport.verbs import Access, QpEvent, QpState, WcStatus
from softroce_ext.wire import opcodes as op
from softroce_ext.wire.headers import (
    ACK_UNLIMITED,
    AETH_RNR_NAK,
    BTH,
    BTH_AETH,
    BTH_AETH_ATOMIC,
    MIGROS_RESUMED,
    NAK_REMOTE_OPERATIONAL,
    PAD_SHIFT,
    PKEY_DEFAULT,
    PSN_HALF,
    PSN_MASK,
)

_REMOTE_READ = int(Access.REMOTE_READ)
_ERR = int(QpState.ERR)


def flush_ack(qp: Connection) -> None:
    """Queue the batch's pending ACK (one for all of the batch's packets), after what is queued already.

    It has the PSN of a SEND or WRITE: a plain ACK with that of a READ or atomic, as a duplicate before one could bring
    about, would be taken for its answer (rxe fails the queue pair).
    """
    if not qp.ack_pending:
        return
    qp.ack_pending = False
    receiver = qp.receiver
    psn = receiver.expected_psn - 1 & PSN_MASK
    if receiver.resources:
        psn = receiver.data_psn(psn)
    answers = receiver.answers
    if answers:
        last = answers[-1]
        if isinstance(last, Acknowledge) and last.syndrome == ACK_UNLIMITED and not last.resumed:
            last.psn = psn
            last.msn = receiver.msn
            return
    receiver.answer(psn, ACK_UNLIMITED)


def answer_not_ready(qp: Connection, psn: int) -> None:
    """No receive is posted for the message that begins with `psn`: RNR NAK. What follows it is dropped."""
    qp.counters["send_rnr_err"] += 1
    flush_ack(qp)
    qp.receiver.nak(psn, AETH_RNR_NAK | qp.attributes.min_rnr_timer)


def withdraw(qp: Connection, psn: int) -> None:
    """Take back the answers to requests from `psn` on: they have not left, and will not be true."""
    qp.ack_pending = False
    qp.receiver.withdraw_answers_from(psn)


def withhold(qp: Connection, psn: int, msn: int) -> None:
    """The completion of a message of this batch is lost: acknowledge what came before its last packet, not more.

    psn: of that packet; msn: the message's.
    """
    receiver = qp.receiver
    withdraw(qp, psn)
    receiver.forget_resources_from(psn)
    before = receiver.data_psn(psn - 1 & PSN_MASK)
    if (before - qp.batch_psn & PSN_MASK) < PSN_HALF:
        receiver.queue(Acknowledge(before, ACK_UNLIMITED, msn - 1 & PSN_MASK))


def refuse(qp: Connection, psn: int, fault: RequestFault) -> None:
    """Answer by a NAK that ends the connection, and fail this end too (IBA 9.9.3.1: class A, B, C errors)."""
    receiver = qp.receiver
    if fault.syndrome == NAK_REMOTE_OPERATIONAL and qp.events.owner_gone(qp.attributes.qpn):
        # Its memory went with it. Elsewhere pages outlive their process until its queue pairs are destroyed, and the
        # peer of a killed program gets no answer: it must see its retries end, not a fault of its request.
        receiver.drop_answers()
        qp.enter_error(fault.receive_status, None)
        return
    flush_ack(qp)
    if fault.syndrome == ACK_UNLIMITED:
        receiver.next_msn()
    else:
        qp.counters["send_fatal_nak"] += 1
    receiver.answer(psn, fault.syndrome)
    if qp.attributes.state != _ERR:  # it may have failed since it promised the READ whose memory is gone now
        qp.enter_error(fault.receive_status, fault.event)


def refuse_batch(qp: Connection) -> None:
    """The data of this batch's requests could not be stored: none of them was executed."""
    withdraw(qp, qp.batch_psn)
    refuse(qp, qp.batch_psn, RequestFault(NAK_REMOTE_OPERATIONAL, WcStatus.LOC_PROT_ERR, QpEvent.QP_FATAL))


def send_answers(qp: Connection, sink: FrameSink, budget: int) -> int:
    """HOT. Send up to `budget` queued answers' packets; returns how many."""
    attributes = qp.attributes
    answers = qp.receiver.answers
    path = attributes.path
    assert path is not None
    sent = 0
    while answers and sent < budget:
        answer = answers[0]
        if isinstance(answer, Acknowledge):
            ack_byte = qp.capability | (MIGROS_RESUMED if answer.resumed else 0)
            headers = BTH_AETH.pack(
                op.ACKNOWLEDGE << 24 | PKEY_DEFAULT, attributes.destination_qpn, ack_byte << 24 | answer.psn,
                answer.syndrome << 24 | answer.msn,
            )  # fmt: skip
            sink.add(path, headers, b"", 0)
            sent += 1
        elif isinstance(answer, ReadAnswer):
            sent += _send_read_answer(qp, answer, sink, budget - sent)
            if not answers or answers[0] is not answer:
                continue  # its memory is gone: perhaps a NAK took its place
            if answer.next_packet < answer.resource.packets:
                break
        else:
            resource = answer.resource
            headers = BTH_AETH_ATOMIC.pack(
                op.ATOMIC_ACKNOWLEDGE << 24 | PKEY_DEFAULT, attributes.destination_qpn,
                qp.capability << 24 | resource.first_psn, ACK_UNLIMITED << 24 | resource.msn, resource.original,
            )  # fmt: skip
            sink.add(path, headers, b"", 0)
            sent += 1
        answers.popleft()
    if answers:
        qp.more = True
    return sent


def _send_read_answer(qp: Connection, answer: ReadAnswer, sink: FrameSink, limit: int) -> int:
    """HOT. Up to `limit` READ response packets, from one read of the memory; returns how many."""
    attributes = qp.attributes
    resource = answer.resource
    mtu = attributes.path_mtu
    packets = resource.packets
    at = answer.next_packet
    count = min(packets - at, limit)
    begin = at * mtu
    length = min(resource.length - begin, count * mtu)
    data = memoryview(b"")
    if length:
        try:
            memory, address = qp.pd.remote(
                resource.rkey, resource.remote_address + begin, length, _REMOTE_READ, attributes.qpn
            )
            data = memoryview(memory.read(address, length))
        except (ProtectionError, MemoryFault) as error:
            _read_answer_failed(qp, answer, error)
            return 0
    path = attributes.path
    assert path is not None
    add = sink.add
    remote = attributes.destination_qpn
    capability = qp.capability << 24
    aeth = ACK_UNLIMITED << 24 | resource.msn
    middle = op.READ_RESPONSE_MIDDLE << 24 | PKEY_DEFAULT
    psn = resource.first_psn + at & PSN_MASK
    last = packets - 1
    offset = 0
    for index in range(at, at + count):
        payload = data[offset : offset + mtu]
        # A duplicate's answer that begins within the READ begins with MIDDLE, as rxe's does (and as rxe expects).
        if 0 < index < last:
            add(path, BTH.pack(middle, remote, capability | psn), payload, 0)
        else:
            if index < last:
                opcode, pad = op.READ_RESPONSE_FIRST, 0
            else:
                opcode = op.READ_RESPONSE_ONLY if index == 0 else op.READ_RESPONSE_LAST
                pad = -len(payload) & 3
            first = opcode << 24 | pad << PAD_SHIFT | PKEY_DEFAULT
            add(path, BTH_AETH.pack(first, remote, capability | psn, aeth), payload, pad)
        offset += mtu
        psn = psn + 1 & PSN_MASK
    answer.next_packet = at + count
    return count


def _read_answer_failed(qp: Connection, answer: ReadAnswer, error: Exception) -> None:
    """The memory of a READ can no longer be read."""
    receiver, resource = qp.receiver, answer.resource
    if answer.again:
        # It was answered when its key was good. A duplicate that comes later, as on links that reorder packets, must
        # not end a connection whose peer has since invalidated the key by SEND_WITH_INV.
        receiver.answers.popleft()
        return
    fault = remote_access() if isinstance(error, ProtectionError) else remote_operational()
    # Nothing that was asked for after it may be answered.
    receiver.drop_answers()
    refuse(qp, resource.first_psn + answer.next_packet & PSN_MASK, fault)
