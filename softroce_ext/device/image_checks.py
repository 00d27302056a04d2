"""What must hold of a queue pair's context and of the numbers in an image, beyond the kinds of its fields.

An image has a checksum, but whoever can write the file can write that too. What passes here can be run: no number is
longer than its place in a packet or a queue, and nothing refers to what is not there.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Final

from softroce_ext.device.errors import ImageError
from softroce_ext.device.image import Image
from softroce_ext.device.regions import KEY_BITS
from softroce_ext.transport.context import Acknowledge, QpContext, ReadAnswer, ResponderResource, SendRecord
from softroce_ext.transport.interfaces import RecvWqe, SendWqe, Sge
from softroce_ext.transport.requester import ATOMICS, LOCAL, SEGMENTATION
from softroce_ext.transport.states import MTUS
from softroce_ext.transport.verbs import QpState, QpType, WcStatus, WrOpcode
from softroce_ext.wire.headers import PSN_MASK

_U8, _U16, _U32, _U64 = (1 << 8) - 1, (1 << 16) - 1, (1 << 32) - 1, (1 << 64) - 1

CONTEXT_LIMITS: Final[dict[str, int]] = {
    "state": QpState.ERR, "destination_qpn": PSN_MASK, "qpn": PSN_MASK, "qp_access_flags": _U32, "pkey_index": _U16,
    "port_num": _U8, "qkey": _U32, "rq_psn": PSN_MASK, "sq_psn": PSN_MASK, "timeout": 31, "retry_cnt": 7,
    "rnr_retry": 7, "min_rnr_timer": 31, "max_rd_atomic": 128, "max_dest_rd_atomic": 128, "path_mig_state": 2,
    "una_psn": PSN_MASK, "send_psn": PSN_MASK, "high_psn": PSN_MASK, "next_psn": PSN_MASK, "cursor": _U16,
    "reads_out": _U16, "noack_packets": _U32, "retry_left": 7, "rnr_left": 7, "expected_psn": PSN_MASK, "msn": PSN_MASK,
    "message": _U8, "write_address": _U64, "write_rkey": _U32, "write_left": _U32, "write_length": _U32,
    "recv_offset": _U32, "pause_psn": PSN_MASK, "qp_type": _U8, "path_mtu": max(MTUS), "completed_sends": _U64,
    "completed_receives": _U64, "retransmits": _U64,
}  # fmt: skip
"""The largest value of each number of a context; the smallest is 0."""
_FLAGS: Final = tuple(item.name for item in fields(QpContext) if item.type == "bool")
_TIMES: Final = {item.name: item.type != "float" for item in fields(QpContext) if str(item.type).startswith("float")}
"""Each time of a context, and whether it may be None."""
_ETERNITY: Final = 1e12

_WQE_LIMITS: Final = {"wr_id": _U64, "opcode": _U32, "flags": _U32, "imm": _U32, "length": _U32,
                      "remote_address": _U64, "rkey": _U32, "compare_add": _U64, "swap": _U64}  # fmt: skip
_RESOURCE_LIMITS: Final = {"first_psn": PSN_MASK, "packets": PSN_MASK, "msn": PSN_MASK, "original": _U64,
                           "remote_address": _U64, "rkey": _U32, "length": _U32}  # fmt: skip
_ACK_LIMITS: Final = {"psn": PSN_MASK, "syndrome": _U8, "msn": PSN_MASK}
_RECORD_LIMITS: Final = {"first_psn": PSN_MASK, "packets": PSN_MASK, "status": max(WcStatus)}
_CONNECTED_OPCODES: Final = {*map(int, SEGMENTATION), *ATOMICS, int(WrOpcode.RDMA_READ)}
_MAX_ANSWERS: Final = 1024
_MAILBOX_DIGITS: Final = 2 * 4032


def _numbers(item: object, limits: dict[str, int], what: str) -> None:
    for name, limit in limits.items():
        value = getattr(item, name)
        if not isinstance(value, int) or not 0 <= value <= limit:
            raise ImageError(f"{what}: {name} = {value!r} is not in 0..{limit}")


def _elements(sges: tuple[Sge, ...], what: str) -> None:
    for sge in sges:
        if not all(isinstance(v, int) and 0 <= v <= most for v, most in zip(sge, (_U64, _U32, _U32), strict=True)):
            raise ImageError(f"{what}: element {sge!r}")


def _request(record: SendRecord, context: QpContext, what: str) -> None:
    wqe: SendWqe = record.wqe
    _numbers(wqe, _WQE_LIMITS, what)
    _numbers(record, _RECORD_LIMITS, what)
    _elements(wqe.sges, what)
    if wqe.inline is not None and len(wqe.inline) != wqe.length:
        raise ImageError(f"{what}: {len(wqe.inline)} inline bytes for a message of {wqe.length}")
    if record.status:
        return
    if (record.packets == 0) != (wqe.opcode in LOCAL) or wqe.opcode not in LOCAL | _CONNECTED_OPCODES:
        raise ImageError(f"{what}: opcode {wqe.opcode} with {record.packets} packets")
    message = wqe.opcode in SEGMENTATION or wqe.opcode == WrOpcode.RDMA_READ
    if message and record.packets != (-(-wqe.length // context.path_mtu) or 1):
        raise ImageError(f"{what}: {record.packets} packets for {wqe.length} bytes")
    if not message and record.packets > 1:
        raise ImageError(f"{what}: {record.packets} packets of one")


def check_context(context: QpContext) -> None:
    """Raise ImageError for a queue pair's context that no queue pair can have had."""
    what = f"queue pair {context.qpn}: context"
    _numbers(context, CONTEXT_LIMITS, what)
    for name in _FLAGS:
        if not isinstance(getattr(context, name), bool):
            raise ImageError(f"{what}: {name} = {getattr(context, name)!r} is not true or false")
    for name, optional in _TIMES.items():
        value = getattr(context, name)
        if not (value is None and optional) and not (isinstance(value, int | float) and abs(value) < _ETERNITY):
            raise ImageError(f"{what}: {name} = {value!r} is no time")
    if context.path_mtu not in MTUS:
        raise ImageError(f"{what}: path_mtu = {context.path_mtu}")
    connected = context.state >= QpState.RTR and context.qp_type != QpType.UD
    if context.path is None and (context.answers or (connected and context.state != QpState.ERR)):
        raise ImageError(f"{what}: in state {context.state} without a path")
    if context.cursor > len(context.inflight) or len(context.answers) > _MAX_ANSWERS:
        raise ImageError(f"{what}: cursor {context.cursor}, {len(context.answers)} answers")
    psn = None
    for record in context.inflight:
        _request(record, context, f"{what}.inflight")
        if psn is not None and record.first_psn != psn and not record.status:
            raise ImageError(f"{what}.inflight: PSN {record.first_psn}, expected {psn}")
        psn = record.first_psn + record.packets & PSN_MASK
    _positions(context, what)
    receive: RecvWqe | None = context.recv_wqe
    if receive is not None:
        _numbers(receive, {"wr_id": _U64, "length": _U32}, f"{what}.recv_wqe")
        _elements(receive.sges, f"{what}.recv_wqe")
    answered: list[ResponderResource] = list(context.resources)
    for answer in context.answers:
        if isinstance(answer, Acknowledge):
            _numbers(answer, _ACK_LIMITS, f"{what}.answers")
            continue
        answered.append(answer.resource)
        if isinstance(answer, ReadAnswer):
            _numbers(answer, {"next_packet": answer.resource.packets - 1}, f"{what}.answers")
    for resource in answered:
        _numbers(resource, _RESOURCE_LIMITS, f"{what}.resources")
        if not resource.atomic and resource.packets != (-(-resource.length // context.path_mtu) or 1):
            raise ImageError(f"{what}.resources: {resource.packets} packets for {resource.length} bytes")


def _positions(context: QpContext, what: str) -> None:
    """The requester's PSNs lie in order, and on the requests that it keeps."""
    if not context.inflight:
        if len({context.una_psn, context.send_psn, context.high_psn, context.next_psn}) > 1:
            raise ImageError(f"{what}: PSNs {context.una_psn}, {context.next_psn} apart, and no request")
        return
    begin = context.inflight[0].first_psn
    end = context.inflight[-1].first_psn + context.inflight[-1].packets & PSN_MASK
    whole = end - begin & PSN_MASK
    una, send, high = (psn - begin & PSN_MASK for psn in (context.una_psn, context.send_psn, context.high_psn))
    if not una <= high <= whole or not una <= send <= whole or context.next_psn != end:
        raise ImageError(f"{what}: PSNs {context.una_psn}, {context.send_psn}, {context.high_psn} of no request")
    if una and una >= context.inflight[0].packets:
        raise ImageError(f"{what}: PSN {context.una_psn} is behind the oldest request, which is complete then")
    if context.cursor < len(context.inflight):
        record = context.inflight[context.cursor]
        if record.packets and send - (record.first_psn - begin & PSN_MASK) >= record.packets:
            raise ImageError(f"{what}: cursor {context.cursor} is not where the PSN {context.send_psn} is")


def check_image(image: Image) -> None:
    """Raise ImageError for keys or numbers that two objects of an image cannot both have."""
    for record in image.contexts:
        for mr in record.mrs:
            if mr.start + mr.length > 1 << 64 or mr.iova + mr.length > 1 << 64:
                raise ImageError(f"context {record.id}: region {mr.handle} wraps")
        if len(record.mailbox) > _MAILBOX_DIGITS:
            raise ImageError(f"context {record.id}: a mailbox of {len(record.mailbox) // 2} bytes")
        keys = [mr.key >> KEY_BITS for mr in record.mrs] + [mw.key >> KEY_BITS for mw in record.mws]
        for what, numbers in (("key", keys), ("AH number", [ah.number for ah in record.ahs]),
                              ("QPN", [qp.context.get("qpn") for qp in record.qps])):  # fmt: skip
            if len(set(map(repr, numbers))) != len(numbers):
                raise ImageError(f"context {record.id}: two objects have the same {what}")
