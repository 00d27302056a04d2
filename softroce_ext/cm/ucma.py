"""The command ABI of /dev/infiniband/rdma_cm (rdma/rdma_user_cm.h, version 4): one handler for each command.

A handler gets the manager, the file that the command was written to, the command's body and the time; it returns the
answer's bytes. VerbsError is the answer's errno; a body shorter than its structure is EINVAL.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from enum import IntEnum
from struct import Struct
from typing import Any, Final

from softroce_ext.cm.ids import (
    MAX_BACKLOG,
    PS_IPOIB,
    PS_TCP,
    PS_UDP,
    QPT_RC,
    QPT_UC,
    QPT_UD,
    SOCKADDR_BYTES,
    CmId,
    Endpoint,
    EventType,
    IdState,
)
from softroce_ext.cm.manager import UDP_QKEY, CommunicationManager
from softroce_ext.cm.params import ConnParam, ah_attr
from softroce_ext.device.addressing import gid_of
from softroce_ext.device.errors import VerbsError
from softroce_ext.transport.verbs import QpState

ABI_VERSION: Final = 4
HEADER: Final = Struct("<IHH")
"""struct rdma_ucm_cmd_hdr: command, bytes in, bytes out."""

Body = memoryview
Handler = Callable[[CommunicationManager, Any, Body, float], bytes]
_U32 = Struct("<I")
_ID_AT_8 = Struct("<8xI")


class Command(IntEnum):
    """RDMA_USER_CM_CMD_*."""

    CREATE_ID = 0
    DESTROY_ID = 1
    BIND_IP = 2
    RESOLVE_IP = 3
    RESOLVE_ROUTE = 4
    QUERY_ROUTE = 5
    CONNECT = 6
    LISTEN = 7
    ACCEPT = 8
    REJECT = 9
    DISCONNECT = 10
    INIT_QP_ATTR = 11
    GET_EVENT = 12
    GET_OPTION = 13
    SET_OPTION = 14
    NOTIFY = 15
    JOIN_IP_MCAST = 16
    LEAVE_MCAST = 17
    MIGRATE_ID = 18
    QUERY = 19
    BIND = 20
    RESOLVE_ADDR = 21
    JOIN_MCAST = 22


HANDLERS: Final[dict[int, Handler]] = {}


def _handles(command: Command) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        HANDLERS[command] = handler
        return handler

    return register


def execute(cm: CommunicationManager, file: Any, message: bytes, now: float) -> bytes:
    """Run one command. Raises VerbsError."""
    try:
        command, length, room = HEADER.unpack_from(message)
        handler = HANDLERS.get(command)
        if handler is None:
            raise VerbsError(errno.EINVAL, f"command {command}")
        if length + HEADER.size > len(message):
            raise VerbsError(errno.EINVAL, "shorter than its header says")
        return handler(cm, file, memoryview(message)[HEADER.size :], now)[:room]
    except struct.error:
        raise VerbsError(errno.EINVAL, "shorter than its structure") from None


def _get(cm: CommunicationManager, file: Any, handle: int) -> CmId:
    """The id of a handle; another program's is as unknown as none."""
    cm_id = cm.ids.get(handle)
    if cm_id is None:
        raise VerbsError(errno.ENOENT, f"no rdma_cm id {handle}")
    if cm_id.queue is not file.queue:
        raise VerbsError(errno.EINVAL, f"rdma_cm id {handle} belongs to another file")
    return cm_id


@_handles(Command.CREATE_ID)
def create_id(cm: CommunicationManager, file: Any, body: Body, now: float) -> bytes:
    uid, port_space, qp_type = Struct("<Q8xHB").unpack_from(body)
    kinds = {PS_TCP: QPT_RC, PS_UDP: QPT_UD, PS_IPOIB: QPT_UD}
    if port_space not in kinds:
        raise VerbsError(errno.EINVAL, f"port space {port_space:#x}")
    # As in the kernel, only the InfiniBand port space chooses its type; UC under TCP is what librdmacm may ask for.
    kind = QPT_UC if port_space == PS_TCP and qp_type == QPT_UC else kinds[port_space]
    return _U32.pack(cm.create(file.queue, uid, port_space, kind).handle)


@_handles(Command.DESTROY_ID)
def destroy_id(cm: CommunicationManager, file: Any, body: Body, now: float) -> bytes:
    return _U32.pack(cm.destroy(_get(cm, file, _ID_AT_8.unpack_from(body)[0]), now))


def _endpoint(data: Body) -> Endpoint:
    endpoint = Endpoint.unpack(data)
    if endpoint is None:
        raise VerbsError(errno.EINVAL, "no address")
    return endpoint


@_handles(Command.BIND_IP)
def bind_ip(cm: CommunicationManager, file: Any, body: Body, now: float) -> bytes:
    address, handle = Struct("<8x28sI").unpack_from(body)
    cm.bind(_get(cm, file, handle), _endpoint(address))
    return b""


@_handles(Command.BIND)
def bind(cm: CommunicationManager, file: Any, body: Body, now: float) -> bytes:
    handle, size, address = Struct("<IHxx128s").unpack_from(body)
    if size > 128:
        raise VerbsError(errno.EINVAL, f"address of {size} bytes")
    cm.bind(_get(cm, file, handle), _endpoint(address))
    return b""


@_handles(Command.RESOLVE_IP)
def resolve_ip(cm: CommunicationManager, file: Any, body: Body, now: float) -> bytes:
    source, destination, handle, timeout = Struct("<28s28sII").unpack_from(body)
    cm_id = _get(cm, file, handle)
    cm.resolve_addr(cm_id, Endpoint.unpack(source), _endpoint(destination), timeout / 1000, now)
    return b""


@_handles(Command.RESOLVE_ADDR)
def resolve_addr(cm: CommunicationManager, file: Any, body: Body, now: float) -> bytes:
    handle, timeout, source_size, size, source, destination = Struct("<IIHHxxxx128s128s").unpack_from(body)
    if size > 128 or source_size > 128:
        raise VerbsError(errno.EINVAL, "address too long")
    begin = Endpoint.unpack(source) if source_size else None
    cm.resolve_addr(_get(cm, file, handle), begin, _endpoint(destination), timeout / 1000, now)
    return b""


@_handles(Command.RESOLVE_ROUTE)
def resolve_route(cm: CommunicationManager, file: Any, body: Body, now: float) -> bytes:
    cm.resolve_route(_get(cm, file, _U32.unpack_from(body)[0]))
    return b""


_PATH_RECORD = Struct(">16s16sHH4xI")
_PATH_TAIL = Struct("<IIH10B")


def _path_record(cm: CommunicationManager, cm_id: CmId) -> bytes:
    """struct ib_user_path_rec, 64 bytes. Zeros when there is no destination."""
    if cm_id.source is None or cm_id.destination is None:
        gid = gid_of(cm_id.source.ip) if cm_id.source is not None and cm_id.on_device else bytes(16)
        return (bytes(16) + gid).ljust(64, b"\0")
    ends = gid_of(cm_id.destination.ip), gid_of(cm_id.source.ip)
    head = _PATH_RECORD.pack(*ends, 0xFFFF, 0xFFFF, cm_id.flow_label)
    # reversible, MTU code, P_Key 0xffff, hop limit, class, paths, SL, exactly that MTU, that rate, that life time
    return head + _PATH_TAIL.pack(1, cm_id.path_mtu, 0xFFFF, 64, cm_id.tos, 1, 0, 2, 2, 2, 2, 18, 1)


def _sockaddr(endpoint: Endpoint | None) -> bytes:
    return endpoint.pack() if endpoint is not None else bytes(SOCKADDR_BYTES)


_NO_INDEX: Final = 0xFFFFFFFF
"""The device has no netlink index; librdmacm knows it by its GUID."""


@_handles(Command.QUERY_ROUTE)
def query_route(cm: CommunicationManager, file: Any, body: Body, now: float) -> bytes:
    cm_id = _get(cm, file, _ID_AT_8.unpack_from(body)[0])
    guid = cm.adapter.guid if cm_id.on_device else bytes(8)
    paths = int(cm_id.state in (IdState.ROUTE_RESOLVED, IdState.CONNECT, IdState.DISCONNECT))
    ends = _sockaddr(cm_id.source) + _sockaddr(cm_id.destination)
    routes = _path_record(cm, cm_id) + bytes(64)
    return guid + routes + ends + Struct("<IB3xII").pack(paths, int(cm_id.on_device), _NO_INDEX, 0)


@_handles(Command.QUERY)
def query(cm: CommunicationManager, file: Any, body: Body, now: float) -> bytes:
    handle, option = Struct("<8xII").unpack_from(body)
    cm_id = _get(cm, file, handle)
    if option == 1:
        record = _path_record(cm, cm_id) if cm_id.destination is not None else b""
        if not record:
            return bytes(8)
        ends = record[:16], record[16:32]
        packed = Struct(">8x16s16sHHIBBHHBBB1x4x").pack(
            *ends,
            0xFFFF,
            0xFFFF,
            cm_id.flow_label << 8 | 64,
            cm_id.tos,
            0x81,
            0xFFFF,
            0,
            0x80 | cm_id.path_mtu,
            0x80,
            0x92,
        )
        return Struct("<II").pack(1, 0) + Struct("<II").pack(0x39, 0) + packed
    if option not in (0, 2):
        raise VerbsError(errno.ENOSYS, f"query option {option}")
    if option == 0:
        source, destination = _sockaddr(cm_id.source), _sockaddr(cm_id.destination)
        sizes = [
            (16 if len(end.ip) == 4 else 28) if end is not None else 0 for end in (cm_id.source, cm_id.destination)
        ]
    else:
        source, destination = _sockaddr_ib(cm_id, cm_id.source), _sockaddr_ib(cm_id, cm_id.destination)
        sizes = [48, 48]
    head = (cm.adapter.guid if cm_id.on_device else bytes(8)) + Struct("<BxHHH").pack(
        int(cm_id.on_device), 0xFFFF, *sizes
    )
    return head + source.ljust(128, b"\0") + destination.ljust(128, b"\0") + Struct("<II").pack(_NO_INDEX, 0)


def _size(endpoint: Endpoint | None) -> int:
    return 0 if endpoint is None else 16 if len(endpoint.ip) == 4 else SOCKADDR_BYTES


def _sockaddr_ib(cm_id: CmId, endpoint: Endpoint | None) -> bytes:
    port = endpoint.port if endpoint is not None else 0
    gid = gid_of(endpoint.ip) if endpoint is not None and not endpoint.wildcard else bytes(16)
    service = (cm_id.port_space << 16 | port).to_bytes(8, "big")
    return Struct("<H2s4x16s8s8sQ").pack(27, b"\xff\xff", gid, service, b"\xff" * 8, 0)


@_handles(Command.CONNECT)
def connect(cm: CommunicationManager, file: Any, body: Body, now: float) -> bytes:
    param = ConnParam.unpack(body, 0)
    cm_id = _get(cm, file, _U32.unpack_from(body, 272)[0])
    if not param.valid:
        raise VerbsError(errno.EINVAL, "no parameters")
    cm.connect(cm_id, param, now)
    return b""


@_handles(Command.LISTEN)
def listen(cm: CommunicationManager, file: Any, body: Body, now: float) -> bytes:
    handle, backlog = Struct("<Ii").unpack_from(body)
    cm.listen(_get(cm, file, handle), backlog if 0 < backlog < MAX_BACKLOG else MAX_BACKLOG)
    return b""


@_handles(Command.ACCEPT)
def accept(cm: CommunicationManager, file: Any, body: Body, now: float) -> bytes:
    param = ConnParam.unpack(body, 8)
    cm_id = _get(cm, file, _U32.unpack_from(body, 280)[0])
    cm.accept(cm_id, Struct("<Q").unpack_from(body)[0], param if param.valid else None, now)
    return b""


@_handles(Command.REJECT)
def reject(cm: CommunicationManager, file: Any, body: Body, now: float) -> bytes:
    handle, length, reason, private = Struct("<IBBxx256s").unpack_from(body)
    cm.reject(_get(cm, file, handle), reason, private[:length])
    return b""


@_handles(Command.DISCONNECT)
def disconnect(cm: CommunicationManager, file: Any, body: Body, now: float) -> bytes:
    cm.disconnect(_get(cm, file, _U32.unpack_from(body)[0]), now)
    return b""


@_handles(Command.NOTIFY)
def notify(cm: CommunicationManager, file: Any, body: Body, now: float) -> bytes:
    handle, event = Struct("<II").unpack_from(body)
    cm_id = _get(cm, file, handle)
    if event == 4:  # IB_EVENT_COMM_EST
        cm.notify(cm_id)
    return b""


class Mask(IntEnum):
    """enum ib_qp_attr_mask."""

    STATE = 1 << 0
    ACCESS_FLAGS = 1 << 3
    PKEY_INDEX = 1 << 4
    PORT = 1 << 5
    QKEY = 1 << 6
    AV = 1 << 7
    PATH_MTU = 1 << 8
    TIMEOUT = 1 << 9
    RETRY_CNT = 1 << 10
    RNR_RETRY = 1 << 11
    RQ_PSN = 1 << 12
    MAX_QP_RD_ATOMIC = 1 << 13
    MIN_RNR_TIMER = 1 << 15
    SQ_PSN = 1 << 16
    MAX_DEST_RD_ATOMIC = 1 << 17
    DEST_QPN = 1 << 20


REMOTE_WRITE, REMOTE_READ, REMOTE_ATOMIC = 2, 4, 8
_QP_ATTR = Struct("<10I32s32s5IHH11B5x")
"""struct ib_uverbs_qp_attr."""


@_handles(Command.INIT_QP_ATTR)
def init_qp_attr(cm: CommunicationManager, file: Any, body: Body, now: float) -> bytes:
    """The attributes for the next state of the program's queue pair (rdma_init_qp_attr)."""
    handle, state = Struct("<8xII").unpack_from(body)
    cm_id = _get(cm, file, handle)
    datagrams = cm_id.qp_type == QPT_UD
    reliable = cm_id.qp_type == QPT_RC
    connection = cm_id.connection
    request = connection.request if connection is not None else None
    mask = Mask.STATE | 0
    access = qkey = dest_qpn = sq_psn = 0
    vector = bytes(32)
    if state == QpState.INIT:
        mask |= Mask.PKEY_INDEX | Mask.PORT
        if datagrams:
            mask |= Mask.QKEY
            cm_id.qkey = qkey = cm_id.qkey or UDP_QKEY
        else:
            mask |= Mask.ACCESS_FLAGS
            if request is not None:
                access = REMOTE_WRITE | (REMOTE_READ | REMOTE_ATOMIC if cm_id.responder_resources else 0)
    elif datagrams or connection is None or request is None:
        raise VerbsError(errno.EINVAL, f"no attributes for state {state}")
    elif state == QpState.RTR:
        mask |= Mask.AV | Mask.PATH_MTU | Mask.DEST_QPN | Mask.RQ_PSN
        if reliable:
            mask |= Mask.MAX_DEST_RD_ATOMIC | Mask.MIN_RNR_TIMER
        vector = ah_attr(cm.vector(cm_id))
        dest_qpn = connection.remote_qpn
    elif state == QpState.RTS:
        mask |= Mask.SQ_PSN
        if reliable:
            mask |= Mask.TIMEOUT | Mask.RETRY_CNT | Mask.RNR_RETRY | Mask.MAX_QP_RD_ATOMIC
        sq_psn = connection.remote_psn
    else:
        raise VerbsError(errno.EINVAL, f"no attributes for state {state}")
    return _QP_ATTR.pack(
        mask, state, 0, cm_id.path_mtu, 0, qkey, cm_id.psn, sq_psn, dest_qpn, access, vector, bytes(32),
        0, 0, 0, 0, 0, 0, 0,
        0, 0, cm_id.initiator_depth & 0xFF, cm_id.responder_resources & 0xFF, 0, 1, cm_id.ack_timeout,
        cm_id.retry_count, cm_id.rnr_retry_count, 0, 0,
    )  # fmt: skip


_EVENT = Struct("<QIIi304s4x8x")
"""struct rdma_ucm_event_resp; no ECE."""


@_handles(Command.GET_EVENT)
def get_event(cm: CommunicationManager, file: Any, body: Body, now: float) -> bytes:
    """EAGAIN when there is none: the bridge waits at the FIFO when the program wants to."""
    event = file.queue.take()
    cm.took(event)
    told = event.child if event.kind is EventType.CONNECT_REQUEST else event.counted
    uid = event.group.uid if event.group is not None else event.counted.uid
    return _EVENT.pack(uid, told.handle, event.kind.value, event.status, event.param)


OPTION_ID, OPTION_IB = 0, 1


@_handles(Command.SET_OPTION)
def set_option(cm: CommunicationManager, file: Any, body: Body, now: float) -> bytes:
    address, handle, level, name, length = Struct("<QIIII").unpack_from(body)
    cm_id = _get(cm, file, handle)
    sizes = {0: 1, 1: 4, 2: 4, 3: 1}
    if level != OPTION_ID:
        raise VerbsError(errno.ENOSYS, f"option level {level}")
    if name not in sizes:
        raise VerbsError(errno.ENOSYS, f"option {name}")
    if length != sizes[name]:
        raise VerbsError(errno.EINVAL, f"option {name} of {length} bytes")
    value = int.from_bytes(file.read(address, length), "little")
    if name == 0:
        cm_id.tos = value
    elif name == 3:
        if value > 31 or cm_id.qp_type == QPT_UD:
            raise VerbsError(errno.EINVAL, f"ACK timeout code {value}")
        cm_id.ack_timeout = value
    elif cm_id.state not in (IdState.IDLE, IdState.BOUND) or (name == 2 and cm_id.state is not IdState.IDLE):
        raise VerbsError(errno.EINVAL, "too late for this option")
    elif name == 1:
        cm_id.reuse = bool(value)
    else:
        cm_id.family_only = bool(value)
    return b""


@_handles(Command.JOIN_IP_MCAST)
def join_ip_mcast(cm: CommunicationManager, file: Any, body: Body, now: float) -> bytes:
    uid, address, handle = Struct("<8xQ28sI").unpack_from(body)
    return _U32.pack(cm.join(_get(cm, file, handle), uid, _endpoint(address)).handle)


@_handles(Command.JOIN_MCAST)
def join_mcast(cm: CommunicationManager, file: Any, body: Body, now: float) -> bytes:
    uid, handle, size, flags, address = Struct("<8xQIHH128s").unpack_from(body)
    if size > 128 or flags > 1:
        raise VerbsError(errno.EINVAL, f"address of {size} bytes, flags {flags:#x}")
    return _U32.pack(cm.join(_get(cm, file, handle), uid, _endpoint(address)).handle)


@_handles(Command.LEAVE_MCAST)
def leave_mcast(cm: CommunicationManager, file: Any, body: Body, now: float) -> bytes:
    group = cm.groups.get(_ID_AT_8.unpack_from(body)[0])
    if group is None or group.cm_id.queue is not file.queue:
        raise VerbsError(errno.ENOENT, "no such membership")
    return _U32.pack(cm.leave(group))


@_handles(Command.MIGRATE_ID)
def migrate_id(cm: CommunicationManager, file: Any, body: Body, now: float) -> bytes:
    """Written to the new file; `fd` names the old one."""
    handle, descriptor = Struct("<8xII").unpack_from(body)
    old = file.sibling(descriptor)
    return _U32.pack(cm.migrate(_get(cm, old, handle), file.queue))
