"""The device itself: its numbers, its user contexts; verbs that create and destroy queue pairs and regions."""

from __future__ import annotations

import errno
import secrets
from dataclasses import replace
from typing import Any, Final

from softroce_ext.device import limits
from softroce_ext.device.address_handle import AddressHandle, Destination
from softroce_ext.device.addressing import Addressing, guid_of
from softroce_ext.device.errors import VerbsError
from softroce_ext.device.events import Events
from softroce_ext.device.host import Host
from softroce_ext.device.link import Link
from softroce_ext.device.multicast import Groups
from softroce_ext.device.numbers import FIRST_QPN, NumberPool, Range
from softroce_ext.device.regions import (
    KEY_BITS,
    Keys,
    MemoryRegion,
    MemoryWindow,
    ProtectionDomain,
    check_access,
    check_range,
)
from softroce_ext.device.user_context import UserContext
from softroce_ext.device.user_object import UserObject
from softroce_ext.device.user_queue_pair import Capabilities, InitAttributes, NoReceiveQueue, UserQueuePair
from softroce_ext.device.window import WindowShares
from softroce_ext.transport.engine import Engine
from softroce_ext.transport.services import make_queue_pair
from softroce_ext.transport.state.attributes import Attributes
from softroce_ext.transport.state.queue_pair import QueuePairState
from softroce_ext.transport.verbs import QpEvent, QpState, QpType

SERVICES: Final = (QpType.RC, QpType.UC, QpType.UD)
"""The kinds of queue pairs that a program can create."""
SGE_BYTES: Final = 16
"""struct ib_uverbs_sge."""


class Adapter:
    """One RDMA device with one port."""

    def __init__(self, engine: Engine, mac: bytes, interface_mtu: int, number_base: int, host: Host) -> None:
        """mac: 6 bytes; interface_mtu: bytes; number_base: 0..255 (`numbers`)."""
        self.engine = engine
        self.mac = mac
        self.number_base = number_base
        self.guid = guid_of(mac)
        self._host = host
        self.addressing = Addressing(mac, host.resolve, self._gid_changed)
        self.groups = Groups(engine, host.group_changed)
        self.events = Events(self)
        self.link = Link(mtu=interface_mtu)
        """The interface below; changed by `set_link` only."""
        engine.port_mtu = limits.MTU_BYTES[limits.active_mtu(interface_mtu)]
        self.contexts: dict[str, UserContext] = {}
        self.keys: Keys = {}
        self.queue_pairs: dict[int, UserQueuePair] = {}
        self.ah_numbers = NumberPool(Range(0), limits.MAX_AH, "address handles")
        """Above 0: with 0 the provider resolves MACs by itself."""
        self.srq_numbers = NumberPool(Range(number_base), limits.MAX_SRQ, "shared receive queues")
        self._qpns = Range(number_base, FIRST_QPN)
        self._key_indices = Range(number_base)
        self._shares = WindowShares(engine)

    def _gid_changed(self, index: int) -> None:
        self._host.gid_changed(index, self.addressing.gids[index])
        self.events.port_event(QpEvent.GID_CHANGE)

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
            self._host.link_changed()
        if link.active != before.active:
            if not link.active:
                self.engine.counters["link_downed"] += 1
            self.events.port_event(QpEvent.PORT_ACTIVE if link.active else QpEvent.PORT_ERR)

    def current_link(self) -> Link:
        """The interface as it is now, its speed included."""
        speed = self._host.link_speed()
        if speed != self.link.speed:
            self.set_link(self.link._replace(speed=speed))
        return self.link

    # -- address handles -----------------------------------------------------------------------------------------

    def create_address_handle(self, context: UserContext, pd: ProtectionDomain, attributes: bytes) -> AddressHandle:
        """ibv_create_ah; attributes: struct ib_uverbs_ah_attr, 32 bytes. Raises VerbsError, or NotYet."""
        context.check_room()
        path = self.addressing.path(Destination.of_handle(attributes), 0)
        handle = AddressHandle(pd, attributes, self.ah_numbers.take(), path)
        context.add(handle)
        handle.enter(self)
        return handle

    # -- regions -------------------------------------------------------------------------------------------------

    def register(
        self, context: UserContext, pd: ProtectionDomain, *, start: int, length: int, iova: int, access: int
    ) -> MemoryRegion:
        """ibv_reg_mr."""
        context.check_room()
        check_access(access)
        check_range(context.memory, start, length, iova, access)
        region = MemoryRegion(pd, context.memory, self._new_key(), start, length, iova, access)
        context.add(region)
        region.enter(self)
        return region

    def _new_key(self) -> int:
        return self._key_indices.take(self.keys) << KEY_BITS | secrets.randbits(KEY_BITS)

    def deregister(self, context: UserContext, region: MemoryRegion) -> None:
        """ibv_dereg_mr. Raises VerbsError(EINVAL, as rxe) while windows are bound to it."""
        if region.windows:
            raise VerbsError(errno.EINVAL, "memory windows are bound to the region")
        self.destroy(context, region)

    def allocate_window(self, context: UserContext, pd: ProtectionDomain, kind: int) -> MemoryWindow:
        """ibv_alloc_mw."""
        context.check_room()
        window = MemoryWindow(pd, self._new_key(), kind)
        context.add(window)
        window.enter(self)
        return window

    # -- queue pairs ---------------------------------------------------------------------------------------------

    def create_queue_pair(self, context: UserContext, attributes: InitAttributes) -> UserQueuePair:
        """ibv_create_qp. Raises VerbsError: EOPNOTSUPP for a kind that does not exist here, EINVAL above a limit."""
        wanted, srq = attributes.capabilities, attributes.srq
        if attributes.kind not in SERVICES:
            raise VerbsError(errno.EOPNOTSUPP, f"QP type {attributes.kind}")
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
        send_ring.datagrams = attributes.kind == QpType.UD
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
            QueuePairState(Attributes(qpn, attributes.kind, attributes.sq_sig_all, srq is not None)),
            send_ring,
            srq or receive_ring or NoReceiveQueue(),
            attributes.send_cq,
            attributes.recv_cq,
            attributes.pd,
            self.events,
        )
        created = replace(attributes, capabilities=capabilities)
        qp = UserQueuePair(context, created, send_ring, receive_ring, transport)
        context.add(qp)
        qp.enter(self)
        return qp

    def adopt(self, item: UserObject) -> None:
        """Enter a user queue pair (new or restored) into the device and the engine."""
        assert isinstance(item, UserQueuePair)
        self.engine.add_qp(item.transport)
        self.queue_pairs[item.qpn] = item
        self._shares.count(item.qpn, item.transport.attributes.state >= QpState.RTS)

    def withdraw(self, item: UserObject) -> None:
        """Take a user queue pair out of its groups, the device and the engine, without a packet or a completion."""
        assert isinstance(item, UserQueuePair)
        if self.queue_pairs.get(item.qpn) is item:
            self.groups.leave_all(item)
            self.engine.remove_qp(item.qpn)
            del self.queue_pairs[item.qpn]
            self._shares.count(item.qpn, False)

    def modify_queue_pair(self, qp: UserQueuePair, attributes: dict[str, Any]) -> None:
        """ibv_modify_qp with the transport's attribute names. Raises VerbsError(EINVAL)."""
        try:
            qp.transport.modify(attributes)
        except ValueError as error:  # InvalidTransition is one
            raise VerbsError(errno.EINVAL, str(error)) from None
        state = qp.transport.attributes.state
        self._shares.count(qp.qpn, state >= QpState.RTS)
        if attributes.get("qp_state") == QpState.RESET:
            qp.reset_rings()
        # rxe refuses a post before RTS at the call; in ERR it takes it and flushes.
        qp.context.channel.may_post(qp.handle, state >= QpState.RTS)
        if state >= QpState.RTS:
            self.engine.ring(qp.transport)

    def destroy_queue_pair(self, qp: UserQueuePair) -> None:
        """ibv_destroy_qp: no packet, no completion. Raises VerbsError(EBUSY) while it is in a multicast group."""
        if qp.groups:
            raise VerbsError(errno.EBUSY, "the queue pair is in a multicast group")
        self._host.last_turn((qp,))
        qp.context.channel.may_post(qp.handle, False)
        qp.free(self)
        qp.context.remove(qp.handle)

    # -- user contexts -------------------------------------------------------------------------------------------

    def destroy(self, context: UserContext, item: UserObject) -> None:
        """Free an object that nothing else refers to, and its handle."""
        item.free(self)
        context.remove(item.handle)

    def forget(self, context: UserContext) -> None:
        """Free everything that a context owns, at once and without a packet (its process ended, or it moved away)."""
        self.contexts.pop(context.id, None)
        for item in context.objects.values():
            item.free(self)
        context.objects.clear()
        context.channel.close()
