"""The addresses of rdma_cm's ids, and the paths from them to their destinations."""

from __future__ import annotations

import errno
from collections.abc import Callable
from itertools import islice
from typing import Final, NamedTuple

from softroce_ext.cm.ids import CmId, Endpoint, EventQueue, EventType, IdState, Ports
from softroce_ext.cm.interfaces import Device
from softroce_ext.device import limits
from softroce_ext.device.address_handle import Destination
from softroce_ext.device.addressing import V4_PREFIX, gid_of, is_multicast
from softroce_ext.device.errors import NotYet, VerbsError
from softroce_ext.wire.path import Path

HOP_LIMIT: Final = 64
RESOLVE_POLL: Final = 0.01
"""Seconds between two queries of the neighbour table while an address is being resolved."""
RESOLVE_TURN: Final = 64
"""Ids whose destination is queried at a time."""
NEVER: Final = float("inf")


SourceFor = Callable[[Endpoint, bytes | None], bytes]
"""(destination, the device's address that is to be used, if any) → the address from which the host would send there.
Raises VerbsError with the errno of a host that has no route."""


class Resolving(NamedTuple):
    """An id whose destination's MAC is not known yet."""

    cm_id: CmId
    deadline: float


class Addresses:
    """Binds ids to the device's addresses and resolves their destinations; the answers are events."""

    def __init__(self, adapter: Device, ports: Ports, source_for: SourceFor) -> None:
        self._adapter = adapter
        self._ports = ports
        self._source_for = source_for
        self.resolving: dict[int, Resolving] = {}
        """By the ids' handles; the one that was queried last is the last."""
        self.next_deadline = NEVER
        """When `advance` must be called."""

    def own(self, ip: bytes) -> bool:
        """Whether it is an address of the device."""
        mapped = len(ip) == 16 and ip.startswith(V4_PREFIX)
        return not mapped and gid_of(ip) in self._adapter.addressing.gids

    def bind(self, cm_id: CmId, endpoint: Endpoint) -> None:
        """rdma_bind_addr. "Any" and loopback are bound to no device, and no peer can reach loopback."""
        if cm_id.state is not IdState.IDLE:
            raise VerbsError(errno.EINVAL, "the id is bound already")
        link_local = len(endpoint.ip) == 16 and endpoint.ip[0] == 0xFE and endpoint.ip[1] & 0xC0 == 0x80
        if link_local and not endpoint.scope:
            raise VerbsError(errno.EINVAL, "a link-local address needs an interface (scope)")
        if not endpoint.unspecific and not self.own(endpoint.ip):
            raise VerbsError(errno.ENODEV if link_local else errno.EADDRNOTAVAIL, "not an address of the device")
        cm_id.family_only = cm_id.family_only or len(endpoint.ip) == 4
        cm_id.source = self._ports.bind(cm_id, endpoint)
        cm_id.on_device = not endpoint.unspecific
        cm_id.state = IdState.BOUND

    def resolve(self, cm_id: CmId, source: Endpoint | None, destination: Endpoint, timeout: float, now: float) -> None:
        """rdma_resolve_addr. Raises VerbsError for what the routing table refuses; all else is an event."""
        if cm_id.state is IdState.IDLE:
            self.bind(cm_id, source or Endpoint(bytes(len(destination.ip))))
        elif cm_id.state is not IdState.BOUND or cm_id.source is None:
            raise VerbsError(errno.EINVAL, "the address is resolved already")
        begin = cm_id.source
        assert begin is not None
        if len(begin.ip) != len(destination.ip):
            raise VerbsError(errno.EINVAL, "source and destination are of different address families")
        if not destination.unspecific and (begin.unspecific or len(begin.ip) == 16):
            # From an IPv4 address of the device, frames leave there, whatever the routing table says.
            begin = begin._replace(ip=self._source_for(destination, None if begin.wildcard else begin.ip))
        cm_id.source = begin
        cm_id.destination = destination
        cm_id.flow_label = (begin.port * 31 + destination.port) & 0xFFFFF
        cm_id.path_mtu = limits.active_mtu(self._adapter.interface_mtu)
        if destination.unspecific:
            cm_id.on_device = True
            cm_id.state = IdState.ADDR_RESOLVED
            cm_id.emit(EventType.ADDR_RESOLVED)
        elif not self.own(begin.ip):
            cm_id.emit(EventType.ADDR_ERROR, -errno.ENODEV)
        else:
            cm_id.on_device = True
            cm_id.state = IdState.RESOLVING
            self._query(Resolving(cm_id, now + timeout), now)

    def wait(self, cm_id: CmId, deadline: float) -> None:
        """Query the path to an id's destination until `deadline`."""
        self.resolving[cm_id.handle] = Resolving(cm_id, deadline)

    def advance(self, now: float) -> None:
        """Query some of the destinations that are being resolved, in turn: each query costs system calls."""
        self.next_deadline = now + RESOLVE_POLL if len(self.resolving) > RESOLVE_TURN else NEVER
        for handle in list(islice(self.resolving, RESOLVE_TURN)):
            item = self.resolving.pop(handle)
            if item.cm_id.queue.held_at is not None:
                self.resolving[handle] = item
            else:
                self._query(item, now)

    def _query(self, item: Resolving, now: float) -> None:
        cm_id = item.cm_id
        try:
            self.path(cm_id)
        except NotYet:
            if now < item.deadline:
                self.resolving[cm_id.handle] = item
                self.next_deadline = min(self.next_deadline, now + RESOLVE_POLL)
                return
            cm_id.state = IdState.BOUND
            cm_id.emit(EventType.ADDR_ERROR, -errno.ETIMEDOUT)
        except VerbsError as error:
            cm_id.state = IdState.BOUND
            cm_id.emit(EventType.ADDR_ERROR, -error.number)
        else:
            cm_id.state = IdState.ADDR_RESOLVED
            cm_id.emit(EventType.ADDR_RESOLVED)

    def shift(self, queue: EventQueue, seconds: float) -> None:
        """Give the ids of a program more time: it was frozen for `seconds`."""
        for handle, item in self.resolving.items():
            if item.cm_id.queue is queue:
                self.resolving[handle] = item._replace(deadline=item.deadline + seconds)

    def forget(self, cm_id: CmId) -> None:
        """Forget an id that is destroyed."""
        self.resolving.pop(cm_id.handle, None)

    def path(self, cm_id: CmId) -> Path:
        """Return the path of an id's messages. Raises NotYet while a MAC is not known, VerbsError."""
        return self._adapter.addressing.path(self.vector(cm_id), 0)

    def vector(self, cm_id: CmId) -> Destination:
        """Return the address vector of an id. Raises VerbsError(EINVAL) while it has no addresses."""
        if cm_id.source is None or cm_id.destination is None or not self.own(cm_id.source.ip):
            raise VerbsError(errno.EINVAL, "no address, or one that the device no longer has")
        there = cm_id.source if cm_id.destination.unspecific else cm_id.destination
        return self.vector_to(cm_id, gid_of(there.ip))

    def vector_to(self, cm_id: CmId, gid: bytes) -> Destination:
        """Return the address vector from an id's address to `gid`."""
        assert cm_id.source is not None
        return Destination(
            dgid=gid,
            flow_label=cm_id.flow_label,
            sgid_index=self._adapter.addressing.gids.index(gid_of(cm_id.source.ip)),
            hop_limit=HOP_LIMIT if not is_multicast(gid) else 1,
            traffic_class=cm_id.tos,
            is_global=1,
            port_num=1,
        )
