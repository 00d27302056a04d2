"""The device itself: its GIDs, its numbers, its contexts; verbs that create and destroy queue pairs and regions."""

from __future__ import annotations

import errno
import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final

from softroce_ext.device import limits
from softroce_ext.device.addressing import PORT, Addressing, Resolver, guid_of
from softroce_ext.device.completion import CompletionQueue, SharedReceiveQueue
from softroce_ext.device.context import AddressHandle, Context
from softroce_ext.device.errors import VerbsError
from softroce_ext.device.link import Link
from softroce_ext.device.multicast import Groups
from softroce_ext.device.numbers import FIRST_QPN, Range
from softroce_ext.device.queue_pair import (
    QPT_RC,
    QPT_UC,
    QPT_UD,
    Capabilities,
    Destination,
    NoReceiveQueue,
    QueuePair,
)
from softroce_ext.device.regions import (
    KEY_BITS,
    Keys,
    MemoryRegion,
    MemoryWindow,
    ProtectionDomain,
    check_access,
    check_range,
)
from softroce_ext.transport.engine import Engine
from softroce_ext.transport.services import make_queue_pair
from softroce_ext.transport.state.attributes import Attributes
from softroce_ext.transport.state.queue_pair import QueuePairState
from softroce_ext.transport.verbs import QpEvent, QpState
from softroce_ext.wire.frame import Path

PORT_ACTIVE, PORT_ERR, GID_CHANGE = 9, 10, 18
"""enum ib_event_type, the port's."""

SGE_BYTES: Final = 16
"""struct ib_uverbs_sge."""
PACKETS_ON_THE_WAY: Final = 1024
"""Of all queue pairs of one NIC together; a port of the userspace Open vSwitch buffers about 1800 of 4 KiB."""
MIN_WINDOW: Final = 16
"""A queue pair's least share of them."""

_FATAL_EVENTS: Final = frozenset(map(int, (QpEvent.QP_FATAL, QpEvent.QP_REQ_ERR, QpEvent.QP_ACCESS_ERR)))
"""Events of a queue pair that has gone to ERR."""


class Adapter:
    """One RDMA device with one port."""

    def __init__(self, engine: Engine, mac: bytes, interface_mtu: int, number_base: int, resolve: Resolver) -> None:
        """mac: 6 bytes; interface_mtu: bytes; number_base: 0..255 (`numbers`)."""
        self.engine = engine
        self.mac = mac
        self.number_base = number_base
        self.guid = guid_of(mac)
        self.addressing = Addressing(mac, resolve)
        self.addressing.changed = self._gid_changed
        self.groups = Groups(engine)
        self.link = Link(mtu=interface_mtu)
        """The interface below; changed by `set_link` only."""
        self.link_listeners: list[Callable[[], None]] = []
        self.last_turn: Callable[[Sequence[QueuePair]], None] = lambda _leaving: None
        """Has queue pairs send what they have to, an ACK perhaps, before they are destroyed."""
        self.measure_speed: Callable[[], int | None] = lambda: None
        """Asks the interface how fast it is (Mbit/s, None: unknown): nobody tells when that changes."""
        engine.port_mtu = limits.MTU_BYTES[limits.active_mtu(interface_mtu)]
        self.contexts: dict[str, Context] = {}
        self.keys: Keys = {}
        self.queue_pairs: dict[int, QueuePair] = {}
        self.ah_numbers: Counter[int] = Counter()
        """How many address handles have each number: one that moved here keeps its own, which another may have."""
        self.srq_numbers: set[int] = set()
        self._sending: set[int] = set()
        """QPNs of the queue pairs in RTS or beyond."""
        self.gid_listeners: list[Callable[[int, bytes | None], None]] = []
        self._qpns = Range(number_base, FIRST_QPN)
        self._keys = Range(number_base)
        self._srqs = Range(number_base)
        self._ahs = Range(0)

    # -- GID table -----------------------------------------------------------------------------------------------

    @property
    def gids(self) -> list[bytes | None]:
        """The GID table, 16 bytes each; None: an empty row."""
        return self.addressing.gids

    def addresses(self) -> list[bytes]:
        """The IP addresses of the GID table, 4 or 16 bytes each; not the link-local one of row 0."""
        return self.addressing.addresses()

    def add_address(self, ip: bytes) -> int:
        """Put an address (4 or 16 bytes) into the GID table; returns its index. Known ones stay."""
        return self.addressing.add(ip)

    def remove_address(self, ip: bytes) -> None:
        """Take an address out. Queue pairs keep theirs by address. Raises StateError when it is not there."""
        self.addressing.remove(ip)

    def _gid_changed(self, index: int) -> None:
        for listener in self.gid_listeners:
            listener(index, self.gids[index])
        for context in self.contexts.values():
            if not context.held:
                context.post_async(PORT, GID_CHANGE)

    # -- the port ------------------------------------------------------------------------------------------------

    @property
    def interface_mtu(self) -> int:
        """Bytes."""
        return self.link.mtu

    def set_link(self, link: Link) -> None:
        """The interface has changed: say so in every answer, in the files, and by events."""
        before, self.link = self.link, link
        self.engine.port_mtu = limits.MTU_BYTES[limits.active_mtu(link.mtu)]
        if link != before:
            for listener in self.link_listeners:
                listener()
        if link.active != before.active:
            self.port_event(link.active)

    def current_link(self) -> Link:
        """The interface as it is now, its speed too."""
        speed = self.measure_speed()
        if speed != self.link.speed:
            self.set_link(self.link._replace(speed=speed))
        return self.link

    def port_event(self, active: bool) -> None:
        """The link came up or went down: tell every program (IBA 11.6.3.2)."""
        if not active:
            self.engine.counters["link_downed"] += 1
        for context in self.contexts.values():
            if not context.held:
                context.post_async(PORT, PORT_ACTIVE if active else PORT_ERR)

    def path(self, destination: Destination, local_qpn: int, remote_qpn: int) -> Path:
        """The resolved path of a connection. Raises VerbsError, or NotYet while the MAC is being asked for."""
        return self.addressing.connection_path(destination, local_qpn, remote_qpn)

    # -- address handles -----------------------------------------------------------------------------------------

    def create_address_handle(self, context: Context, pd: ProtectionDomain, attributes: bytes) -> AddressHandle:
        """ibv_create_ah; attributes: struct ib_uverbs_ah_attr, 32 bytes. Raises VerbsError, or NotYet."""
        context.check_room()
        path = self.addressing.path(Destination.of_handle(attributes), 0)
        handle = AddressHandle(pd, attributes, self.take_ah_number())
        pd.users += 1
        pd.paths[handle.number] = path
        context.add(handle)
        return handle

    def destroy_address_handle(self, context: Context, handle: AddressHandle) -> None:
        """ibv_destroy_ah."""
        handle.pd.users -= 1
        del handle.pd.paths[handle.number]
        self._give_back_ah_number(handle.number)
        context.remove(handle.handle)

    # -- regions -------------------------------------------------------------------------------------------------

    def register(
        self, context: Context, pd: ProtectionDomain, start: int, length: int, iova: int, access: int
    ) -> MemoryRegion:
        """ibv_reg_mr."""
        context.check_room()
        check_access(access)
        check_range(context.memory, start, length, iova, access)
        index = self._keys.take(self.keys)
        region = MemoryRegion(
            pd, context.memory, index << KEY_BITS | secrets.randbits(KEY_BITS), start, length, iova, access
        )
        self.keys[index] = region
        pd.users += 1
        context.add(region)
        return region

    def deregister(self, context: Context, region: MemoryRegion) -> None:
        """ibv_dereg_mr. Raises VerbsError(EINVAL, as rxe) while windows are bound to it."""
        if region.windows:
            raise VerbsError(errno.EINVAL, "memory windows are bound to the region")
        del self.keys[region.key >> KEY_BITS]
        region.pd.users -= 1
        context.remove(region.handle)

    def allocate_window(self, context: Context, pd: ProtectionDomain, kind: int) -> MemoryWindow:
        """ibv_alloc_mw."""
        context.check_room()
        index = self._keys.take(self.keys)
        window = MemoryWindow(pd, index << KEY_BITS | secrets.randbits(KEY_BITS), kind)
        self.keys[index] = window
        pd.users += 1
        context.add(window)
        return window

    def free_window(self, context: Context, window: MemoryWindow) -> None:
        """ibv_dealloc_mw."""
        if window.region is not None:
            window.region.windows -= 1
        del self.keys[window.key >> KEY_BITS]
        window.pd.users -= 1
        context.remove(window.handle)

    # -- queue pairs ---------------------------------------------------------------------------------------------

    def create_queue_pair(
        self,
        context: Context,
        user_handle: int,
        kind: int,
        pd: ProtectionDomain,
        send_cq: CompletionQueue,
        recv_cq: CompletionQueue,
        srq: SharedReceiveQueue | None,
        wanted: Capabilities,
        sq_sig_all: bool,
    ) -> QueuePair:
        """ibv_create_qp. Raises VerbsError: EOPNOTSUPP for a kind we do not have, EINVAL above a limit."""
        if kind not in (QPT_RC, QPT_UC, QPT_UD):
            raise VerbsError(errno.EOPNOTSUPP, f"QP type {kind}")
        if (
            wanted.max_send_wr > limits.MAX_QP_WR
            or (srq is None and wanted.max_recv_wr > limits.MAX_QP_WR)
            or wanted.max_send_sge > limits.MAX_SGE
            or (srq is None and wanted.max_recv_sge > limits.MAX_SGE)
            or wanted.max_inline_data > limits.MAX_INLINE_DATA
        ):
            raise VerbsError(errno.EINVAL, f"capabilities above the device's limits: {wanted}")
        context.check_room()
        qpn = self._qpns.take(self.queue_pairs)
        # As rxe: elements and inline data share the end of a slot, and the program may use all of it for either.
        room = max(SGE_BYTES * wanted.max_send_sge, wanted.max_inline_data)
        send_ring = context.channel.send_ring(wanted.max_send_wr, room // SGE_BYTES, room)
        send_ring.datagrams = kind == QPT_UD
        try:
            receive_ring = (
                None if srq else context.channel.receive_ring(wanted.max_recv_wr, wanted.max_recv_sge, shared=False)
            )
        except VerbsError:
            send_ring.free()
            raise
        capabilities = Capabilities(
            send_ring.capacity,
            receive_ring.capacity if receive_ring is not None else 0,
            room // SGE_BYTES,
            wanted.max_recv_sge if receive_ring is not None else 0,
            send_ring.max_inline,
        )
        transport = make_queue_pair(
            QueuePairState(Attributes(qpn, kind, sq_sig_all, srq is not None)),
            send_ring,
            srq or receive_ring or NoReceiveQueue(),
            send_cq,
            recv_cq,
            pd,
            self,
        )
        qp = QueuePair(
            context, user_handle, kind, pd, send_cq, recv_cq, srq, send_ring, receive_ring, capabilities, transport
        )
        self.adopt(qp)
        context.add(qp)
        return qp

    def adopt(self, qp: QueuePair) -> None:
        """Enter a queue pair (new or restored) into the device and the engine."""
        self.engine.add_qp(qp.transport)
        self.queue_pairs[qp.qpn] = qp
        qp.users(+1)
        self._count_sender(qp)

    def _count_sender(self, qp: QueuePair, there: bool = True) -> None:
        """Note whether a queue pair may send; what may be on the way is shared by those that may."""
        if there and qp.transport.attributes.state >= QpState.RTS:
            self._sending.add(qp.qpn)
        else:
            self._sending.discard(qp.qpn)
        self._share_window()

    def _share_window(self) -> None:
        """What all queue pairs together may have on the way must fit into the buffers of a software switch."""
        share = max(MIN_WINDOW, PACKETS_ON_THE_WAY // max(len(self._sending), 1))
        self.engine.window = min(self.engine.config.window, share)

    def modify_queue_pair(self, qp: QueuePair, attributes: dict[str, Any]) -> None:
        """ibv_modify_qp with the transport's attribute names. Raises VerbsError(EINVAL)."""
        try:
            qp.transport.modify(attributes)
        except ValueError as error:  # InvalidTransition is one
            raise VerbsError(errno.EINVAL, str(error)) from None
        state = qp.transport.attributes.state
        self._count_sender(qp)
        if attributes.get("qp_state") == QpState.RESET:
            qp.reset_rings()
        # rxe refuses a post before RTS at the call; in ERR it takes it and flushes.
        qp.context.channel.may_post(qp.handle, state >= QpState.RTS)
        if state >= QpState.RTS:
            self.engine.ring(qp.transport)

    def destroy_queue_pair(self, qp: QueuePair) -> None:
        """ibv_destroy_qp: no packet, no completion. Raises VerbsError(EBUSY) while it is in a multicast group."""
        if qp.groups:
            raise VerbsError(errno.EBUSY, "the queue pair is in a multicast group")
        self.last_turn((qp,))
        self.engine.remove_qp(qp.qpn)
        del self.queue_pairs[qp.qpn]
        self._count_sender(qp, there=False)
        qp.users(-1)
        qp.context.channel.may_post(qp.handle, False)
        qp.free_rings()
        qp.context.remove(qp.handle)

    def qp_event(self, qpn: int, event: int) -> None:
        """transport.interfaces.EventSink."""
        qp = self.queue_pairs.get(qpn)
        if qp is not None:
            if event in _FATAL_EVENTS:
                qp.context.channel.may_post(qp.handle, True)
            if qp.context.post_async(qp.user_handle, event):
                qp.async_events += 1

    def owner_gone(self, qpn: int) -> bool:
        """transport.interfaces.EventSink."""
        qp = self.queue_pairs.get(qpn)
        return qp is not None and bool(qp.context.memory.gone())

    # -- numbers of the rest -------------------------------------------------------------------------------------

    def take_srq_number(self) -> int:
        """A number for a new SRQ."""
        number = self._srqs.take(self.srq_numbers)
        self.srq_numbers.add(number)
        return number

    def take_ah_number(self) -> int:
        """A number for a new address handle; above 0, else the provider resolves MACs by itself."""
        if len(self.ah_numbers) >= limits.MAX_AH:
            raise VerbsError(errno.ENOMEM, "too many address handles")
        number = self._ahs.take(self.ah_numbers)
        self.ah_numbers[number] += 1
        return number

    def _give_back_ah_number(self, number: int) -> None:
        self.ah_numbers[number] -= 1
        if self.ah_numbers[number] <= 0:
            del self.ah_numbers[number]  # one that is in there is taken

    # -- contexts ------------------------------------------------------------------------------------------------

    def forget(self, context: Context) -> None:
        """Free everything that a context owns, at once and without a packet (its process ended, or it moved away)."""
        self.contexts.pop(context.id, None)
        for qp in context.queue_pairs:
            self.groups.leave_all(qp)
            self.engine.remove_qp(qp.qpn)
            self.queue_pairs.pop(qp.qpn, None)
            self._sending.discard(qp.qpn)
            qp.free_rings()
        for item in context.objects.values():
            if item.__class__ in (MemoryRegion, MemoryWindow):
                self.keys.pop(item.key >> KEY_BITS, None)
            elif item.__class__ in (CompletionQueue, SharedReceiveQueue):
                item.ring.free()
                if item.__class__ is SharedReceiveQueue:
                    self.srq_numbers.discard(item.number)
            elif hasattr(item, "number"):
                self._give_back_ah_number(item.number)
        context.objects.clear()
        self._share_window()
        context.channel.close()
