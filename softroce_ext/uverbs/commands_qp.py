"""The commands of queue pairs; with them the table `HANDLERS` is complete, so import it from here."""

from __future__ import annotations

import errno
from typing import Any, Final

from softroce_ext.device import limits
from softroce_ext.device.adapter import SERVICES, SGE_BYTES, Adapter
from softroce_ext.device.address_handle import Destination
from softroce_ext.device.addressing import PORT
from softroce_ext.device.completion import CompletionQueue, SharedReceiveQueue
from softroce_ext.device.errors import VerbsError
from softroce_ext.device.regions import ProtectionDomain
from softroce_ext.device.user_context import UserContext
from softroce_ext.device.user_queue_pair import Capabilities, InitAttributes, UserQueuePair
from softroce_ext.transport.verbs import QpState
from softroce_ext.uverbs import abi
from softroce_ext.uverbs.abi import Command
from softroce_ext.uverbs.commands import HANDLERS, Answer, Body, handles

__all__ = ["HANDLERS"]

QP_STATE: Final = 1
QP_CUR_STATE: Final = 1 << 1
QP_PORT: Final = 1 << 5
QP_AV: Final = 1 << 7
QP_PATH_MTU: Final = 1 << 8
QP_ALT_PATH: Final = 1 << 14
QP_CAP: Final = 1 << 19
QP_DEST_QPN: Final = 1 << 20
QP_STANDARD: Final = (1 << 21) - 1

KNOWN_CREATE_FLAGS: Final = 0xF1E
"""Flags of enum ib_qp_create_flags that a program may ask for; rxe has none of them."""
KNOWN_COMP_MASK: Final = 1
"""The receive indirection table: a kind of object that rxe does not have."""

ATTRIBUTES: Final = (
    (1 << 0, "qp_state"),
    (1 << 1, "cur_qp_state"),
    (1 << 2, "en_sqd_async_notify"),
    (1 << 3, "qp_access_flags"),
    (1 << 4, "pkey_index"),
    (1 << 5, "port_num"),
    (1 << 6, "qkey"),
    (1 << 9, "timeout"),
    (1 << 10, "retry_cnt"),
    (1 << 11, "rnr_retry"),
    (1 << 12, "rq_psn"),
    (1 << 13, "max_rd_atomic"),
    (1 << 15, "min_rnr_timer"),
    (1 << 16, "sq_psn"),
    (1 << 17, "max_dest_rd_atomic"),
    (1 << 18, "path_mig_state"),
    (1 << 20, "destination_qpn"),
)
"""enum ib_qp_attr_mask → the transport's name, for attributes that are passed on as they are."""


QPT_RAW_PACKET, QPT_XRC_SEND, QPT_DRIVER = 8, 9, 0xFF
"""Kinds of queue pairs that the ABI has and rxe does not; every other kind is EINVAL."""


def _new_qp(adapter: Adapter, context: UserContext, fields: tuple[int, ...]) -> Answer:
    """Make a queue pair; data: struct ib_uverbs_create_qp_resp, provider: where the rings are."""
    user_handle, pd, send_cq, recv_cq, srq, swr, rwr, ssge, rsge, inline, sig_all, kind, is_srq = fields
    if kind in (QPT_RAW_PACKET, QPT_XRC_SEND, QPT_DRIVER):
        raise VerbsError(errno.EOPNOTSUPP, f"QP type {kind}")
    if kind not in SERVICES:
        raise VerbsError(errno.EINVAL, f"QP type {kind}")
    attributes = InitAttributes(
        user_handle=user_handle,
        kind=kind,
        pd=context.get(pd, ProtectionDomain),
        send_cq=context.get(send_cq, CompletionQueue),
        recv_cq=context.get(recv_cq, CompletionQueue),
        srq=context.get(srq, SharedReceiveQueue) if is_srq else None,
        capabilities=Capabilities(swr, rwr, ssge, rsge, inline),
        sq_sig_all=bool(sig_all),
    )
    qp = adapter.create_queue_pair(context, attributes)
    c = qp.capabilities
    # rxe answers with the numbers of requests that were asked for; ibv_query_qp has those that fit.
    created = abi.CREATE_QP_RESP.pack(qp.handle, qp.qpn, swr, rwr, c.max_send_sge, rsge, c.max_inline_data, 0)
    return Answer(created, abi.mminfo(qp.receive_ring) + abi.mminfo(qp.send_ring))


@handles(Command.CREATE_QP)
def create_qp(adapter: Adapter, context: UserContext, body: Body) -> Answer:
    created = _new_qp(adapter, context, abi.CREATE_QP.unpack_from(body, 8))
    return Answer(created.data + created.provider)


@handles(Command.EX_CREATE_QP)
def ex_create_qp(adapter: Adapter, context: UserContext, body: Body) -> Answer:
    comp_mask, create_flags = abi.U32X2.unpack_from(body, abi.CREATE_QP.size)
    if comp_mask or create_flags & ~KNOWN_CREATE_FLAGS:
        raise VerbsError(errno.EINVAL, f"comp_mask {comp_mask:#x}, QP create flags {create_flags:#x}")
    if create_flags:
        raise VerbsError(errno.EOPNOTSUPP, f"QP create flags {create_flags:#x}")
    created = _new_qp(adapter, context, abi.CREATE_QP.unpack_from(body))
    return created._replace(data=created.data + abi.U32X2.pack(0, abi.CREATE_QP_RESP.size + abi.U32X2.size))


@handles(Command.QUERY_QP)
def query_qp(adapter: Adapter, context: UserContext, body: Body) -> Answer:
    qp = context.get(abi.U32.unpack_from(body, 8)[0], UserQueuePair)
    c, caps = qp.transport.attributes, qp.capabilities
    return Answer(
        abi.QUERY_QP_RESP.pack(
            qp.destination.pack(),
            qp.alternate.pack(),
            caps.max_send_wr,
            caps.max_recv_wr,
            caps.max_send_sge,
            caps.max_recv_sge,
            caps.max_inline_data,
            c.qkey,
            qp.transport.receiver.expected_psn,
            qp.transport.sender.send_psn,
            c.destination_qpn,
            c.qp_access_flags,
            c.pkey_index,
            0,  # alt_pkey_index
            c.state,
            c.state,
            limits.MTU_CODE.get(c.path_mtu, 0),
            c.path_mig_state,
            qp.transport.sender.sq_draining,
            c.max_rd_atomic,
            c.max_dest_rd_atomic,
            c.min_rnr_timer,
            c.port_num,
            c.timeout,
            c.retry_cnt,
            c.rnr_retry,
            0,  # alt_port_num
            0,  # alt_timeout
            c.sq_sig_all,
        )
    )


def _check_mask(current: int, mask: int, state: int, port: int) -> None:
    """Raise VerbsError for what the kernel refuses whatever the values are; the rest is in `transport.states`."""
    if mask & ~QP_STANDARD:
        raise VerbsError(errno.EOPNOTSUPP, f"attribute mask {mask:#x}")
    if mask & (QP_CAP | QP_ALT_PATH):
        raise VerbsError(errno.EINVAL, "RoCE has no alternate paths, and rxe does not resize queue pairs")
    if mask & QP_PORT and port != PORT:
        raise VerbsError(errno.EINVAL, f"port {port}")
    target = state if mask & QP_STATE else current
    if mask & QP_CUR_STATE and not (target == QpState.RTS and current >= QpState.RTR):
        raise VerbsError(errno.EINVAL, "a current state can be supposed for a move to RTS only")


@handles(Command.MODIFY_QP)
def modify_qp(adapter: Adapter, context: UserContext, body: Body) -> Answer:
    destination, _alternate, handle, mask, *values = abi.MODIFY_QP.unpack_from(body)
    (
        qkey, rq_psn, sq_psn, dest_qpn, access, pkey_index, _alt_pkey, state, cur_state, mtu, mig_state, en_sqd,
        max_rd, max_dest_rd, rnr_timer, port, timeout, retry, rnr_retry, _alt_port, _alt_timeout,
    ) = values  # fmt: skip
    qp = context.get(handle, UserQueuePair)
    _check_mask(qp.transport.attributes.state, mask, state, port)
    given = {
        "qp_state": state,
        "cur_qp_state": cur_state,
        "en_sqd_async_notify": bool(en_sqd),
        "qp_access_flags": access,
        "pkey_index": pkey_index,
        "port_num": port,
        "qkey": qkey,
        "timeout": timeout,
        "retry_cnt": retry,
        "rnr_retry": rnr_retry,
        "rq_psn": rq_psn,
        "max_rd_atomic": max_rd,
        "min_rnr_timer": rnr_timer,
        "sq_psn": sq_psn,
        "max_dest_rd_atomic": max_dest_rd,
        "path_mig_state": mig_state,
        "destination_qpn": dest_qpn,
    }
    attributes: dict[str, Any] = {name: given[name] for bit, name in ATTRIBUTES if mask & bit}
    if mask & QP_PATH_MTU:
        if mtu not in limits.MTU_BYTES or mtu > limits.active_mtu(adapter.interface_mtu):
            raise VerbsError(errno.EINVAL, f"path MTU code {mtu}")
        attributes["path_mtu"] = limits.MTU_BYTES[mtu]
    vector = Destination.unpack(destination)
    if mask & QP_AV:
        remote_qpn = dest_qpn if mask & QP_DEST_QPN else qp.transport.attributes.destination_qpn
        attributes["path"] = adapter.addressing.connection_path(vector, qp.qpn, remote_qpn)
    adapter.modify_queue_pair(qp, attributes)
    if attributes.get("qp_state") == QpState.RESET:
        qp.destination = qp.alternate = Destination()
    if mask & QP_AV:
        qp.destination = vector
    return Answer()


@handles(Command.DESTROY_QP)
def destroy_qp(adapter: Adapter, context: UserContext, body: Body) -> Answer:
    qp = context.get(abi.U32.unpack_from(body, 8)[0], UserQueuePair)
    adapter.destroy_queue_pair(qp)
    reported = qp.async_events - (context.unread_async(qp.user_handle) if qp.async_events else 0)
    return Answer(abi.U32.pack(max(reported, 0)))  # the program may forge unread events


@handles(Command.POST_SEND)
def post_send(adapter: Adapter, context: UserContext, body: Body) -> Answer:
    """Serve it as a doorbell, whatever comes with it: the kernel checks it, and rxe looks into the shared queue."""
    handle, count, elements, size = abi.U32X4.unpack_from(body, 8)
    if size < abi.SEND_WR_BYTES or len(body) < abi.SIZES[Command.POST_SEND][0] + count * size + elements * SGE_BYTES:
        raise VerbsError(errno.EINVAL, f"{count} requests of {size} bytes in a command of {len(body)}")
    qp = context.get(handle, UserQueuePair)
    if qp.transport.attributes.state < QpState.RTS:
        raise VerbsError(errno.EINVAL, "post_send before RTS")
    adapter.engine.ring(qp.transport)
    return Answer(abi.U32.pack(0))


@handles(Command.ATTACH_MCAST)
def attach_mcast(adapter: Adapter, context: UserContext, body: Body) -> Answer:
    mgid, handle, mlid = abi.MCAST.unpack_from(body)
    adapter.groups.attach(context.get(handle, UserQueuePair), mgid, mlid)
    return Answer()


@handles(Command.DETACH_MCAST)
def detach_mcast(adapter: Adapter, context: UserContext, body: Body) -> Answer:
    mgid, handle, mlid = abi.MCAST.unpack_from(body)
    adapter.groups.detach(context.get(handle, UserQueuePair), mgid, mlid)
    return Answer()
