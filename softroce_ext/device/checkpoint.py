"""User contexts to an image and back: the same handles, numbers, keys, indices, and each queue pair's whole state.

A dump reads and changes nothing. A restore enters all contexts of an image or none; its queue pairs come up Stopped, so
nothing is sent and no request is executed until a management command says that the program's memory is in place.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from softroce_ext.device import image as im
from softroce_ext.device.adapter import SERVICES, Adapter
from softroce_ext.device.address_handle import AddressHandle, Destination
from softroce_ext.device.completion import (
    ASYNC_EVENT,
    COMP_EVENT,
    CompletionChannel,
    CompletionQueue,
    SharedReceiveQueue,
)
from softroce_ext.device.errors import ImageError
from softroce_ext.device.image_checks import check_image, check_shape, check_state
from softroce_ext.device.memory import ProcessMemory
from softroce_ext.device.opening import NO_PROCESS
from softroce_ext.device.regions import KEY_BITS, Keys, MemoryRegion, MemoryWindow, ProtectionDomain
from softroce_ext.device.shared import Channel, EventFifo, RingImage
from softroce_ext.device.user_context import UserContext
from softroce_ext.device.user_object import ObjectT, UserObject
from softroce_ext.device.user_queue_pair import Capabilities, InitAttributes, UserQueuePair
from softroce_ext.transport.services import make_queue_pair
from softroce_ext.transport.state.queue_pair import QueuePairState
from softroce_ext.transport.verbs import QpState, QpType
from softroce_ext.wire.path import Path

MakeChannel = Callable[[str, tuple[int, int], list[tuple[int, int]]], Channel]
"""(context id, (uid, gid), ranges that rings will take) → a channel."""


# -- dump --------------------------------------------------------------------------------------------------------------


def dump(
    adapter: Adapter, contexts: list[UserContext], cm: list[dict[str, Any]] | None = None
) -> tuple[im.Image, im.RingSection]:
    """Describe contexts completely. Their programs must be frozen and their queue pairs Stopped.

    cm: records of the programs' openings of rdma_cm, which go into the image as they are.
    """
    rings = im.RingSection()
    records = [_dump_context(context, rings) for context in contexts]
    return im.Image(version=im.VERSION, number_base=adapter.number_base, contexts=records, cm=cm or []), rings


def _dump_context(context: UserContext, rings: im.RingSection) -> im.ContextRecord:
    uid, gid = context.channel.owner
    objects: dict[str, Any] = {
        name: [kind.dump(item, rings) for item in context.of(kind.kind)] for name, kind in ORDER.items()
    }
    return im.ContextRecord(
        id=context.id,
        inner_pid=context.inner_pid,
        uid=uid,
        gid=gid,
        async_open=context.async_fifo is not None,
        mailbox=context.channel.dump_mailbox().hex(),
        channels=[im.ChannelRecord(name=channel.fifo.name) for channel in context.comp_channels.values()],
        **objects,
    )


def _dump_qp(qp: UserQueuePair, rings: im.RingSection) -> im.QpRecord:
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


# -- restore -----------------------------------------------------------------------------------------------------------


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
                raise ImageError(f"context {record.id}: QPN {qpn!r} is not a number")
            if qpn in adapter.queue_pairs:
                raise ImageError(f"context {record.id}: QPN {qpn} is taken here; number bases must differ")


def restore(
    adapter: Adapter,
    image: im.Image,
    rings: im.RingSection,
    make_channel: MakeChannel,
    addresses: dict[bytes, bytes] | None = None,
) -> list[UserContext]:
    """Make every object of an image, all or nothing; `addresses`: IP address there → here. Raises ImageError."""
    check(adapter, image)
    check_image(image)
    made: list[UserContext] = []
    try:
        for record in image.contexts:
            context = _new_context(record, make_channel)
            adapter.contexts[context.id] = context
            made.append(context)
            _Restoration(adapter, context, rings, addresses or {}).fill(record)
    except Exception as error:  # whatever is wrong with an image, nothing of it may stay
        for context in made:
            adapter.forget(context)
        what = f"refers to handle {error}, which is not in the image" if isinstance(error, KeyError) else str(error)
        raise ImageError(f"context {record.id}: {what}") from error
    return made


def _new_context(record: im.ContextRecord, make_channel: MakeChannel) -> UserContext:
    taken = [ring for cq in record.cqs for ring in [cq.ring]]
    taken += [srq.ring for srq in record.srqs]
    taken += [ring for qp in record.qps for ring in (qp.send_ring, qp.receive_ring) if ring is not None]
    ranges = sorted((ring.offset, ring.size) for ring in taken)
    for (first, size), (second, _) in itertools.pairwise(ranges):
        if first + size > second:
            raise ImageError(f"the rings at {first:#x} and {second:#x} overlap")
    channel = make_channel(record.id, (record.uid, record.gid), ranges)
    context = UserContext(record.id, None, record.inner_pid, channel, ProcessMemory(NO_PROCESS))
    context.held = True
    return context


class _Restoration:
    """The restore of one user context (user_object.Restore)."""

    def __init__(
        self, adapter: Adapter, context: UserContext, rings: im.RingSection, addresses: dict[bytes, bytes]
    ) -> None:
        self.adapter = adapter
        self.context = context
        self.keys: Keys = adapter.keys
        self.memory = context.memory
        self.channel = context.channel
        self.completion_channels: dict[str, CompletionChannel] = {}
        self._rings = rings
        self._addresses = addresses

    def fill(self, record: im.ContextRecord) -> None:
        """Make the objects of the record. Raises ImageError, KeyError for a handle that is not there, and others."""
        context, channel = self.context, self.channel
        channel.load_mailbox(bytes.fromhex(record.mailbox))
        if record.async_open:
            context.async_fifo = channel.event_fifo(ASYNC_EVENT.size, "async")
        for entry in record.channels:
            made = CompletionChannel(channel.event_fifo(COMP_EVENT.size, entry.name))
            self.completion_channels[entry.name] = context.comp_channels[made.identity] = made
        for name, kind in ORDER.items():
            for plain in getattr(record, name):
                self._enter(plain.handle, item := kind.restore(plain, self))
                if kind.finish is not None:
                    kind.finish(self.adapter, item, plain)
        context.handles.claim(context.objects)

    def _enter(self, handle: int, item: UserObject) -> None:
        if handle in self.context.objects:
            raise ImageError(f"two objects have handle {handle}")
        item.handle = handle
        self.context.objects[handle] = item  # first: what has no handle is not undone
        item.enter(self.adapter)

    @property
    def async_fifo(self) -> EventFifo:
        if self.context.async_fifo is None:
            raise ImageError("queues without an asynchronous channel")
        return self.context.async_fifo

    def find(self, handle: int) -> UserObject:
        return self.context.objects[handle]

    def get(self, handle: int, kind: type[ObjectT]) -> ObjectT:
        item = self.context.objects[handle]
        if not isinstance(item, kind):
            raise ImageError(f"handle {handle} is a {type(item).__name__}, not a {kind.__name__}")
        return item

    def ring(self, record: im.RingRecord) -> RingImage:
        return self._rings.take(record)

    def path(self, plain: dict[str, int | str]) -> Path:
        return self.moved(Path.from_plain(plain))

    def moved(self, path: Path) -> Path:
        return moved(self.adapter.mac, path, self._addresses)


def moved(mac: bytes, path: Path, addresses: dict[bytes, bytes]) -> Path:
    """Return the path from this host (`mac`). Its address has moved along, unless `addresses` has another for it."""
    return path.replace(source_mac=mac, source_ip=addresses.get(path.source_ip, path.source_ip))


def _restore_qp(record: im.QpRecord, restore: _Restoration) -> UserQueuePair:
    channel = restore.channel
    pd, send_cq, recv_cq = (
        restore.get(record.pd, ProtectionDomain), restore.find(record.send_cq), restore.find(record.recv_cq)
    )  # fmt: skip
    srq = restore.find(record.srq) if record.srq is not None else None
    if not isinstance(send_cq, CompletionQueue) or not isinstance(recv_cq, CompletionQueue):
        raise ImageError(f"queue pair {record.handle}: its completion queues are something else")
    if srq is not None and not isinstance(srq, SharedReceiveQueue):
        raise ImageError(f"queue pair {record.handle}: its shared receive queue is something else")
    capabilities = Capabilities(*record.capabilities)
    check_shape(record.state)
    state = QueuePairState.from_plain(record.state)
    if state.attributes.qp_type != QpType.RC:
        state.receiver.drop_answers()  # an earlier version kept one that could not be sent
    check_state(state)
    state.receiver.drop_reads()  # the program's memory cannot be read before it runs
    if state.attributes.qp_type != record.kind or record.kind not in SERVICES:
        raise ImageError(f"queue pair {record.handle}: type {record.kind}, in its state {state.attributes.qp_type}")
    if state.attributes.path is not None:
        state.move_to(restore.moved(state.attributes.path))
    send_ring = channel.restore_send_ring(
        restore.ring(record.send_ring), capabilities.max_send_sge, capabilities.max_inline_data
    )
    send_ring.datagrams = record.kind == QpType.UD
    receive_ring = None
    if record.receive_ring is not None:
        receive_ring = channel.restore_receive_ring(restore.ring(record.receive_ring), capabilities.max_recv_sge, False)
    receive_queue = srq if srq is not None else receive_ring
    if receive_queue is None:
        raise ImageError(f"queue pair {record.handle}: neither a receive queue nor an SRQ")
    transport = make_queue_pair(state, send_ring, receive_queue, send_cq, recv_cq, pd, restore.adapter.events)
    attributes = InitAttributes(
        user_handle=record.user_handle,
        kind=record.kind,
        pd=pd,
        send_cq=send_cq,
        recv_cq=recv_cq,
        srq=srq,
        capabilities=capabilities,
        sq_sig_all=state.attributes.sq_sig_all,
    )
    qp = UserQueuePair(restore.context, attributes, send_ring, receive_ring, transport)
    qp.destination = Destination.unpack(bytes.fromhex(record.destination))
    qp.alternate = Destination.unpack(bytes.fromhex(record.alternate))
    qp.async_events = record.async_events
    return qp


def _stop_qp(adapter: Adapter, qp: UserQueuePair, record: im.QpRecord) -> None:
    """A queue pair of an image has been entered: join its groups, and stop it until its program runs."""
    for group, lids in record.groups.items():
        adapter.groups.enter(qp, bytes.fromhex(group), set(lids))
    qp.transport.stop()
    qp.context.channel.may_post(qp.handle, qp.transport.attributes.state >= QpState.RTS)


# -- the order of the kinds --------------------------------------------------------------------------------------------


class _Kind(NamedTuple):
    """How one kind of object is dumped and restored."""

    kind: type[UserObject]
    dump: Callable[[Any, im.RingSection], im.Record]
    restore: Callable[[Any, _Restoration], UserObject]
    finish: Callable[[Adapter, Any, Any], None] | None = None
    """Called with (adapter, object, record) when the object has entered the device."""


ORDER: Final[dict[str, _Kind]] = {
    "pds": _Kind(ProtectionDomain, ProtectionDomain.to_record, ProtectionDomain.from_record),
    "mrs": _Kind(MemoryRegion, MemoryRegion.to_record, MemoryRegion.from_record),
    "mws": _Kind(MemoryWindow, MemoryWindow.to_record, MemoryWindow.from_record),
    "cqs": _Kind(CompletionQueue, CompletionQueue.to_record, CompletionQueue.from_record),
    "srqs": _Kind(SharedReceiveQueue, SharedReceiveQueue.to_record, SharedReceiveQueue.from_record),
    "ahs": _Kind(AddressHandle, AddressHandle.to_record, AddressHandle.from_record),
    "qps": _Kind(UserQueuePair, _dump_qp, _restore_qp, _stop_qp),
}
"""Field of `image.ContextRecord` → kind, in the order of a restore: what an object refers to comes before it."""
