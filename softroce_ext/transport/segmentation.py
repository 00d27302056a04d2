"""Segmentation: from the send work requests of a connection, RC or UC, to packets (IBA 9.3, 9.7.2, 9.8.2).

Each request gets its PSNs when it is fetched: one per packet, for a READ one per response packet. A packet's contents
follow from its request and its PSN.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from softroce_ext.transport.interfaces import FrameSink, ProtectionDomain, ProtectionError, SendWqe
from softroce_ext.transport.queue_pair import QueuePair
from softroce_ext.transport.scatter import gather
from softroce_ext.transport.state.attributes import Attributes
from softroce_ext.transport.state.sender import Sender, SendRecord
from softroce_ext.transport.verbs import SendFlag, WcStatus, WrOpcode
from softroce_ext.wire import opcodes as op
from softroce_ext.wire.headers import (
    BTH,
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

_RDMA_READ = int(WrOpcode.RDMA_READ)
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


def admit(sender: Sender, attributes: Attributes, wqe: SendWqe) -> SendRecord:
    """HOT. Give a fetched request its PSNs and put it behind the others."""
    opcode = wqe.opcode
    packets = 1
    status = 0
    if opcode in SEGMENTATION or opcode == _RDMA_READ:
        packets = -(-wqe.length // attributes.path_mtu) or 1
        if wqe.length > MAX_MESSAGE:
            status = WcStatus.LOC_LEN_ERR
        elif opcode == _RDMA_READ and attributes.max_rd_atomic == 0:
            status = WcStatus.LOC_QP_OP_ERR
    elif opcode in ATOMICS:
        if attributes.max_rd_atomic == 0 or wqe.length != 8:
            status = WcStatus.LOC_QP_OP_ERR
    elif opcode in LOCAL:
        packets = 0
    else:
        status = WcStatus.LOC_QP_OP_ERR
    if status:
        packets = 0
    return sender.admit(wqe, packets, status)


def local_operation(qp: QueuePair, record: SendRecord, now: float) -> None:
    """LOCAL_INV and BIND_MW: performed by the device when their turn to be sent comes."""
    try:
        qp.pd.local_operation(record.wqe, qp.attributes.qpn)
    except ProtectionError:
        bind = record.wqe.opcode == WrOpcode.BIND_MW
        record.status = WcStatus.MW_BIND_ERR if bind else WcStatus.LOC_QP_OP_ERR
    else:
        record.done = True
        qp.sender.skip()
    qp.settle(now)


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
    attributes, sender = qp.attributes, qp.sender
    wqe = record.wqe
    mtu = attributes.path_mtu
    psn = sender.send_psn
    at = psn - record.first_psn & PSN_MASK
    packets = record.packets
    count = packets - at
    if count > limit:
        count = limit
    begin = at * mtu
    length = wqe.length - begin
    if length > count * mtu:
        length = count * mtu
    data = message_data(qp.pd, wqe, begin, length)
    path = attributes.path
    assert path is not None
    add = sink.add
    remote = attributes.destination_qpn
    capability = qp.capability << 24
    asking = (qp.ack_request | qp.capability) << 24
    service = qp.service
    noack = sender.noack_packets
    every = qp.config.packets_per_ackreq
    if 3 * every > 2 * qp.engine.window:  # else the sender would wait for an ACK that it has not asked for
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
    sender.noack_packets = noack
    again = sender.sent(count, psn, at + count == packets)
    if again:
        count_retransmits(qp, again)
    return count


def count_retransmits(qp: QueuePair, packets: int) -> None:
    """`packets` request packets were sent again."""
    qp.counters["retransmits"] += packets
    qp.statistics.retransmitted(packets)


def message_data(pd: ProtectionDomain, wqe: SendWqe, begin: int, length: int) -> memoryview:
    """HOT. Bytes begin..begin+length of a message; valid until the memory's next read. Raises as `send_data`."""
    if wqe.inline is None:
        return memoryview(gather(pd, wqe.sges, begin, length))
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
