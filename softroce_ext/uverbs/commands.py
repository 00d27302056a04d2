"""One function for each command of the write ABI, in one table. Each takes the command's body and returns an `Answer`.

The body starts after struct ib_uverbs_cmd_hdr (so the response pointer, where there is one, is its first word) or, for
an extended command, after both headers. A fault of the program is a `VerbsError`; so is a body that is too short.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable
from typing import Final, NamedTuple

from softroce_ext.device import limits
from softroce_ext.device.adapter import Adapter
from softroce_ext.device.address_handle import AddressHandle
from softroce_ext.device.completion import (
    ASYNC_EVENT,
    COMP_EVENT,
    CompletionChannel,
    CompletionQueue,
    SharedReceiveQueue,
)
from softroce_ext.device.errors import VerbsError
from softroce_ext.device.regions import MemoryRegion, MemoryWindow, ProtectionDomain, check_access
from softroce_ext.device.user_context import SWEEP_AT, UserContext
from softroce_ext.transport.interfaces import MemoryFault
from softroce_ext.uverbs import abi
from softroce_ext.uverbs.abi import Command

Body = memoryview


class Answer(NamedTuple):
    """What a command answers.

    data: the response (of an extended command: the core's part); provider: the driver's part of an extended response;
    install: name of the FIFO that becomes a descriptor of the program, its number being response word 0.
    """

    data: bytes = b""
    provider: bytes = b""
    install: str = ""


Handler = Callable[[Adapter, UserContext, Body], Answer]
HANDLERS: Final[dict[int, Handler]] = {}


def handles(command: Command) -> Callable[[Handler], Handler]:
    """Enter a function into the table."""

    def enter(handler: Handler) -> Handler:
        HANDLERS[command] = handler
        return handler

    return enter


@handles(Command.GET_CONTEXT)
def get_context(adapter: Adapter, context: UserContext, body: Body) -> Answer:
    if context.async_fifo is not None:
        raise VerbsError(errno.EINVAL, "the context exists already")
    context.async_fifo = context.channel.event_fifo(ASYNC_EVENT.size, "async")
    return Answer(abi.U32X2.pack(0, limits.COMP_VECTORS), install="async")


@handles(Command.QUERY_DEVICE)
def query_device(adapter: Adapter, context: UserContext, body: Body) -> Answer:
    return Answer(abi.device_attributes(adapter))


@handles(Command.EX_QUERY_DEVICE)
def ex_query_device(adapter: Adapter, context: UserContext, body: Body) -> Answer:
    return Answer(abi.extended_device_attributes(adapter))


@handles(Command.QUERY_PORT)
def query_port(adapter: Adapter, context: UserContext, body: Body) -> Answer:
    if body[8] != 1:
        raise VerbsError(errno.EINVAL, f"port {body[8]}")
    return Answer(abi.port_attributes(adapter))


# -- protection domains, regions, windows, address handles ---------------------------------------------------------


@handles(Command.ALLOC_PD)
def alloc_pd(adapter: Adapter, context: UserContext, body: Body) -> Answer:
    return Answer(abi.U32.pack(context.add(ProtectionDomain(adapter.keys))))


@handles(Command.DEALLOC_PD)
def dealloc_pd(adapter: Adapter, context: UserContext, body: Body) -> Answer:
    pd = context.get(abi.U32.unpack_from(body)[0], ProtectionDomain)
    if pd.users:
        raise VerbsError(errno.EBUSY, f"{pd.users} objects use the protection domain")
    context.remove(pd.handle)
    return Answer()


@handles(Command.REG_MR)
def reg_mr(adapter: Adapter, context: UserContext, body: Body) -> Answer:
    start, length, iova, pd_handle, access = abi.REG_MR.unpack_from(body)
    if (start ^ iova) % mmap.PAGESIZE:
        raise VerbsError(errno.EINVAL, "the range and its I/O address start at different offsets in a page")
    pd = context.get(pd_handle, ProtectionDomain)
    region = adapter.register(context, pd, start=start, length=length, iova=iova, access=access)
    return Answer(abi.U32X3.pack(region.handle, region.key, region.key))


_REREG_TRANS, _REREG_PD, _REREG_ACCESS = 1, 2, 4


@handles(Command.REREG_MR)
def rereg_mr(adapter: Adapter, context: UserContext, body: Body) -> Answer:
    handle, flags, _start, _length, _iova, pd_handle, access = abi.REREG_MR.unpack_from(body)
    if not flags:
        raise VerbsError(errno.EINVAL, "nothing to change")
    region = context.get(handle, MemoryRegion)
    if flags & ~(_REREG_PD | _REREG_ACCESS):
        raise VerbsError(errno.EOPNOTSUPP, "rxe changes a region's domain and access only")
    pd = context.get(pd_handle, ProtectionDomain) if flags & _REREG_PD else region.pd
    if flags & _REREG_ACCESS:
        check_access(access)
        region.access = access
    region.pd.users -= 1
    pd.users += 1
    region.pd = pd
    return Answer(abi.U32X2.pack(region.key, region.key))


@handles(Command.DEREG_MR)
def dereg_mr(adapter: Adapter, context: UserContext, body: Body) -> Answer:
    adapter.deregister(context, context.get(abi.U32.unpack_from(body)[0], MemoryRegion))
    return Answer()


@handles(Command.ALLOC_MW)
def alloc_mw(adapter: Adapter, context: UserContext, body: Body) -> Answer:
    pd_handle, kind = abi.ALLOC_MW.unpack_from(body)
    pd = context.get(pd_handle, ProtectionDomain)
    if kind not in (1, 2):
        raise VerbsError(errno.EINVAL, f"memory window type {kind}")
    window = adapter.allocate_window(context, pd, kind)
    return Answer(abi.U32X2.pack(window.handle, window.key))


@handles(Command.DEALLOC_MW)
def dealloc_mw(adapter: Adapter, context: UserContext, body: Body) -> Answer:
    adapter.destroy(context, context.get(abi.U32.unpack_from(body)[0], MemoryWindow))
    return Answer()


@handles(Command.CREATE_AH)
def create_ah(adapter: Adapter, context: UserContext, body: Body) -> Answer:
    pd = context.get(abi.U32.unpack_from(body, 16)[0], ProtectionDomain)
    attributes = bytes(body[24:56])
    if len(attributes) < 32:
        raise VerbsError(errno.EINVAL, "short command")
    handle = adapter.create_address_handle(context, pd, attributes)
    return Answer(abi.U32X3.pack(handle.handle, handle.number, 0))


@handles(Command.DESTROY_AH)
def destroy_ah(adapter: Adapter, context: UserContext, body: Body) -> Answer:
    adapter.destroy(context, context.get(abi.U32.unpack_from(body)[0], AddressHandle))
    return Answer()


# -- completion channels and queues --------------------------------------------------------------------------------

MAX_CHANNELS = 4096
"""Completion channels of one context: each costs the NIC a descriptor."""


@handles(Command.CREATE_COMP_CHANNEL)
def create_comp_channel(adapter: Adapter, context: UserContext, body: Body) -> Answer:
    if len(context.comp_channels) >= context.sweep_at:
        _sweep_channels(context)
        # A sweep costs as much as the program has descriptors; so the next one comes after as many new channels.
        context.sweep_at = 2 * len(context.comp_channels) + SWEEP_AT
    if len(context.comp_channels) >= MAX_CHANNELS:
        raise VerbsError(errno.EMFILE, f"{MAX_CHANNELS} completion channels in one context")
    channel = CompletionChannel(context.channel.event_fifo(COMP_EVENT.size))
    context.comp_channels[channel.identity] = channel
    return Answer(abi.U32.pack(0), install=channel.fifo.name)


def _sweep_channels(context: UserContext) -> None:
    """Remove the channels that the program has closed: ibv_destroy_comp_channel only closes a descriptor."""
    held = set()
    try:
        for entry in os.scandir(f"/proc/{context.pid}/fd"):
            try:
                if "/comp-" not in os.readlink(entry.path):
                    continue  # another file, whose file system may be slow to answer
                status = os.stat(entry.path)
            except OSError:
                continue
            held.add((status.st_dev, status.st_ino))
    except OSError:
        return
    for identity, channel in list(context.comp_channels.items()):
        if not channel.users and identity not in held:
            del context.comp_channels[identity]
            context.channel.drop_fifo(channel.fifo)


def _channel_of(context: UserContext, descriptor: int) -> CompletionChannel | None:
    """The completion channel that is descriptor `descriptor` of the program (it may have been duplicated since)."""
    if descriptor < 0:
        return None
    try:
        status = os.stat(f"/proc/{context.pid}/fd/{descriptor}")
    except OSError:
        raise VerbsError(errno.EBADF, f"descriptor {descriptor} is not open") from None
    channel = context.comp_channels.get((status.st_dev, status.st_ino))
    if channel is None:
        raise VerbsError(errno.EBADF, f"descriptor {descriptor} is not a completion channel")
    return channel


def _new_cq(
    adapter: Adapter, context: UserContext, user_handle: int, cqe: int, vector: int, descriptor: int
) -> CompletionQueue:
    if vector >= limits.COMP_VECTORS:
        raise VerbsError(errno.EINVAL, f"completion vector {vector}")
    if not 0 < cqe <= limits.MAX_CQE:
        raise VerbsError(errno.EINVAL, f"{cqe} completions, allowed are 1..{limits.MAX_CQE}")
    if context.async_fifo is None:
        raise VerbsError(errno.EINVAL, "no context yet")
    channel = _channel_of(context, descriptor)
    context.check_room()
    cq = CompletionQueue(context.channel.completion_ring(cqe), user_handle, channel, context.async_fifo)
    context.add(cq)
    cq.share(*context.channel.arm_bytes())
    cq.enter(adapter)
    return cq


@handles(Command.CREATE_CQ)
def create_cq(adapter: Adapter, context: UserContext, body: Body) -> Answer:
    cq = _new_cq(adapter, context, *abi.CREATE_CQ.unpack_from(body, 8))
    return Answer(abi.U32X2.pack(cq.handle, cq.ring.capacity) + abi.mminfo(cq.ring))


@handles(Command.EX_CREATE_CQ)
def ex_create_cq(adapter: Adapter, context: UserContext, body: Body) -> Answer:
    user_handle, cqe, vector, descriptor, comp_mask, flags, reserved = abi.EX_CREATE_CQ.unpack_from(body)
    if comp_mask or reserved:
        raise VerbsError(errno.EINVAL, f"comp_mask {comp_mask:#x}")
    if flags:
        raise VerbsError(errno.EOPNOTSUPP, f"CQ flags {flags:#x}")
    cq = _new_cq(adapter, context, user_handle, cqe, vector, descriptor)
    core = abi.EX_CREATE_CQ_RESP.pack(cq.handle, cq.ring.capacity, 0, abi.EX_CREATE_CQ_RESP.size)
    return Answer(core, abi.mminfo(cq.ring))


@handles(Command.RESIZE_CQ)
def resize_cq(adapter: Adapter, context: UserContext, body: Body) -> Answer:
    handle, cqe = abi.U32X2.unpack_from(body, 8)
    cq = context.get(handle, CompletionQueue)
    old = cq.ring
    if not 0 < cqe <= limits.MAX_CQE or cqe < old.waiting():
        raise VerbsError(errno.EINVAL, f"a queue of {cqe} completions cannot hold the {old.waiting()} that are waiting")
    cq.ring = context.channel.completion_ring(cqe)
    old.move_to(cq.ring)
    old.free()
    return Answer(abi.U32X2.pack(cq.ring.capacity, 0) + abi.mminfo(cq.ring))


@handles(Command.REQ_NOTIFY_CQ)
def req_notify_cq(adapter: Adapter, context: UserContext, body: Body) -> Answer:
    # The bridge arms in shared memory; this command comes for what is not a completion queue, or from another bridge.
    handle, solicited_only = abi.U32X2.unpack_from(body)
    context.get(handle, CompletionQueue).arm(bool(solicited_only))
    return Answer()


@handles(Command.DESTROY_CQ)
def destroy_cq(adapter: Adapter, context: UserContext, body: Body) -> Answer:
    cq = context.get(abi.U32.unpack_from(body, 8)[0], CompletionQueue)
    if cq.users:
        raise VerbsError(errno.EBUSY, "queue pairs use the completion queue")
    # What counts as reported is what the program has read: unread events are taken back.
    reported = cq.comp_events
    if cq.channel is not None:
        own = COMP_EVENT.pack(cq.user_handle)
        reported -= cq.channel.fifo.withdraw(lambda record: record == own)
    async_reported = cq.async_events - (context.unread_async(cq.user_handle) if cq.async_events else 0)
    adapter.destroy(context, cq)
    return Answer(abi.U32X2.pack(max(reported, 0), max(async_reported, 0)))  # the program may forge unread events


# -- shared receive queues -----------------------------------------------------------------------------------------


def _new_srq(
    adapter: Adapter, context: UserContext, user_handle: int, pd_handle: int, max_wr: int, max_sge: int, limit: int
) -> Answer:
    pd = context.get(pd_handle, ProtectionDomain)
    if not 0 < max_wr <= limits.MAX_SRQ_WR or max_sge > limits.MAX_SRQ_SGE:
        raise VerbsError(errno.EINVAL, f"SRQ of {max_wr} receives with {max_sge} elements")
    if context.async_fifo is None:
        raise VerbsError(errno.EINVAL, "no context yet")
    context.check_room()
    max_sge = max(max_sge, 1)
    ring = context.channel.receive_ring(max_wr, max_sge, shared=True)
    try:
        number = adapter.srq_numbers.take()
    except VerbsError:
        ring.free()
        raise
    srq = SharedReceiveQueue(
        ring,
        pd,
        user_handle=user_handle,
        max_sge=max_sge,
        limit=limit,
        number=number,
        async_fifo=context.async_fifo,
    )
    context.add(srq)
    srq.enter(adapter)
    # As for queue pairs: the numbers that were asked for; ibv_query_srq has those that fit. srqn exists for XRC only.
    return Answer(abi.U32X4.pack(srq.handle, max_wr, max_sge, 0) + abi.mminfo(ring) + abi.U32X2.pack(number, 0))


@handles(Command.CREATE_SRQ)
def create_srq(adapter: Adapter, context: UserContext, body: Body) -> Answer:
    return _new_srq(adapter, context, *abi.CREATE_SRQ.unpack_from(body, 8))


@handles(Command.CREATE_XSRQ)
def create_xsrq(adapter: Adapter, context: UserContext, body: Body) -> Answer:
    user_handle, kind, pd_handle, max_wr, max_sge, limit = abi.CREATE_XSRQ.unpack_from(body, 8)
    if kind:
        raise VerbsError(errno.EOPNOTSUPP, "rxe has basic SRQs only")
    return _new_srq(adapter, context, user_handle, pd_handle, max_wr, max_sge, limit)


_SRQ_MAX_WR, _SRQ_LIMIT = 1, 2


@handles(Command.MODIFY_SRQ)
def modify_srq(adapter: Adapter, context: UserContext, body: Body) -> Answer:
    handle, mask, max_wr, limit, info_address = abi.MODIFY_SRQ.unpack_from(body)
    srq = context.get(handle, SharedReceiveQueue)
    old = srq.ring
    if mask & _SRQ_LIMIT and limit > old.capacity:
        raise VerbsError(errno.EINVAL, f"limit {limit} of an SRQ of {old.capacity}")
    if mask & _SRQ_MAX_WR:
        if not max(srq.limit, 1) <= max_wr <= limits.MAX_SRQ_WR:
            raise VerbsError(errno.EINVAL, f"an SRQ of {max_wr} receives")
        ring = context.channel.receive_ring(max_wr, srq.max_sge, shared=True)
        if old.posted() > ring.capacity:
            ring.free()
            raise VerbsError(errno.EINVAL, f"an SRQ of {max_wr} receives cannot hold those that are posted")
        old.move_to(ring)
        try:
            # The only pointer of the whole ABI besides the response: the provider's struct rxe_modify_srq_cmd.
            context.memory.write(info_address, abi.mminfo(ring))
            context.memory.flush()
        except MemoryFault:
            ring.free()
            raise VerbsError(errno.EFAULT, "mmap_info_addr") from None
        srq.ring = ring
        old.free()
    if mask & _SRQ_LIMIT:
        srq.limit = limit
    return Answer()


@handles(Command.QUERY_SRQ)
def query_srq(adapter: Adapter, context: UserContext, body: Body) -> Answer:
    srq = context.get(abi.U32.unpack_from(body, 8)[0], SharedReceiveQueue)
    return Answer(abi.U32X4.pack(srq.ring.capacity, srq.max_sge, srq.limit, 0))


@handles(Command.DESTROY_SRQ)
def destroy_srq(adapter: Adapter, context: UserContext, body: Body) -> Answer:
    srq = context.get(abi.U32.unpack_from(body, 8)[0], SharedReceiveQueue)
    if srq.users:
        raise VerbsError(errno.EBUSY, "queue pairs use the SRQ")
    reported = srq.async_events - (context.unread_async(srq.user_handle) if srq.async_events else 0)
    adapter.destroy(context, srq)
    return Answer(abi.U32.pack(max(reported, 0)))
