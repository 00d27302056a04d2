"""What must hold of a queue pair's state and of the numbers in an image, beyond the kinds of its fields.

An image has a checksum, but a program that can write the file can write that, too. An image that passes here can be
run: no number is longer than its place in a packet or a queue, and nothing refers to what is not there.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Final

from softroce_ext.device.errors import ImageError
from softroce_ext.device.image import Image, qpn_of
from softroce_ext.device.regions import KEY_BITS
from softroce_ext.transport.interfaces import SendWqe, Sge
from softroce_ext.transport.segmentation import ATOMICS, LOCAL, SEGMENTATION
from softroce_ext.transport.state.attributes import MTUS, Attributes
from softroce_ext.transport.state.fields import MOST, U32, U64
from softroce_ext.transport.state.queue_pair import RECORDS, QueuePairState, check_version
from softroce_ext.transport.state.receiver import Acknowledge, ReadAnswer, Receiver, ResponderResource
from softroce_ext.transport.state.sender import Sender, SendRecord
from softroce_ext.transport.verbs import QpState, QpType, WrOpcode
from softroce_ext.wire.headers import PSN_MASK

_ETERNITY: Final = 1e12

_WQE_LIMITS: Final = {"wr_id": U64, "opcode": U32, "flags": U32, "imm": U32, "length": U32,
                      "remote_address": U64, "rkey": U32, "compare_add": U64, "swap": U64}  # fmt: skip
_CONNECTED_OPCODES: Final = {*map(int, SEGMENTATION), *ATOMICS, int(WrOpcode.RDMA_READ)}
_RECORDS_OR_NULL: Final = ("path", "recv_wqe")
"""Fields that are a record or null."""
_MAX_ANSWERS: Final = 1024
_MAILBOX_DIGITS: Final = 2 * 4032


def _numbers(item: object, limits: dict[str, int], what: str) -> None:
    for name, limit in limits.items():
        _number(getattr(item, name), limit, f"{what}: {name}")


def _number(value: object, limit: int, what: str) -> None:
    if not isinstance(value, int) or not 0 <= value <= limit:
        raise ImageError(f"{what} = {value!r} is not in 0..{limit}")


def _fields(record: object, what: str) -> None:
    """Check the numbers, flags and times of a record against what is declared beside its fields (`state.fields`)."""
    for item in fields(record):  # type: ignore[arg-type]
        value = getattr(record, item.name)
        if MOST in item.metadata:
            if value is None and item.type == "int | None":
                continue
            _number(value, item.metadata[MOST], f"{what}: {item.name}")
        elif item.type == "bool":
            if not isinstance(value, bool):
                raise ImageError(f"{what}: {item.name} = {value!r} is not true or false")
        elif str(item.type).startswith("float"):
            unset = value is None and item.type != "float"
            if not unset and not (isinstance(value, int | float) and abs(value) < _ETERNITY):
                raise ImageError(f"{what}: {item.name} = {value!r} is not a time")


def _elements(sges: tuple[Sge, ...], what: str) -> None:
    for sge in sges:
        if not all(isinstance(v, int) and 0 <= v <= most for v, most in zip(sge, (U64, U32, U32), strict=True)):
            raise ImageError(f"{what}: element {sge!r}")


def _request(record: SendRecord, path_mtu: int, what: str) -> None:
    wqe: SendWqe = record.wqe
    _numbers(wqe, _WQE_LIMITS, what)
    _fields(record, what)
    _elements(wqe.sges, what)
    if wqe.inline is not None and len(wqe.inline) != wqe.length:
        raise ImageError(f"{what}: {len(wqe.inline)} inline bytes for a message of {wqe.length}")
    if record.status:
        return
    if (record.packets == 0) != (wqe.opcode in LOCAL) or wqe.opcode not in LOCAL | _CONNECTED_OPCODES:
        raise ImageError(f"{what}: opcode {wqe.opcode} with {record.packets} packets")
    message = wqe.opcode in SEGMENTATION or wqe.opcode == WrOpcode.RDMA_READ
    if message and record.packets != (-(-wqe.length // path_mtu) or 1):
        raise ImageError(f"{what}: {record.packets} packets for {wqe.length} bytes")
    if not message and record.packets > 1:
        raise ImageError(f"{what}: {record.packets} packets of one")


def check_shape(plain: dict[str, Any]) -> None:
    """Raise ImageError when a field of a dumped queue pair's state is missing or of another kind than it should be.

    ValueError for another version.
    """
    check_version(plain)
    template = QueuePairState(Attributes(0)).to_plain()
    for name in RECORDS:
        record = plain.get(name)
        where = f"state of a queue pair: {name}"
        if not isinstance(record, dict):
            raise ImageError(f"{where} is missing" if name not in plain else f"{where} is {record!r}, expected dict")
        for field_name, default in template[name].items():
            if field_name not in record:
                raise ImageError(f"{where}.{field_name} is missing")
            _kind(record[field_name], default, field_name in _RECORDS_OR_NULL, f"{where}.{field_name}")


def _kind(value: object, default: object, record: bool, what: str) -> None:
    if default is None or value is None:
        if not (record or value is None or isinstance(value, (int, float))):
            raise ImageError(f"{what} is {value!r}, expected a number or null")
    elif type(value) is not type(default) and not (type(default) is float and type(value) is int):
        raise ImageError(f"{what} is {value!r}, expected {type(default).__name__}")


def check_state(state: QueuePairState) -> None:
    """Raise ImageError for a state that no queue pair can have had."""
    what = f"queue pair {state.attributes.qpn}"
    for name in RECORDS:
        _fields(getattr(state, name), f"{what}: {name}")
    _check_path(state, what)
    _check_sender(state.sender, state.attributes.path_mtu, f"{what}: sender")
    _check_receiver(state.receiver, state.attributes.path_mtu, f"{what}: receiver")


def _check_path(state: QueuePairState, what: str) -> None:
    attributes = state.attributes
    if attributes.path_mtu not in MTUS:
        raise ImageError(f"{what}: path_mtu = {attributes.path_mtu}")
    connected = QpState.RTR <= attributes.state != QpState.ERR and attributes.qp_type != QpType.UD
    if attributes.path is None and (connected or state.receiver.answers):
        raise ImageError(f"{what}: in state {attributes.state} without a path")


def _check_sender(sender: Sender, path_mtu: int, what: str) -> None:
    if sender.cursor > len(sender.inflight):
        raise ImageError(f"{what}: cursor {sender.cursor} of {len(sender.inflight)} requests")
    psn = None
    for record in sender.inflight:
        _request(record, path_mtu, f"{what}.inflight")
        if psn is not None and record.first_psn != psn and not record.status:
            raise ImageError(f"{what}.inflight: PSN {record.first_psn}, expected {psn}")
        psn = record.first_psn + record.packets & PSN_MASK
    _positions(sender, what)


def _check_receiver(receiver: Receiver, path_mtu: int, what: str) -> None:
    if len(receiver.answers) > _MAX_ANSWERS:
        raise ImageError(f"{what}: {len(receiver.answers)} answers")
    receive = receiver.recv_wqe
    if receive is not None:
        _numbers(receive, {"wr_id": U64, "length": U32}, f"{what}.recv_wqe")
        _elements(receive.sges, f"{what}.recv_wqe")
    answered: list[ResponderResource] = list(receiver.resources)
    for answer in receiver.answers:
        if isinstance(answer, Acknowledge):
            _fields(answer, f"{what}.answers")
            continue
        answered.append(answer.resource)
        if isinstance(answer, ReadAnswer):
            _numbers(answer, {"next_packet": answer.resource.packets - 1}, f"{what}.answers")
    for resource in answered:
        _fields(resource, f"{what}.resources")
        if not resource.atomic and resource.packets != (-(-resource.length // path_mtu) or 1):
            raise ImageError(f"{what}.resources: {resource.packets} packets for {resource.length} bytes")


def _positions(sender: Sender, what: str) -> None:
    """The PSNs are in order, and on the requests in flight."""
    inflight = sender.inflight
    if not inflight:
        if len({sender.una_psn, sender.send_psn, sender.high_psn, sender.next_psn}) > 1:
            raise ImageError(f"{what}: PSNs {sender.una_psn}, {sender.next_psn} apart, and no request")
        return
    begin = inflight[0].first_psn
    end = inflight[-1].first_psn + inflight[-1].packets & PSN_MASK
    whole = end - begin & PSN_MASK
    una, send, high = (psn - begin & PSN_MASK for psn in (sender.una_psn, sender.send_psn, sender.high_psn))
    if not una <= high <= whole or not una <= send <= whole or sender.next_psn != end:
        raise ImageError(f"{what}: PSNs {sender.una_psn}, {sender.send_psn}, {sender.high_psn} of no request")
    if una and una >= inflight[0].packets:
        raise ImageError(f"{what}: PSN {sender.una_psn} is behind the oldest request, which is complete then")
    if sender.cursor < len(inflight):
        record = inflight[sender.cursor]
        if record.packets and send - (record.first_psn - begin & PSN_MASK) >= record.packets:
            raise ImageError(f"{what}: cursor {sender.cursor} is not where the PSN {sender.send_psn} is")


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
                              ("QPN", [qpn_of(qp) for qp in record.qps])):  # fmt: skip
            if len(set(map(repr, numbers))) != len(numbers):
                raise ImageError(f"context {record.id}: two objects have the same {what}")
