"""The command ABI of /dev/infiniband/rdma_cm (rdma/rdma_user_cm.h, version 4): one handler for each command.

A handler gets the manager, the file that the command was written to, the command's body and the time; it returns the
answer's bytes. VerbsError is the answer's errno; a body shorter than its structure is EINVAL.
"""

from __future__ import annotations

import errno
import struct
from struct import Struct
from typing import Final

from softroce_ext.cm import commands_query  # enters its handlers into the table
from softroce_ext.cm.commands import HANDLERS, Body, Command, get, handles
from softroce_ext.cm.ids import (
    MAX_BACKLOG,
    PS_IB,
    PS_IPOIB,
    PS_TCP,
    PS_UDP,
    Endpoint,
    EventType,
    IdState,
)
from softroce_ext.cm.interfaces import File
from softroce_ext.cm.manager import CommunicationManager
from softroce_ext.cm.messages import Reason
from softroce_ext.cm.params import ConnParam
from softroce_ext.device.errors import VerbsError
from softroce_ext.transport.verbs import QpEvent, QpType

__all__ = ["ABI_VERSION", "HANDLERS", "HEADER", "Command", "commands_query", "execute"]

ABI_VERSION: Final = 4
HEADER: Final = Struct("<IHH")
"""struct rdma_ucm_cmd_hdr: command, bytes in, bytes out."""

_U32 = Struct("<I")
_ID_AT_8 = Struct("<8xI")
_LONGEST: Final = 512
"""Bytes; no command's structure is longer."""
LEAST: Final = {Command.CONNECT: 280, Command.ACCEPT: 288}
"""Bytes that the kernel requires of these bodies. Of the others it reads the whole structure from the program's memory,
however few bytes were written; here the missing ones are zeros."""
ROOM: Final = {
    Command.CREATE_ID: 4, Command.DESTROY_ID: 4, Command.QUERY_ROUTE: 200, Command.INIT_QP_ATTR: 144,
    Command.GET_EVENT: 324, Command.JOIN_IP_MCAST: 4, Command.JOIN_MCAST: 4, Command.LEAVE_MCAST: 4,
}  # fmt: skip
"""Bytes of an answer for which there must be room."""


def execute(cm: CommunicationManager, file: File, message: bytes, now: float) -> bytes:
    """Run one command. Raises VerbsError."""
    try:
        command, length, room = HEADER.unpack_from(message)
    except struct.error:
        raise VerbsError(errno.EINVAL, "the command is shorter than its header") from None
    handler = HANDLERS.get(command)
    if handler is None:
        raise VerbsError(errno.ENOSYS if command == Command.GET_OPTION else errno.EINVAL, f"command {command}")
    if length + HEADER.size > len(message):
        raise VerbsError(errno.EINVAL, "the command is shorter than its header says")
    if room < ROOM.get(command, 0):
        raise VerbsError(errno.ENOSPC, f"the answer does not fit into {room} bytes")
    if length < LEAST.get(command, 0):
        raise VerbsError(errno.EINVAL, "the command is shorter than its structure")
    body = message[HEADER.size : HEADER.size + _LONGEST].ljust(_LONGEST, b"\0")
    answer = handler(cm, file, memoryview(body), now)
    if command == Command.QUERY and room < commands_query.room_for(body):
        raise VerbsError(errno.ENOSPC, f"the answer does not fit into {room} bytes")
    return answer[:room]


@handles(Command.CREATE_ID)
def create_id(cm: CommunicationManager, file: File, body: Body, now: float) -> bytes:
    uid, port_space, qp_type = Struct("<Q8xHB").unpack_from(body)
    kinds = {PS_TCP: QpType.RC, PS_UDP: QpType.UD, PS_IPOIB: QpType.UD, PS_IB: QpType.RC}
    others = {PS_TCP: (QpType.UC,), PS_IB: (QpType.UC, QpType.UD)}
    if port_space not in kinds:
        raise VerbsError(errno.EINVAL, f"port space {port_space:#x}")
    # As in the kernel, only the InfiniBand port space chooses its type; UC under TCP is what librdmacm may ask for.
    kind = qp_type if qp_type in others.get(port_space, ()) else int(kinds[port_space])
    return _U32.pack(cm.create(file.queue, uid, port_space, kind).handle)


@handles(Command.DESTROY_ID)
def destroy_id(cm: CommunicationManager, file: File, body: Body, now: float) -> bytes:
    return _U32.pack(cm.destroy(get(cm, file, _ID_AT_8.unpack_from(body)[0]), now))


def _endpoint(data: Body, size: int | None = None) -> Endpoint:
    endpoint = Endpoint.unpack(data, size)
    if endpoint is None:
        raise VerbsError(errno.EINVAL, "the address is missing")
    return endpoint


@handles(Command.BIND_IP)
def bind_ip(cm: CommunicationManager, file: File, body: Body, now: float) -> bytes:
    address, handle = Struct("<8x28sI").unpack_from(body)
    endpoint = _endpoint(address)
    cm.addresses.bind(get(cm, file, handle), endpoint)
    return b""


@handles(Command.BIND)
def bind(cm: CommunicationManager, file: File, body: Body, now: float) -> bytes:
    handle, size, reserved, address = Struct("<IHH128s").unpack_from(body)
    if reserved:
        raise VerbsError(errno.EINVAL, "reserved bytes must be 0")
    endpoint = _endpoint(address, size)
    cm.addresses.bind(get(cm, file, handle), endpoint)
    return b""


@handles(Command.RESOLVE_IP)
def resolve_ip(cm: CommunicationManager, file: File, body: Body, now: float) -> bytes:
    source, destination, handle, timeout = Struct("<28s28sII").unpack_from(body)
    begin, end = Endpoint.unpack(source), _endpoint(destination)
    cm.resolve_addr(get(cm, file, handle), begin, end, timeout / 1000, now)
    return b""


@handles(Command.RESOLVE_ADDR)
def resolve_addr(cm: CommunicationManager, file: File, body: Body, now: float) -> bytes:
    handle, timeout, source_size, size, reserved, source, destination = Struct("<IIHHI128s128s").unpack_from(body)
    if reserved:
        raise VerbsError(errno.EINVAL, "reserved bytes must be 0")
    begin = Endpoint.unpack(source, source_size) if source_size else None
    end = _endpoint(destination, size)
    cm.resolve_addr(get(cm, file, handle), begin, end, timeout / 1000, now)
    return b""


@handles(Command.RESOLVE_ROUTE)
def resolve_route(cm: CommunicationManager, file: File, body: Body, now: float) -> bytes:
    handle, timeout = Struct("<II").unpack_from(body)
    cm_id = get(cm, file, handle)
    if not timeout:
        raise VerbsError(errno.EINVAL, "timeout must be > 0")
    cm.resolve_route(cm_id)
    return b""


@handles(Command.CONNECT)
def connect(cm: CommunicationManager, file: File, body: Body, now: float) -> bytes:
    param = ConnParam.unpack(body, 0)
    if not param.valid:
        raise VerbsError(errno.EINVAL, "the parameters are not valid")
    handle, *ece = Struct("<I4xII").unpack_from(body, 272)
    cm.connect(get(cm, file, handle), param._replace(ece=tuple(ece)), now)
    return b""


@handles(Command.LISTEN)
def listen(cm: CommunicationManager, file: File, body: Body, now: float) -> bytes:
    handle, backlog = Struct("<Ii").unpack_from(body)
    cm.listen(get(cm, file, handle), backlog if 0 < backlog < MAX_BACKLOG else MAX_BACKLOG)
    return b""


@handles(Command.ACCEPT)
def accept(cm: CommunicationManager, file: File, body: Body, now: float) -> bytes:
    handle, *ece = Struct("<I4xII").unpack_from(body, 280)
    param = ConnParam.unpack(body, 8)._replace(ece=tuple(ece))
    uid = Struct("<Q").unpack_from(body)[0]
    cm.accept(get(cm, file, handle), uid, param if param.valid else None, now)
    return b""


REASONS: Final = (0, Reason.CONSUMER_DEFINED, Reason.VENDOR_OPTION_NOT_SUPPORTED)
"""The reasons with which a program may reject; 0 means the first."""


@handles(Command.REJECT)
def reject(cm: CommunicationManager, file: File, body: Body, now: float) -> bytes:
    handle, length, reason, private = Struct("<IBBxx256s").unpack_from(body)
    if reason not in REASONS:
        raise VerbsError(errno.EINVAL, f"a program cannot reject with reason {reason}")
    cm.reject(get(cm, file, handle), reason, private[:length])
    return b""


@handles(Command.DISCONNECT)
def disconnect(cm: CommunicationManager, file: File, body: Body, now: float) -> bytes:
    cm.disconnect(get(cm, file, _U32.unpack_from(body)[0]), now)
    return b""


@handles(Command.NOTIFY)
def notify(cm: CommunicationManager, file: File, body: Body, now: float) -> bytes:
    handle, event = Struct("<II").unpack_from(body)
    cm_id = get(cm, file, handle)
    if event != QpEvent.COMM_EST:
        raise VerbsError(errno.EINVAL, f"unsupported event {event}")
    cm.notify(cm_id)
    return b""


_EVENT = Struct("<QIIi304s4xII")
"""struct rdma_ucm_event_resp; its last two numbers are struct rdma_ucm_ece."""


@handles(Command.GET_EVENT)
def get_event(cm: CommunicationManager, file: File, body: Body, now: float) -> bytes:
    """EAGAIN when there is none: the bridge waits at the FIFO for a program that blocks."""
    event = file.queue.take()
    cm.on_event_taken(event)
    subject = event.child if event.kind is EventType.CONNECT_REQUEST else event.counted
    assert subject is not None
    uid = event.group.uid if event.group is not None else event.counted.uid
    return _EVENT.pack(uid, subject.handle, event.kind.value, event.status, event.param, *event.ece)


OPTION_ID, OPTION_IB, IB_PATH = 0, 1, 1
MAX_OPTION: Final = 1 << 22
"""Bytes (the kernel's largest allocation)."""
SIZES: Final = {0: 1, 1: 4, 2: 4, 3: 1}
"""Bytes of the options of an id: class of traffic, reuse of the address, this family only, ACK timeout."""


@handles(Command.SET_OPTION)
def set_option(cm: CommunicationManager, file: File, body: Body, now: float) -> bytes:
    address, handle, level, name, length = Struct("<QIIII").unpack_from(body)
    cm_id = get(cm, file, handle)
    if length > MAX_OPTION:
        raise VerbsError(errno.EINVAL, f"option {name} of {length} bytes")
    held = file.read(address, length) if length else b""
    if level == OPTION_IB and name == IB_PATH:
        raise VerbsError(errno.EINVAL, "on Ethernet the path follows from the address")
    if level != OPTION_ID or name not in SIZES:
        raise VerbsError(errno.ENOSYS, f"option {name} of level {level}")
    if length != SIZES[name]:
        raise VerbsError(errno.EINVAL, f"option {name} of {length} bytes")
    value = int.from_bytes(held, "little")
    if name == 0:
        cm_id.tos = value
    elif name == 3:
        if cm_id.qp_type == QpType.UD:
            raise VerbsError(errno.EINVAL, "datagrams are not acknowledged")
        cm_id.ack_timeout = min(value, 31)
    elif name == 1:
        if cm_id.state is IdState.LISTEN or not (value or cm_id.state is IdState.IDLE):
            raise VerbsError(errno.EINVAL, "the option cannot be set in this state")
        cm_id.reuse = bool(value)
    else:
        if cm_id.state not in (IdState.IDLE, IdState.BOUND):
            raise VerbsError(errno.EINVAL, "the option cannot be set in this state")
        cm_id.family_only = bool(value)
    return b""


@handles(Command.JOIN_IP_MCAST)
def join_ip_mcast(cm: CommunicationManager, file: File, body: Body, now: float) -> bytes:
    uid, address, handle = Struct("<8xQ28sI").unpack_from(body)
    endpoint = _endpoint(address)
    return _U32.pack(cm.groups.join(get(cm, file, handle), uid, endpoint).handle)


@handles(Command.JOIN_MCAST)
def join_mcast(cm: CommunicationManager, file: File, body: Body, now: float) -> bytes:
    uid, handle, size, flags, address = Struct("<8xQIHH128s").unpack_from(body)
    if flags > 1:
        raise VerbsError(errno.EINVAL, f"flags {flags:#x}")
    endpoint = _endpoint(address, size)
    return _U32.pack(cm.groups.join(get(cm, file, handle), uid, endpoint).handle)


@handles(Command.LEAVE_MCAST)
def leave_mcast(cm: CommunicationManager, file: File, body: Body, now: float) -> bytes:
    group = cm.groups.by_handle.get(_ID_AT_8.unpack_from(body)[0])
    if group is None or group.cm_id.queue is not file.queue:
        raise VerbsError(errno.ENOENT, "there is no such membership")
    return _U32.pack(cm.groups.leave(group))


@handles(Command.MIGRATE_ID)
def migrate_id(cm: CommunicationManager, file: File, body: Body, now: float) -> bytes:
    """Written to the new file; `fd` names the old one."""
    handle, descriptor = Struct("<8xII").unpack_from(body)
    old = file.sibling(descriptor)
    return _U32.pack(cm.migrate(get(cm, old, handle), file.queue))
