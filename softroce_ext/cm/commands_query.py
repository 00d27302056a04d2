"""Commands that only query: addresses and routes of an id, and the attributes of its queue pair's next state."""

from __future__ import annotations

import errno
from enum import IntEnum
from struct import Struct
from typing import Any, Final

from softroce_ext.cm.commands import Body, Command, get, handles
from softroce_ext.cm.connection import Connection, State
from softroce_ext.cm.ids import AF_IB, SOCKADDR_BYTES, CmId, Endpoint, IdState
from softroce_ext.cm.interfaces import File
from softroce_ext.cm.manager import CommunicationManager
from softroce_ext.cm.params import UDP_QKEY, ah_attr
from softroce_ext.device import limits
from softroce_ext.device.addressing import gid_of
from softroce_ext.device.errors import VerbsError
from softroce_ext.transport.verbs import Access, QpState, QpType

_PATH_RECORD = Struct(">16s16s8xI")
_PATH_TAIL = Struct("<IIH10B")


def _has_route(cm_id: CmId) -> bool:
    resolved = cm_id.state in (IdState.ROUTE_RESOLVED, IdState.CONNECT, IdState.DISCONNECT)
    # An id that was made for a peer's datagrams has no route of its own.
    return resolved and not (cm_id.qp_type == QpType.UD and cm_id.connection is not None and cm_id.connection.remote_id)


def _gid(endpoint: Endpoint | None) -> bytes:
    return gid_of(endpoint.ip) if endpoint is not None else bytes(16)


def _path_record(cm_id: CmId) -> bytes:
    """struct ib_user_path_rec, 64 bytes: addresses and P_Key only, while there is no route."""
    if not cm_id.on_device:
        return bytes(64)
    ends = _gid(cm_id.destination), _gid(cm_id.source)
    if not _has_route(cm_id):
        return _PATH_RECORD.pack(*ends, 0) + _PATH_TAIL.pack(0, 0, limits.DEFAULT_PKEY, *bytes(10))
    # reversible, MTU code, P_Key, hop limit, class, paths, SL, exactly that MTU, that rate, that life time
    tail = _PATH_TAIL.pack(1, cm_id.path_mtu, limits.DEFAULT_PKEY, 64, cm_id.tos, 0, 0, 2, 2, 0, 2, 18, 0)
    return _PATH_RECORD.pack(*ends, cm_id.flow_label) + tail


def _ends(cm_id: CmId) -> list[Endpoint | None]:
    """Return source and destination; a bound id without a destination has the address "any" of its family."""
    there = cm_id.destination
    if there is None and cm_id.source is not None:
        there = Endpoint(bytes(len(cm_id.source.ip)))
    return [cm_id.source, there]


def _sockaddr(endpoint: Endpoint | None) -> bytes:
    return endpoint.pack() if endpoint is not None else bytes(SOCKADDR_BYTES)


def _size(endpoint: Endpoint | None) -> int:
    return 0 if endpoint is None else 16 if len(endpoint.ip) == 4 else SOCKADDR_BYTES


_NO_INDEX: Final = 0xFFFFFFFF
"""The device has no netlink index; librdmacm identifies it by its GUID."""


@handles(Command.QUERY_ROUTE)
def query_route(cm: CommunicationManager, file: File, body: Body, now: float) -> bytes:
    cm_id = get(cm, file, Struct("<8xI").unpack_from(body)[0])
    guid = file.guid if cm_id.on_device else bytes(8)
    ends = b"".join(map(_sockaddr, _ends(cm_id)))
    routes = _path_record(cm_id) + bytes(64)
    tail = Struct("<IB3xII").pack(int(_has_route(cm_id)), int(cm_id.on_device), _NO_INDEX, 0)
    return guid + routes + ends + tail


@handles(Command.QUERY)
def query(cm: CommunicationManager, file: File, body: Body, now: float) -> bytes:
    handle, option = Struct("<8xII").unpack_from(body)
    cm_id = get(cm, file, handle)
    if option == OPTION_PATH:
        return _paths(cm_id)
    if option not in (OPTION_ADDR, OPTION_GID):
        raise VerbsError(errno.ENOSYS, f"query option {option}")
    ends = _ends(cm_id)
    if option == OPTION_ADDR:
        addresses, sizes = list(map(_sockaddr, ends)), list(map(_size, ends))
    else:
        addresses, sizes = [_sockaddr_ib(cm_id, end) for end in ends], [48, 48]
    head = (file.guid if cm_id.on_device else bytes(8)) + Struct("<BxHHH").pack(int(cm_id.on_device), 0, *sizes)
    return head + b"".join(end.ljust(128, b"\0") for end in addresses) + Struct("<II").pack(_NO_INDEX, 0)


OPTION_ADDR, OPTION_PATH, OPTION_GID = range(3)
_PATH_FLAGS: Final = 0x2B
"""IB_PATH_GMP, PRIMARY and BIDIRECTIONAL."""
_PACKED_PATH: Final = Struct(">8x16s16s4xIBBHHBBB1x4x")
"""A path record as the subnet administrator would send it (IBA 15.2.5.16); Ethernet has no LIDs, where Linux leaves a
part of the destination's MAC."""


def room_for(body: bytes) -> int:
    """Return the bytes of room that the answer of a QUERY must have."""
    return 8 if Struct("<12xI").unpack_from(body)[0] == OPTION_PATH else 272


def _paths(cm_id: CmId) -> bytes:
    if not _has_route(cm_id):
        return bytes(8)
    packed = _PACKED_PATH.pack(
        _gid(cm_id.destination), _gid(cm_id.source), cm_id.flow_label << 8 | 64, cm_id.tos, 0x80,
        limits.DEFAULT_PKEY, 0, 0x80 | cm_id.path_mtu, 0x80, 0x92,
    )  # fmt: skip
    return Struct("<IIII").pack(1, 0, _PATH_FLAGS, 0) + packed


def _sockaddr_ib(cm_id: CmId, endpoint: Endpoint | None) -> bytes:
    port = endpoint.port if endpoint is not None else 0
    gid = gid_of(endpoint.ip) if endpoint is not None and not endpoint.wildcard else bytes(16)
    service = (cm_id.port_space << 16 | port).to_bytes(8, "big")
    return Struct("<H2x4x16s8s8sQ").pack(AF_IB, gid, service, b"\xff" * 8, 0)


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


_QP_ATTR = Struct("<10I32s32s5IHH11B5x")
"""struct ib_uverbs_qp_attr."""
_QP_FIELDS: Final = (
    "mask", "state", "current_state", "path_mtu", "path_mig_state", "qkey", "rq_psn", "sq_psn", "dest_qpn", "access",
    "ah_attr", "alt_ah_attr",
    "max_send_wr", "max_recv_wr", "max_send_sge", "max_recv_sge", "max_inline_data",
    "pkey_index", "alt_pkey_index",
    "en_sqd_async_notify", "sq_draining", "max_rd_atomic", "max_dest_rd_atomic", "min_rnr_timer", "port_num", "timeout",
    "retry_cnt", "rnr_retry", "alt_port_num", "alt_timeout",
)  # fmt: skip
"""Its members in order."""


@handles(Command.INIT_QP_ATTR)
def init_qp_attr(cm: CommunicationManager, file: File, body: Body, now: float) -> bytes:
    """The attributes for the next state of the program's queue pair (rdma_init_qp_attr)."""
    handle, state = Struct("<8xII").unpack_from(body)
    if state > QpState.ERR:
        raise VerbsError(errno.EINVAL, f"state {state}")
    cm_id = get(cm, file, handle)
    if not cm_id.on_device:
        raise VerbsError(errno.EINVAL, "the id has no device")
    connection = cm_id.connection
    if cm_id.state is IdState.LISTEN and cm_id.qp_type != QpType.UD:
        raise VerbsError(errno.EINVAL, "a listening id has no queue pair")
    if cm_id.qp_type == QpType.UD or connection is None or connection.request is None:
        attributes = _unconnected(cm_id)
    elif connection.state not in _HAS_PARAMETERS and not (state == QpState.INIT and connection.state is State.REQ_SENT):
        raise VerbsError(errno.EINVAL, f"a connection in state {connection.state.value}")
    elif state == QpState.INIT:
        reads = Access.REMOTE_READ | Access.REMOTE_ATOMIC if cm_id.responder_resources else 0
        attributes = {"mask": _TO_INIT | Mask.ACCESS_FLAGS, "access": Access.REMOTE_WRITE | reads, "port_num": 1}
    elif state == QpState.RTR:
        attributes = _to_rtr(cm, cm_id, connection)
    elif state == QpState.RTS:
        attributes = _to_rts(cm_id, connection)
    else:
        raise VerbsError(errno.EINVAL, f"no attributes for state {state}")
    if state == QpState.RTR:
        attributes["rq_psn"] = cm_id.psn
    values = (
        dict.fromkeys(_QP_FIELDS, 0) | {"ah_attr": bytes(32), "alt_ah_attr": bytes(32), "state": state} | attributes
    )
    return _QP_ATTR.pack(*values.values())


_HAS_PARAMETERS: Final = (State.REQ_RCVD, State.REP_SENT, State.REP_RCVD, State.ESTABLISHED)
"""States in which a connection has its peer's parameters."""
_TO_INIT: Final = Mask.STATE | Mask.PKEY_INDEX | Mask.PORT


def _unconnected(cm_id: CmId) -> dict[str, Any]:
    """The same for every state: without a connection there are no parameters of a peer."""
    if cm_id.qp_type != QpType.UD:
        return {"mask": _TO_INIT | Mask.ACCESS_FLAGS, "port_num": 1}
    cm_id.qkey = cm_id.qkey or UDP_QKEY
    return {"mask": _TO_INIT | Mask.QKEY, "qkey": cm_id.qkey, "port_num": 1}


def _to_rtr(cm: CommunicationManager, cm_id: CmId, connection: Connection[CmId]) -> dict[str, Any]:
    mask = Mask.STATE | Mask.AV | Mask.PATH_MTU | Mask.DEST_QPN | Mask.RQ_PSN
    found: dict[str, Any] = {
        "path_mtu": cm_id.path_mtu, "dest_qpn": connection.remote_qpn, "ah_attr": ah_attr(cm.addresses.vector(cm_id)),
    }  # fmt: skip
    if cm_id.qp_type == QpType.RC:
        mask |= Mask.MAX_DEST_RD_ATOMIC | Mask.MIN_RNR_TIMER
        found["max_dest_rd_atomic"] = cm_id.responder_resources & 0xFF
    return found | {"mask": mask}


def _to_rts(cm_id: CmId, connection: Connection[CmId]) -> dict[str, Any]:
    mask = Mask.STATE | Mask.SQ_PSN
    found: dict[str, Any] = {"sq_psn": connection.remote_psn}
    if cm_id.qp_type == QpType.RC:
        mask |= Mask.TIMEOUT | Mask.RETRY_CNT | Mask.RNR_RETRY | Mask.MAX_QP_RD_ATOMIC
        found |= {
            "max_rd_atomic": cm_id.initiator_depth & 0xFF, "timeout": cm_id.ack_timeout,
            "retry_cnt": cm_id.retry_count, "rnr_retry": cm_id.rnr_retry_count,
        }  # fmt: skip
    return found | {"mask": mask}
