"""The requester of a reliable connection: which packets may leave now (IBA 9.7.3, 9.7.7)."""

from __future__ import annotations

from softroce_ext.transport.interfaces import FrameSink, MemoryFault, ProtectionError
from softroce_ext.transport.rc.connection import Connection
from softroce_ext.transport.rc.retry import start_ack_timer
from softroce_ext.transport.scatter import resolve
from softroce_ext.transport.segmentation import ATOMICS, admit, count_retransmits, local_operation, send_data
from softroce_ext.transport.state.sender import SendRecord
from softroce_ext.transport.verbs import READS, Access, QpState, SendFlag, WcStatus, WrOpcode
from softroce_ext.wire import opcodes as op
from softroce_ext.wire.headers import ACK_REQ, BTH_ATOMIC_ETH, BTH_RETH, PKEY_DEFAULT, PSN_MASK, SOLICITED

_RTS = int(QpState.RTS)
_RDMA_READ = int(WrOpcode.RDMA_READ)
_COMPARE_SWAP = int(WrOpcode.ATOMIC_CMP_AND_SWP)
_LOCAL_WRITE = int(Access.LOCAL_WRITE)
_FENCE = int(SendFlag.FENCE)
_SOLICITED_FLAG = int(SendFlag.SOLICITED)


def send_requests(qp: Connection, now: float, sink: FrameSink, budget: int) -> int:
    """HOT. Send up to `budget` request packets; returns how many. `qp.more` tells whether the budget ended it."""
    attributes, sender = qp.attributes, qp.sender
    window, observer = qp.engine.window, qp.engine.observer
    sent = 0
    while sent < budget:
        inflight = sender.inflight
        if sender.cursor < len(inflight):
            record = inflight[sender.cursor]
            if record.status:
                return sent  # failed at this end; it waits until it is the oldest
        else:
            if attributes.state != _RTS:
                return sent  # SQD starts nothing new
            wqe = qp.send_queue.fetch()
            if wqe is None:
                return sent
            if observer is not None:
                observer.fetched(attributes.qpn, wqe)
            record = admit(sender, attributes, wqe)
            if record.status:
                qp.settle(now)
                return sent
        wqe = record.wqe
        if sender.reads_out:
            if wqe.flags & _FENCE and sender.send_psn == record.first_psn:
                return sent
            if wqe.opcode in READS and sender.reads_out >= attributes.max_rd_atomic:
                return sent
        if record.packets == 0:
            if record.done:
                sender.skip()  # went back over it: it is performed once only
                continue
            local_operation(qp, record, now)
            budget -= 1  # it sends nothing, but a program may post them without end
            continue
        room = window - (sender.send_psn - sender.una_psn & PSN_MASK)
        if room <= 0:
            if sender.noack_packets < window:
                return sent
            room = 1  # the window was larger, and no outstanding packet asks for an ACK: the next one does
        try:
            if wqe.opcode in READS:
                _send_read(qp, record, sink)
                count = 1
            else:
                count = send_data(qp, record, sink, min(budget - sent, room))
        except (ProtectionError, MemoryFault, ValueError):
            record.status = WcStatus.LOC_PROT_ERR
            qp.settle(now)
            return sent
        sent += count
        if sender.ack_deadline is None:
            start_ack_timer(qp, now)
    qp.more = True
    return sent


def _send_read(qp: Connection, record: SendRecord, sink: FrameSink) -> None:
    """One READ or atomic request; a READ that continues after a loss asks for the rest only."""
    attributes, sender = qp.attributes, qp.sender
    wqe = record.wqe
    psn = sender.send_psn
    path = attributes.path
    assert path is not None
    # The answer will be written: find out now whether it may be.
    resolve(qp.pd, wqe.sges, _LOCAL_WRITE)
    third = (ACK_REQ | qp.capability) << 24 | psn
    sender.noack_packets = 0
    solicited = SOLICITED if wqe.flags & _SOLICITED_FLAG else 0
    if wqe.opcode == _RDMA_READ:
        done = (psn - record.first_psn & PSN_MASK) * attributes.path_mtu
        headers = BTH_RETH.pack(
            op.READ_REQUEST << 24 | solicited | PKEY_DEFAULT, attributes.destination_qpn, third,
            wqe.remote_address + done & 0xFFFFFFFFFFFFFFFF, wqe.rkey, wqe.length - done,
        )  # fmt: skip
    else:
        # FETCH ADD carries its operand where COMPARE SWAP carries the new value.
        swap = wqe.opcode == _COMPARE_SWAP
        headers = BTH_ATOMIC_ETH.pack(
            ATOMICS[wqe.opcode] << 24 | solicited | PKEY_DEFAULT, attributes.destination_qpn, third,
            wqe.remote_address, wqe.rkey, wqe.swap if swap else wqe.compare_add, wqe.compare_add if swap else 0,
        )  # fmt: skip
    sink.add(path, headers, b"", 0)
    sender.reads_out += 1
    again = sender.sent(1, record.first_psn + record.packets & PSN_MASK, True)
    if again:
        count_retransmits(qp, again)
