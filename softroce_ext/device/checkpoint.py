"""Contexts to an image and back: the same handles, numbers, keys, indices, and every queue pair's context.

A dump reads and changes nothing. A restore enters all contexts of an image or none; its queue pairs come up Stopped, so
nothing is sent and no request is executed until the management says that the program's memory is in place.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from softroce_ext.device import image as im
from softroce_ext.device.adapter import Adapter
from softroce_ext.device.completion import (
    ASYNC_EVENT,
    COMP_EVENT,
    CompletionChannel,
    CompletionQueue,
    SharedReceiveQueue,
)
from softroce_ext.device.context import AddressHandle, Context
from softroce_ext.device.errors import ImageError
from softroce_ext.device.image_checks import check_image, check_shape, check_state
from softroce_ext.device.memory import ProcessMemory
from softroce_ext.device.queue_pair import QPT_RC, QPT_UC, QPT_UD, Capabilities, Destination, QueuePair
from softroce_ext.device.regions import KEY_BITS, MemoryRegion, MemoryWindow, ProtectionDomain
from softroce_ext.transport.services import make_queue_pair
from softroce_ext.transport.state.queue_pair import QueuePairState
from softroce_ext.transport.verbs import QpState
from softroce_ext.wire.path import Path

MakeChannel = Callable[[str, tuple[int, int], list[tuple[int, int]]], Any]
"""(context id, (uid, gid), ranges that rings will take) → a channel with `restore_*` methods."""

NO_PROCESS = 0
"""The pid of a restored context before it is attached: process_vm_readv answers ESRCH for it."""


def dump(
    adapter: Adapter, contexts: list[Context], cm: list[dict[str, Any]] | None = None
) -> tuple[im.Image, im.RingSection]:
    """Describe contexts completely. Their programs must be frozen and their queue pairs Stopped.

    cm: records of the programs' opens of rdma_cm, which go into the image as they are.
    """
    rings = im.RingSection()
    records = [_dump_context(context, rings) for context in contexts]
    return im.Image(version=im.VERSION, number_base=adapter.number_base, contexts=records, cm=cm or []), rings


def _dump_context(context: Context, rings: im.RingSection) -> im.ContextRecord:
    uid, gid = context.channel.owner
    return im.ContextRecord(
        id=context.id,
        inner_pid=context.inner_pid,
        uid=uid,
        gid=gid,
        async_open=context.async_fifo is not None,
        mailbox=context.channel.dump_mailbox().hex(),
        pds=[im.PdRecord(handle=pd.handle) for pd in context.of(ProtectionDomain)],
        mrs=[
            im.MrRecord(
                handle=mr.handle,
                pd=mr.pd.handle,
                key=mr.key,
                start=mr.start,
                length=mr.length,
                iova=mr.iova,
                access=mr.access,
            )
            for mr in context.of(MemoryRegion)
        ],
        mws=[
            im.MwRecord(
                handle=mw.handle,
                pd=mw.pd.handle,
                key=mw.key,
                kind=mw.kind,
                mr=mw.region.handle if mw.region is not None else None,
                iova=mw.iova,
                end=mw.end,
                access=mw.access,
                qpn=mw.qpn,
            )
            for mw in context.of(MemoryWindow)
        ],
        channels=[im.ChannelRecord(name=channel.fifo.name) for channel in context.comp_channels.values()],
        cqs=[
            im.CqRecord(
                handle=cq.handle,
                user_handle=cq.user_handle,
                ring=rings.add(cq.ring.dump()),
                channel=cq.channel.fifo.name if cq.channel is not None else None,
                notify=cq.notify,
                comp_events=cq.comp_events,
                async_events=cq.async_events,
            )
            for cq in context.of(CompletionQueue)
        ],
        srqs=[
            im.SrqRecord(
                handle=srq.handle,
                user_handle=srq.user_handle,
                pd=srq.pd.handle,
                ring=rings.add(srq.ring.dump()),
                max_sge=srq.max_sge,
                limit=srq.limit,
                number=srq.number,
                async_events=srq.async_events,
            )
            for srq in context.of(SharedReceiveQueue)
        ],
        ahs=[
            im.AhRecord(
                handle=ah.handle,
                pd=ah.pd.handle,
                number=ah.number,
                attributes=ah.attributes.hex(),
                path=ah.pd.paths[ah.number].to_plain(),
            )
            for ah in context.of(AddressHandle)
        ],
        qps=[_dump_qp(qp, rings) for qp in context.queue_pairs],
    )


def _dump_qp(qp: QueuePair, rings: im.RingSection) -> im.QpRecord:
    c = qp.capabilities
    return im.QpRecord(
        handle=qp.handle,
        user_handle=qp.user_handle,
        kind=qp.kind,
        pd=qp.pd.handle,
        send_cq=qp.send_cq.handle,
        recv_cq=qp.recv_cq.handle,
        srq=qp.srq.handle if qp.srq is not None else None,
        capabilities=(c.max_send_wr, c.max_recv_wr, c.max_send_sge, c.max_recv_sge, c.max_inline_data),
        destination=qp.destination.pack().hex(),
        alternate=qp.alternate.pack().hex(),
        send_ring=rings.add(qp.send_ring.dump()),
        receive_ring=rings.add(qp.receive_ring.dump()) if qp.receive_ring is not None else None,
        async_events=qp.async_events,
        groups={group.hex(): sorted(lids) for group, lids in qp.groups.items()},
        state=qp.transport.state.to_plain(),
    )


def check(adapter: Adapter, image: im.Image) -> None:
    """Raise ImageError when something of the image is here already."""
    for record in image.contexts:
        if record.id in adapter.contexts:
            raise ImageError(f"context {record.id} exists here already")
        for key in [mr.key for mr in record.mrs] + [mw.key for mw in record.mws]:
            if key >> KEY_BITS in adapter.keys:
                raise ImageError(f"context {record.id}: the key {key:#x} is taken here; number bases must differ")
        for qp in record.qps:
            qpn = im.qpn_of(qp)
            if not isinstance(qpn, int):
                raise ImageError(f"context {record.id}: QPN {qpn!r} is no number")
            if qpn in adapter.queue_pairs:
                raise ImageError(f"context {record.id}: QPN {qpn} is taken here (number bases?)")


def restore(
    adapter: Adapter,
    image: im.Image,
    rings: im.RingSection,
    make_channel: MakeChannel,
    addresses: dict[bytes, bytes] | None = None,
) -> list[Context]:
    """Make every object of an image, all or nothing; `addresses`: IP address there → here. Raises ImageError."""
    check(adapter, image)
    check_image(image)
    made: list[Context] = []
    try:
        for record in image.contexts:
            context = _new_context(record, make_channel)
            adapter.contexts[context.id] = context
            made.append(context)
            _fill(adapter, context, record, rings, addresses or {})
    except Exception as error:  # whatever is wrong with an image, nothing of it may stay
        for context in made:
            adapter.forget(context)
        if isinstance(error, ImageError):
            raise
        what = f"refers to handle {error}, which is not in the image" if isinstance(error, KeyError) else str(error)
        raise ImageError(f"context {record.id}: {what}") from error
    return made


def _new_context(record: im.ContextRecord, make_channel: MakeChannel) -> Context:
    taken = [ring for cq in record.cqs for ring in [cq.ring]]
    taken += [srq.ring for srq in record.srqs]
    taken += [ring for qp in record.qps for ring in (qp.send_ring, qp.receive_ring) if ring is not None]
    ranges = sorted((ring.offset, ring.size) for ring in taken)
    for (first, size), (second, _) in itertools.pairwise(ranges):
        if first + size > second:
            raise ImageError(f"context {record.id}: the rings at {first:#x} and {second:#x} overlap")
    channel = make_channel(record.id, (record.uid, record.gid), ranges)
    context = Context(record.id, None, record.inner_pid, channel, ProcessMemory(NO_PROCESS))
    context.held = True
    return context


def _fill(
    adapter: Adapter,
    context: Context,
    record: im.ContextRecord,
    rings: im.RingSection,
    addresses: dict[bytes, bytes],
) -> None:
    """Make the objects, each kind in the order of `im.Image`, so that what one refers to is there."""
    channel = context.channel
    channel.load_mailbox(bytes.fromhex(record.mailbox))
    if record.async_open:
        context.async_fifo = channel.event_fifo(ASYNC_EVENT.size, "async")
    by_handle: dict[int, Any] = context.objects

    def enter(handle: int, item: Any) -> None:
        if handle in by_handle:
            raise ImageError(f"context {record.id}: two objects have handle {handle}")
        item.handle = handle
        by_handle[handle] = item

    for pd in record.pds:
        enter(pd.handle, ProtectionDomain(adapter.keys))
    for mr in record.mrs:
        region = MemoryRegion(_pd(by_handle, mr.pd), context.memory, mr.key, mr.start, mr.length, mr.iova, mr.access)
        region.pd.users += 1
        enter(mr.handle, region)  # first: what has no handle is not undone
        adapter.keys[mr.key >> KEY_BITS] = region
    for mw in record.mws:
        window = MemoryWindow(_pd(by_handle, mw.pd), mw.key, mw.kind)
        window.region = by_handle[mw.mr] if mw.mr is not None else None
        if window.region is not None:
            if (
                window.region.__class__ is not MemoryRegion
                or mw.iova < window.region.iova
                or mw.end > window.region.end
            ):
                raise ImageError(f"context {record.id}: window {mw.handle} is not within region {mw.mr}")
            window.region.windows += 1
        window.iova, window.end, window.access = mw.iova, mw.end, mw.access
        window.qpn = mw.qpn
        window.pd.users += 1
        enter(mw.handle, window)
        adapter.keys[mw.key >> KEY_BITS] = window
    channels: dict[str, CompletionChannel] = {}
    for item in record.channels:
        fifo = channel.event_fifo(COMP_EVENT.size, item.name)
        channels[item.name] = context.comp_channels[fifo.identity()] = CompletionChannel(fifo, fifo.identity())
    if (record.cqs or record.srqs) and context.async_fifo is None:
        raise ImageError(f"context {record.id}: queues without an asynchronous channel")
    for cq_record in record.cqs:
        target = channels[cq_record.channel] if cq_record.channel is not None else None
        ring = channel.restore_completion_ring(rings.take(cq_record.ring))
        cq = CompletionQueue(ring, cq_record.user_handle, target, context.async_fifo)  # type: ignore[arg-type]
        enter(cq_record.handle, cq)
        if target is not None:
            target.users += 1
        cq.share(*channel.arm_bytes())
        cq.notify = cq_record.notify
        cq.comp_events, cq.async_events = cq_record.comp_events, cq_record.async_events
    for s in record.srqs:
        ring = channel.restore_receive_ring(rings.take(s.ring), s.max_sge, True)
        srq = SharedReceiveQueue(
            ring,
            _pd(by_handle, s.pd),
            s.user_handle,
            s.max_sge,
            s.limit,
            s.number,
            context.async_fifo,  # type: ignore[arg-type]
        )
        srq.pd.users += 1
        srq.async_events = s.async_events
        enter(s.handle, srq)
        adapter.srq_numbers.add(s.number)
    for ah in record.ahs:
        handle = AddressHandle(_pd(by_handle, ah.pd), bytes.fromhex(ah.attributes), ah.number)
        handle.pd.users += 1
        handle.pd.paths[ah.number] = moved(adapter, Path.from_plain(ah.path), addresses)
        enter(ah.handle, handle)
        adapter.ah_numbers[ah.number] += 1
    for qp in record.qps:
        _restore_qp(adapter, context, qp, rings, enter, addresses)
    context.handles.claim(by_handle)


def moved(adapter: Adapter, path: Path, addresses: dict[bytes, bytes]) -> Path:
    """From here on the frames leave this host. The address moved along, unless there is another for it."""
    return path.replace(source_mac=adapter.mac, source_ip=addresses.get(path.source_ip, path.source_ip))


def _pd(objects: dict[int, Any], handle: int) -> ProtectionDomain:
    pd = objects[handle]
    if not isinstance(pd, ProtectionDomain):
        raise ImageError(f"handle {handle} is no protection domain")
    return pd


def _restore_qp(
    adapter: Adapter,
    context: Context,
    record: im.QpRecord,
    rings: im.RingSection,
    enter: Callable[[int, Any], None],
    addresses: dict[bytes, bytes],
) -> None:
    objects, channel = context.objects, context.channel
    pd, send_cq, recv_cq = _pd(objects, record.pd), objects[record.send_cq], objects[record.recv_cq]
    srq = objects[record.srq] if record.srq is not None else None
    if send_cq.__class__ is not CompletionQueue or recv_cq.__class__ is not CompletionQueue:
        raise ImageError(f"queue pair {record.handle}: its completion queues are something else")
    if srq is not None and srq.__class__ is not SharedReceiveQueue:
        raise ImageError(f"queue pair {record.handle}: its shared receive queue is something else")
    capabilities = Capabilities(*record.capabilities)
    check_shape(record.state)
    state = QueuePairState.from_plain(record.state)
    attributes = state.attributes
    if attributes.qp_type != QPT_RC:
        state.receiver.drop_answers()  # an earlier version kept one that could not be sent
    check_state(state)
    state.receiver.drop_reads()  # the program's memory cannot be read before it runs
    if attributes.qp_type != record.kind or record.kind not in (QPT_RC, QPT_UC, QPT_UD):
        raise ImageError(f"queue pair {record.handle}: type {record.kind}, in its state {attributes.qp_type}")
    if attributes.path is not None:
        state.move_to(moved(adapter, attributes.path, addresses))
    send_ring = channel.restore_send_ring(
        rings.take(record.send_ring), capabilities.max_send_sge, capabilities.max_inline_data
    )
    send_ring.datagrams = record.kind == QPT_UD
    receive_ring = None
    if record.receive_ring is not None:
        receive_ring = channel.restore_receive_ring(rings.take(record.receive_ring), capabilities.max_recv_sge, False)
    receive_queue = srq if srq is not None else receive_ring
    if receive_queue is None:
        raise ImageError(f"queue pair {record.handle}: neither a receive queue nor an SRQ")
    transport = make_queue_pair(state, send_ring, receive_queue, send_cq, recv_cq, pd, adapter)
    qp = QueuePair(
        context,
        record.user_handle,
        record.kind,
        pd,
        send_cq,
        recv_cq,
        srq,
        send_ring,
        receive_ring,
        capabilities,
        transport,
    )
    qp.destination = Destination.unpack(bytes.fromhex(record.destination))
    qp.alternate = Destination.unpack(bytes.fromhex(record.alternate))
    qp.async_events = record.async_events
    enter(record.handle, qp)
    adapter.adopt(qp)
    for group, lids in record.groups.items():
        adapter.groups.enter(qp, bytes.fromhex(group), set(lids))
    transport.stop()
    channel.may_post(record.handle, attributes.state >= QpState.RTS)
