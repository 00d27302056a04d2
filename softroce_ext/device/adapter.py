"""The device itself: its GIDs, its numbers, its contexts; verbs that create and destroy queue pairs and regions."""

from __future__ import annotations

import errno
import secrets
from collections.abc import Callable
from typing import Any, Final

from softroce_ext.device import limits
from softroce_ext.device.completion import CompletionQueue, SharedReceiveQueue
from softroce_ext.device.context import Context
from softroce_ext.device.errors import NotYet, StateError, VerbsError
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
from softroce_ext.transport.context import QpContext
from softroce_ext.transport.engine import Engine
from softroce_ext.transport.qp import QueuePair as TransportQueuePair
from softroce_ext.transport.verbs import QpState
from softroce_ext.wire.frame import Path, udp_source_port

V4_PREFIX: Final = bytes(10) + b"\xff\xff"
GID_CHANGE: Final = 18
PORT: Final = 1

PACKETS_ON_THE_WAY: Final = 1024
"""Of all queue pairs of one NIC together; a port of the userspace Open vSwitch buffers about 1800 of 4 KiB."""
MIN_WINDOW: Final = 16
"""A queue pair's least share of them."""

Resolver = Callable[[bytes], bytes | None]
"""IPv4 address (4 bytes) → MAC of the next hop (6 bytes), or None while it is being asked for."""


def guid_of(mac: bytes) -> bytes:
    """The EUI-64 of a MAC, as rxe makes its node GUID."""
    return bytes([mac[0] ^ 2, mac[1], mac[2], 0xFF, 0xFE, mac[3], mac[4], mac[5]])


class Adapter:
    """One RDMA device with one port."""

    def __init__(self, engine: Engine, mac: bytes, interface_mtu: int, number_base: int, resolve: Resolver) -> None:
        """mac: 6 bytes; interface_mtu: bytes; number_base: 0..255 (`numbers`)."""
        self.engine = engine
        self.mac = mac
        self.interface_mtu = interface_mtu
        self.number_base = number_base
        self.guid = guid_of(mac)
        self.resolve = resolve
        self.contexts: dict[str, Context] = {}
        self.keys: Keys = {}
        self.queue_pairs: dict[int, QueuePair] = {}
        self.ah_numbers: set[int] = set()
        self.gids: list[bytes | None] = [bytes.fromhex("fe80000000000000") + self.guid]
        self.gid_listeners: list[Callable[[int, bytes | None], None]] = []
        self._qpns = Range(number_base, FIRST_QPN)
        self._keys = Range(number_base)
        self._srqs = Range(number_base)
        self._ahs = Range(0)

    # -- GID table -----------------------------------------------------------------------------------------------

    def addresses(self) -> list[bytes]:
        """The IPv4 addresses of the GID table, 4 bytes each."""
        return [gid[12:] for gid in self.gids if gid is not None and gid[:12] == V4_PREFIX]

    def add_address(self, ip: bytes) -> int:
        """Put an IPv4 address into the first free place of the GID table; returns its index. Known ones stay."""
        gid = V4_PREFIX + ip
        if gid in self.gids:
            return self.gids.index(gid)
        if None in self.gids:
            index = self.gids.index(None)
            self.gids[index] = gid
        else:
            if len(self.gids) >= limits.GID_TABLE_LENGTH:
                raise StateError("the GID table is full")
            index = len(self.gids)
            self.gids.append(gid)
        self._gid_changed(index)
        return index

    def remove_address(self, ip: bytes) -> None:
        """Take an IPv4 address out. Queue pairs keep theirs by address. Raises StateError when it is not there."""
        gid = V4_PREFIX + ip
        if gid not in self.gids:
            raise StateError(f"{'.'.join(map(str, ip))} is not an address of this device")
        index = self.gids.index(gid)
        self.gids[index] = None
        self._gid_changed(index)

    def _gid_changed(self, index: int) -> None:
        for listener in self.gid_listeners:
            listener(index, self.gids[index])
        for context in self.contexts.values():
            if not context.held:
                context.post_async(PORT, GID_CHANGE)

    def source_address(self, sgid_index: int) -> bytes:
        """The IPv4 address of a GID index. Raises VerbsError(EINVAL) for an empty or a link-local one."""
        gid = self.gids[sgid_index] if sgid_index < len(self.gids) else None
        if gid is None or gid[:12] != V4_PREFIX:
            raise VerbsError(errno.EINVAL, f"GID index {sgid_index} is not an IPv4 address")
        return gid[12:]

    # -- addressing ----------------------------------------------------------------------------------------------

    def check_destination(self, destination: Destination) -> None:
        """Raise VerbsError for an address vector that RoCEv2 over IPv4 cannot carry."""
        if not destination.is_global:
            raise VerbsError(errno.EINVAL, "RoCE needs a global route (is_global)")
        if destination.port_num not in (0, PORT):
            raise VerbsError(errno.EINVAL, f"port {destination.port_num}")
        self.source_address(destination.sgid_index)
        if destination.dgid[:12] != V4_PREFIX:
            raise VerbsError(errno.EINVAL, "the destination GID is not an IPv4 address")

    def path(self, destination: Destination, local_qpn: int, remote_qpn: int) -> Path:
        """The resolved path of a connection. Raises VerbsError, or NotYet while the MAC is being asked for."""
        self.check_destination(destination)
        remote = destination.dgid[12:]
        if V4_PREFIX + remote in self.gids:
            mac: bytes | None = self.mac
        else:
            mac = self.resolve(remote)
        if mac is None:
            raise NotYet(remote)
        return Path(
            self.mac,
            mac,
            self.source_address(destination.sgid_index),
            remote,
            udp_source_port(destination.flow_label, local_qpn, remote_qpn),
            destination.traffic_class,
        )

    # -- regions -------------------------------------------------------------------------------------------------

    def register(
        self, context: Context, pd: ProtectionDomain, start: int, length: int, iova: int, access: int
    ) -> MemoryRegion:
        """ibv_reg_mr."""
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
        """ibv_dereg_mr. Raises VerbsError(EBUSY) while windows are bound to it."""
        if region.windows:
            raise VerbsError(errno.EBUSY, "memory windows are bound to the region")
        del self.keys[region.key >> KEY_BITS]
        region.pd.users -= 1
        context.remove(region.handle)

    def allocate_window(self, context: Context, pd: ProtectionDomain, kind: int) -> MemoryWindow:
        """ibv_alloc_mw."""
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
        if kind in (QPT_UC, QPT_UD):
            raise VerbsError(errno.EOPNOTSUPP, "UC and UD are not supported yet")
        if kind != QPT_RC:
            raise VerbsError(errno.EOPNOTSUPP, f"QP type {kind}")
        if (
            wanted.max_send_wr > limits.MAX_QP_WR
            or wanted.max_recv_wr > limits.MAX_QP_WR
            or wanted.max_send_sge > limits.MAX_SGE
            or wanted.max_recv_sge > limits.MAX_SGE
            or wanted.max_inline_data > limits.MAX_INLINE_DATA
        ):
            raise VerbsError(errno.EINVAL, f"capabilities above the device's limits: {wanted}")
        qpn = self._qpns.take(self.queue_pairs)
        send_ring = context.channel.send_ring(wanted.max_send_wr, wanted.max_send_sge, wanted.max_inline_data)
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
            wanted.max_send_sge,
            wanted.max_recv_sge if receive_ring is not None else 0,
            send_ring.max_inline,
        )
        transport = TransportQueuePair(
            QpContext(qpn=qpn, sq_sig_all=sq_sig_all, srq=srq is not None),
            send_ring,
            srq or receive_ring or NoReceiveQueue(),
            send_cq,
            recv_cq,
            pd,
            None,
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
        self._share_window()

    def _share_window(self) -> None:
        """What all queue pairs together may have on the way must fit into the buffers of a software switch."""
        sending = sum(qp.transport.context.state >= QpState.RTS for qp in self.queue_pairs.values())
        share = max(MIN_WINDOW, PACKETS_ON_THE_WAY // max(sending, 1))
        self.engine.window = min(self.engine.config.window, share)

    def modify_queue_pair(self, qp: QueuePair, attributes: dict[str, Any]) -> None:
        """ibv_modify_qp with the transport's attribute names. Raises VerbsError(EINVAL)."""
        try:
            qp.transport.modify(attributes)
        except ValueError as error:  # InvalidTransition is one
            raise VerbsError(errno.EINVAL, str(error)) from None
        state = qp.transport.context.state
        self._share_window()
        if attributes.get("qp_state") == QpState.RESET:
            qp.reset_rings()
        # rxe refuses a post before RTS at the call; in ERR it takes it and flushes.
        qp.context.channel.may_post(qp.handle, state >= QpState.RTS)
        if state >= QpState.RTS:
            self.engine.ring(qp.transport)

    def destroy_queue_pair(self, qp: QueuePair) -> None:
        """ibv_destroy_qp: no packet, no completion."""
        self.engine.remove_qp(qp.qpn)
        del self.queue_pairs[qp.qpn]
        self._share_window()
        qp.users(-1)
        qp.context.channel.may_post(qp.handle, False)
        qp.free_rings()
        qp.context.remove(qp.handle)

    def qp_event(self, qpn: int, event: int) -> None:
        """transport.interfaces.EventSink."""
        qp = self.queue_pairs.get(qpn)
        if qp is not None:
            if event <= 3:  # QP_FATAL, QP_REQ_ERR, QP_ACCESS_ERR: the queue pair is in ERR
                qp.context.channel.may_post(qp.handle, True)
            if qp.context.post_async(qp.user_handle, event):
                qp.async_events += 1

    # -- numbers of the rest -------------------------------------------------------------------------------------

    def take_srq_number(self) -> int:
        """A number for a new SRQ."""
        taken = {srq.number for context in self.contexts.values() for srq in context.of(SharedReceiveQueue)}
        return self._srqs.take(taken)

    def take_ah_number(self) -> int:
        """A number for a new address handle; above 0, else the provider resolves MACs by itself."""
        if len(self.ah_numbers) >= limits.MAX_AH:
            raise VerbsError(errno.ENOMEM, "too many address handles")
        number = self._ahs.take(self.ah_numbers)
        self.ah_numbers.add(number)
        return number

    # -- contexts ------------------------------------------------------------------------------------------------

    def forget(self, context: Context) -> None:
        """Free everything that a context owns, at once and without a packet (its process ended, or it moved away)."""
        self.contexts.pop(context.id, None)
        for qp in context.queue_pairs:
            self.engine.remove_qp(qp.qpn)
            self.queue_pairs.pop(qp.qpn, None)
            qp.free_rings()
        for item in context.objects.values():
            if item.__class__ in (MemoryRegion, MemoryWindow):
                self.keys.pop(item.key >> KEY_BITS, None)
            elif item.__class__ in (CompletionQueue, SharedReceiveQueue):
                item.ring.free()
            elif hasattr(item, "number"):
                self.ah_numbers.discard(item.number)
        context.objects.clear()
        self._share_window()
        context.channel.close()
