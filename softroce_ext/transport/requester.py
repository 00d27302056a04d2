"""The requester: turns send work requests into request packets (IBA 9.7.3 and 9.7.5 as the requester sees them).

Each request gets its PSNs when it is fetched: one per packet, for a READ one per response packet. `send_psn` walks
through them; to *go back* is to set it to the first unacknowledged PSN. Nothing else is needed for go-back-N, since a
packet's contents follow from its request and its PSN.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from softroce_ext.transport.completion import settle
from softroce_ext.transport.context import QpContext, SendRecord
from softroce_ext.transport.interfaces import MemoryFault, ProtectionError, SendWqe
from softroce_ext.transport.retry import start_ack_timer
from softroce_ext.transport.scatter import gather, resolve
from softroce_ext.transport.verbs import READS, Access, QpState, SendFlag, WcStatus, WrOpcode
from softroce_ext.wire import opcodes as op
from softroce_ext.wire.headers import (
    ACK_REQ,
    BTH,
    BTH_ATOMIC_ETH,
    BTH_IETH,
    BTH_IMM,
    BTH_RETH,
    BTH_RETH_IMM,
    MAX_MESSAGE,
    PAD_SHIFT,
    PKEY_DEFAULT,
    PSN_MASK,
    SOLICITED,
)

if TYPE_CHECKING:
    from softroce_ext.transport.engine import FrameSink
    from softroce_ext.transport.qp import QueuePair

_RTS = int(QpState.RTS)
_RDMA_READ = int(WrOpcode.RDMA_READ)
_FENCE = int(SendFlag.FENCE)
_SOLICITED_FLAG = int(SendFlag.SOLICITED)


class Segmentation(NamedTuple):
    """The opcodes of one kind of message, by the place of the packet in it."""

    first: int
    middle: int
    last: int
    only: int


SEGMENTATION: dict[int, Segmentation] = {
    WrOpcode.SEND: Segmentation(op.SEND_FIRST, op.SEND_MIDDLE, op.SEND_LAST, op.SEND_ONLY),
    WrOpcode.SEND_WITH_IMM: Segmentation(op.SEND_FIRST, op.SEND_MIDDLE, op.SEND_LAST_IMM, op.SEND_ONLY_IMM),
    WrOpcode.SEND_WITH_INV: Segmentation(op.SEND_FIRST, op.SEND_MIDDLE, op.SEND_LAST_INV, op.SEND_ONLY_INV),
    WrOpcode.RDMA_WRITE: Segmentation(op.WRITE_FIRST, op.WRITE_MIDDLE, op.WRITE_LAST, op.WRITE_ONLY),
    WrOpcode.RDMA_WRITE_WITH_IMM: Segmentation(op.WRITE_FIRST, op.WRITE_MIDDLE, op.WRITE_LAST_IMM, op.WRITE_ONLY_IMM),
}
ATOMICS = {
    int(WrOpcode.ATOMIC_CMP_AND_SWP): op.COMPARE_SWAP,
    int(WrOpcode.ATOMIC_FETCH_AND_ADD): op.FETCH_ADD,
}
LOCAL = frozenset({int(WrOpcode.LOCAL_INV), int(WrOpcode.BIND_MW)})
"""Requests that send nothing."""


def send_requests(qp: QueuePair, now: float, sink: FrameSink, budget: int) -> int:
    """HOT. Send up to `budget` request packets; returns how many. `qp.more` tells whether the budget ended it."""
    context = qp.context
    window = qp.engine.window
    sent = 0
    while sent < budget:
        inflight = context.inflight
        if context.cursor < len(inflight):
            record = inflight[context.cursor]
            if record.status:
                return sent  # failed here; it waits until it is the oldest
        else:
            if context.state != _RTS:
                return sent  # SQD begins nothing new
            wqe = qp.send_queue.fetch()
            if wqe is None:
                return sent
            record = admit(context, wqe)
            if record.status:
                settle(qp, now)
                return sent
        wqe = record.wqe
        if context.reads_out:
            if wqe.flags & _FENCE and context.send_psn == record.first_psn:
                return sent
            if wqe.opcode in READS and context.reads_out >= context.max_rd_atomic:
                return sent
        if record.packets == 0:
            if record.done:
                context.cursor += 1  # gone back over it: once is enough
                continue
            local_operation(qp, record, now)
            budget -= 1  # it sends nothing, but a program may post them for ever
            continue
        room = window - (context.send_psn - context.una_psn & PSN_MASK)
        if room <= 0:
            if context.noack_packets < window:
                return sent
            room = 1  # the window was larger, and none of those on the way asks for an ACK: the next one does
        try:
            if wqe.opcode in READS:
                _send_read(qp, record, sink)
                count = 1
            else:
                count = send_data(qp, record, sink, min(budget - sent, room))
        except (ProtectionError, MemoryFault, ValueError):
            record.status = WcStatus.LOC_PROT_ERR
        if record.status:
            settle(qp, now)
            return sent
        sent += count
        if context.ack_deadline is None:
            start_ack_timer(qp, now)
    qp.more = True
    return sent


def admit(context: QpContext, wqe: SendWqe) -> SendRecord:
    """HOT. Give a fetched request its PSNs and put it behind the others."""
    opcode = wqe.opcode
    packets = 1
    status = 0
    if opcode in SEGMENTATION or opcode == _RDMA_READ:
        packets = -(-wqe.length // context.path_mtu) or 1
        if wqe.length > MAX_MESSAGE:
            status = WcStatus.LOC_LEN_ERR
        elif opcode == _RDMA_READ and context.max_rd_atomic == 0:
            status = WcStatus.LOC_QP_OP_ERR
    elif opcode in ATOMICS:
        if context.max_rd_atomic == 0 or wqe.length != 8:
            status = WcStatus.LOC_QP_OP_ERR
    elif opcode in LOCAL:
        packets = 0
    else:
        status = WcStatus.LOC_QP_OP_ERR
    if status:
        packets = 0
    record = SendRecord(wqe, context.next_psn, packets, status)
    context.next_psn = context.next_psn + packets & PSN_MASK
    context.inflight.append(record)
    return record


def local_operation(qp: QueuePair, record: SendRecord, now: float) -> None:
    """LOCAL_INV and BIND_MW: done by the device when their turn to be sent comes."""
    try:
        qp.pd.local_operation(record.wqe, qp.context.qpn)
    except ProtectionError:
        bind = record.wqe.opcode == WrOpcode.BIND_MW
        record.status = WcStatus.MW_BIND_ERR if bind else WcStatus.LOC_QP_OP_ERR
    else:
        record.done = True
        qp.context.cursor += 1
    settle(qp, now)


def _send_read(qp: QueuePair, record: SendRecord, sink: FrameSink) -> None:
    """One READ or atomic request; a READ that goes on after a loss asks for the rest only."""
    context = qp.context
    wqe = record.wqe
    psn = context.send_psn
    path = context.path
    assert path is not None
    # The answer will be written: find out now whether it may be.
    resolve(qp.pd, wqe.sges, Access.LOCAL_WRITE)
    third = (ACK_REQ | qp.capability) << 24 | psn
    context.noack_packets = 0
    solicited = SOLICITED if wqe.flags & _SOLICITED_FLAG else 0
    if wqe.opcode == _RDMA_READ:
        done = (psn - record.first_psn & PSN_MASK) * context.path_mtu
        headers = BTH_RETH.pack(
            op.READ_REQUEST << 24 | solicited | PKEY_DEFAULT, context.destination_qpn, third,
            wqe.remote_address + done & 0xFFFFFFFFFFFFFFFF, wqe.rkey, wqe.length - done,
        )  # fmt: skip
    else:
        # FETCH ADD carries its operand where COMPARE SWAP carries the new value.
        swap = wqe.opcode == WrOpcode.ATOMIC_CMP_AND_SWP
        headers = BTH_ATOMIC_ETH.pack(
            ATOMICS[wqe.opcode] << 24 | solicited | PKEY_DEFAULT, context.destination_qpn, third,
            wqe.remote_address, wqe.rkey, wqe.swap if swap else wqe.compare_add, wqe.compare_add if swap else 0,
        )  # fmt: skip
    sink.add(path, headers, b"", 0)
    context.reads_out += 1
    context.cursor += 1
    _sent_up_to(qp, 1, record.first_psn + record.packets & PSN_MASK)


def send_data(
    qp: QueuePair,
    record: SendRecord,
    sink: FrameSink,
    limit: int,
    _bth: Any = BTH.pack,
) -> int:
    """HOT. Up to `limit` packets of a SEND or WRITE from `send_psn` on; returns how many. One read of the memory.

    Raises ProtectionError, MemoryFault or ValueError when the data cannot be had.
    """
    context = qp.context
    wqe = record.wqe
    mtu = context.path_mtu
    psn = context.send_psn
    at = psn - record.first_psn & PSN_MASK
    packets = record.packets
    count = packets - at
    if count > limit:
        count = limit
    begin = at * mtu
    length = wqe.length - begin
    if length > count * mtu:
        length = count * mtu
    data = message_data(qp, wqe, begin, length)
    path = context.path
    assert path is not None
    add = sink.add
    remote = context.destination_qpn
    capability = qp.capability << 24
    asking = (qp.ack_request | qp.capability) << 24
    service = qp.service
    noack = context.noack_packets
    every = qp.config.packets_per_ackreq
    if 3 * every > 2 * qp.engine.window:  # else the sender would wait for an ACK that nobody was asked for
        every = qp.engine.window // 2
    codes = SEGMENTATION[wqe.opcode]
    last = packets - 1
    middle = (codes.middle | service) << 24 | PKEY_DEFAULT
    offset = 0
    for index in range(at, at + count):
        noack += 1
        if 0 < index < last:
            # By far the most frequent packet: a whole MTU with nothing but the BTH before it.
            if noack >= every:
                noack = 0
                third = asking | psn
            else:
                third = capability | psn
            add(path, _bth(middle, remote, third), data[offset : offset + mtu], 0)
        else:
            if index == last or noack >= every:
                noack = 0
                third = asking | psn
            else:
                third = capability | psn
            payload = data[offset : offset + mtu]
            pad = -len(payload) & 3
            add(path, _edge_headers(wqe, codes, service, index, last, remote, third, pad), payload, pad)
        offset += mtu
        psn = psn + 1 & PSN_MASK
    context.noack_packets = noack
    if at + count == packets:
        context.cursor += 1
    _sent_up_to(qp, count, psn)
    return count


def message_data(qp: QueuePair, wqe: SendWqe, begin: int, length: int) -> memoryview:
    """HOT. Bytes begin..begin+length of a message; valid until the memory's next read. Raises as `send_data`."""
    if wqe.inline is None:
        return memoryview(gather(qp.pd, wqe.sges, begin, length))
    data = memoryview(wqe.inline)[begin : begin + length]
    if len(data) != length:
        raise ValueError("inline data are shorter than the message")
    return data


def _edge_headers(
    wqe: SendWqe, codes: Segmentation, service: int, index: int, last: int, remote: int, third: int, pad: int
) -> bytes:
    """Headers of a message's first, last or only packet."""
    if index < last:
        opcode = codes.first
        first = (opcode | service) << 24 | PKEY_DEFAULT
    else:
        opcode = codes.only if index == 0 else codes.last
        first = (opcode | service) << 24 | pad << PAD_SHIFT | PKEY_DEFAULT
        if wqe.flags & _SOLICITED_FLAG:
            first |= SOLICITED
    if opcode in (op.WRITE_FIRST, op.WRITE_ONLY):
        return BTH_RETH.pack(first, remote, third, wqe.remote_address, wqe.rkey, wqe.length)
    if opcode == op.WRITE_ONLY_IMM:
        imm = wqe.imm.to_bytes(4, "little")
        return BTH_RETH_IMM.pack(first, remote, third, wqe.remote_address, wqe.rkey, wqe.length, imm)
    if opcode in (op.SEND_LAST_IMM, op.SEND_ONLY_IMM, op.WRITE_LAST_IMM):
        return BTH_IMM.pack(first, remote, third, wqe.imm.to_bytes(4, "little"))
    if opcode in (op.SEND_LAST_INV, op.SEND_ONLY_INV):
        return BTH_IETH.pack(first, remote, third, wqe.imm)
    return BTH.pack(first, remote, third)


def _sent_up_to(qp: QueuePair, count: int, psn: int) -> None:
    """`count` packets went out and `psn` is the next one; remember the highest that was ever sent."""
    context = qp.context
    una = context.una_psn
    before = context.send_psn - una & PSN_MASK
    high = context.high_psn - una & PSN_MASK
    if before < high:
        again = min(count, high - before)
        qp.counters["retransmits"] += again
        context.retransmits += again
    context.send_psn = psn
    if (psn - una & PSN_MASK) > high:
        context.high_psn = psn
