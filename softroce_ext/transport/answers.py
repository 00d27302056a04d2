"""The responder's other half: what it answers, in PSN order (IBA 9.7.5.1, 9.7.5.2, 9.9.3).

Answers wait in `QpContext.answers`. ACKs of one batch are one ACK; READ responses are generated from the saved request
a few packets at a time, whenever the queue pair has its turn to send.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softroce_ext.transport.completion import enter_error
from softroce_ext.transport.context import Acknowledge, QpContext, ReadAnswer
from softroce_ext.transport.interfaces import MemoryFault, ProtectionError
from softroce_ext.transport.verbs import Access, QpEvent, QpState, WcStatus
from softroce_ext.wire import opcodes as op
from softroce_ext.wire.headers import (
    ACK_UNLIMITED,
    BTH,
    BTH_AETH,
    BTH_AETH_ATOMIC,
    MIGROS_RESUMED,
    NAK_INVALID_REQUEST,
    NAK_REMOTE_ACCESS,
    NAK_REMOTE_OPERATIONAL,
    PAD_SHIFT,
    PKEY_DEFAULT,
    PSN_HALF,
    PSN_MASK,
)

if TYPE_CHECKING:
    from softroce_ext.transport.engine import FrameSink
    from softroce_ext.transport.qp import QueuePair

_REMOTE_READ = int(Access.REMOTE_READ)


class RequestFault(Exception):
    """The partner's request cannot be executed: the NAK's syndrome and this side's status for the receive it used."""

    def __init__(self, syndrome: int, receive_status: WcStatus, event: QpEvent) -> None:
        super().__init__(f"NAK {syndrome:#x}")
        self.syndrome = syndrome
        self.receive_status = receive_status
        self.event = event


class InvalidationFault(RequestFault):
    """A SEND_WITH_INV whose key cannot be taken back: acknowledged, since its data came, and fatal here (as rxe)."""

    def __init__(self) -> None:
        super().__init__(ACK_UNLIMITED, WcStatus.REM_INV_REQ_ERR, QpEvent.QP_ACCESS_ERR)


def invalid_request() -> RequestFault:
    return RequestFault(NAK_INVALID_REQUEST, WcStatus.REM_INV_REQ_ERR, QpEvent.QP_REQ_ERR)


def remote_access() -> RequestFault:
    return RequestFault(NAK_REMOTE_ACCESS, WcStatus.WR_FLUSH_ERR, QpEvent.QP_ACCESS_ERR)


def remote_operational() -> RequestFault:
    return RequestFault(NAK_REMOTE_OPERATIONAL, WcStatus.LOC_QP_OP_ERR, QpEvent.QP_FATAL)


def flush_ack(qp: QueuePair) -> None:
    """Queue the batch's pending ACK (one for all of the batch's packets), after whatever is queued already.

    It has the PSN of a SEND or WRITE: a plain ACK with that of a READ or atomic, as a duplicate before one could bring
    about, would be taken for its answer (rxe fails the queue pair).
    """
    if not qp.ack_pending:
        return
    qp.ack_pending = False
    context = qp.context
    psn = _of_data(context, context.expected_psn - 1 & PSN_MASK)
    answers = context.answers
    if answers:
        last = answers[-1]
        if isinstance(last, Acknowledge) and last.syndrome == ACK_UNLIMITED and not last.resumed:
            last.psn = psn
            last.msn = context.msn
            return
    answers.append(Acknowledge(psn, ACK_UNLIMITED, context.msn))


def _of_data(context: QpContext, psn: int) -> int:
    """HOT. `psn`, or if it is of the last READs or atomics the PSN before them."""
    for resource in reversed(context.resources):
        if (psn - resource.first_psn & PSN_MASK) >= resource.packets:
            break
        psn = resource.first_psn - 1 & PSN_MASK
    return psn


def withdraw(qp: QueuePair, psn: int | None = None) -> None:
    """Take back the answers to requests from `psn` on (None: to this batch's).

    They have not left yet, and will not be true.
    """
    context = qp.context
    qp.ack_pending = False
    begin = qp.batch_psn if psn is None else psn
    kept = [
        answer
        for answer in context.answers
        if ((answer.psn if isinstance(answer, Acknowledge) else answer.resource.first_psn) - begin & PSN_MASK)
        >= PSN_HALF
    ]
    context.answers.clear()
    context.answers.extend(kept)


def withhold(qp: QueuePair, psn: int, msn: int) -> None:
    """The completion of a message of this batch is lost: acknowledge what came before its last packet, not more.

    psn: of that packet; msn: the message's.
    """
    withdraw(qp, psn)
    resources = qp.context.resources
    while resources and (resources[-1].first_psn - psn & PSN_MASK) < PSN_HALF:
        resources.pop()
    before = _of_data(qp.context, psn - 1 & PSN_MASK)
    if qp.ack_request and (before - qp.batch_psn & PSN_MASK) < PSN_HALF:
        qp.context.answers.append(Acknowledge(before, ACK_UNLIMITED, msn - 1 & PSN_MASK))


def refuse(qp: QueuePair, psn: int, fault: RequestFault) -> None:
    """Answer by a NAK that ends the connection, and fail this end too (IBA 9.9.3.1: class A, B, C errors).

    A process that has ended gives no answer; nor does an unreliable service, which only fails.
    """
    if fault.syndrome == NAK_REMOTE_OPERATIONAL and qp.events.owner_gone(qp.context.qpn):
        # Its memory went with it. Elsewhere pages outlive their process until its queue pairs have gone, and the
        # partner of a killed program hears nothing more: it must see its retries end, not a fault of its request.
        qp.context.answers.clear()
        enter_error(qp, fault.receive_status, None)
        return
    flush_ack(qp)
    context = qp.context
    if qp.ack_request:
        if fault.syndrome == ACK_UNLIMITED:
            context.msn = context.msn + 1 & PSN_MASK
        else:
            qp.counters["send_fatal_nak"] += 1
        context.answers.append(Acknowledge(psn, fault.syndrome, context.msn))
    if context.state != QpState.ERR:  # it may have failed since it promised the READ whose memory has gone now
        enter_error(qp, fault.receive_status, fault.event)


def drop_reads(context: QpContext) -> None:
    """READ responses that have not left are not sent: who still wants them asks again."""
    kept = [answer for answer in context.answers if not isinstance(answer, ReadAnswer)]
    context.answers.clear()
    context.answers.extend(kept)


def send_answers(qp: QueuePair, sink: FrameSink, budget: int) -> int:
    """HOT. Send up to `budget` queued answers' packets; returns how many."""
    context = qp.context
    answers = context.answers
    path = context.path
    assert path is not None
    sent = 0
    while answers and sent < budget:
        answer = answers[0]
        if isinstance(answer, Acknowledge):
            ack_byte = qp.capability | (MIGROS_RESUMED if answer.resumed else 0)
            headers = BTH_AETH.pack(
                op.ACKNOWLEDGE << 24 | PKEY_DEFAULT, context.destination_qpn, ack_byte << 24 | answer.psn,
                answer.syndrome << 24 | answer.msn,
            )  # fmt: skip
            sink.add(path, headers, b"", 0)
            sent += 1
        elif isinstance(answer, ReadAnswer):
            sent += _send_read_answer(qp, answer, sink, budget - sent)
            if not answers or answers[0] is not answer:
                continue  # its memory has gone: perhaps a NAK took its place
            if answer.next_packet < answer.resource.packets:
                break
        else:
            resource = answer.resource
            headers = BTH_AETH_ATOMIC.pack(
                op.ATOMIC_ACKNOWLEDGE << 24 | PKEY_DEFAULT, context.destination_qpn,
                qp.capability << 24 | resource.first_psn, ACK_UNLIMITED << 24 | resource.msn, resource.original,
            )  # fmt: skip
            sink.add(path, headers, b"", 0)
            sent += 1
        answers.popleft()
    if answers:
        qp.more = True
    return sent


def _send_read_answer(qp: QueuePair, answer: ReadAnswer, sink: FrameSink, limit: int) -> int:
    """HOT. Up to `limit` READ response packets, from one read of the memory; returns how many."""
    context = qp.context
    resource = answer.resource
    mtu = context.path_mtu
    packets = resource.packets
    at = answer.next_packet
    count = min(packets - at, limit)
    begin = at * mtu
    length = min(resource.length - begin, count * mtu)
    data = memoryview(b"")
    if length:
        try:
            memory, address = qp.pd.remote(
                resource.rkey, resource.remote_address + begin, length, _REMOTE_READ, context.qpn
            )
            data = memoryview(memory.read(address, length))
        except (ProtectionError, MemoryFault) as error:
            if answer.again:
                # It had its answer when its key was good. A duplicate that comes later, as on links that change the
                # order, must not end a connection whose partner has since taken the key back by SEND_WITH_INV.
                context.answers.popleft()
                return 0
            fault = remote_access() if isinstance(error, ProtectionError) else remote_operational()
            # Nothing that was asked for after it may be answered.
            context.answers.clear()
            refuse(qp, resource.first_psn + at & PSN_MASK, fault)
            return 0
    path = context.path
    assert path is not None
    add = sink.add
    remote = context.destination_qpn
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
