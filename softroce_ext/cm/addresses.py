"""Which addresses the ids of rdma_cm have, and how one gets from them to their destinations."""

from __future__ import annotations

import errno
from collections.abc import Callable
from itertools import islice
from typing import Any, Final, NamedTuple

from softroce_ext.cm.ids import CmId, Endpoint, EventQueue, EventType, IdState, Ports
from softroce_ext.device import limits
from softroce_ext.device.addressing import V4_PREFIX, gid_of, is_multicast
from softroce_ext.device.errors import NotYet, VerbsError
from softroce_ext.device.queue_pair import Destination
from softroce_ext.wire.path import Path

HOP_LIMIT: Final = 64
RESOLVE_POLL: Final = 0.01
"""Seconds between looks at the neighbour table while an address is being resolved."""
RESOLVE_TURN: Final = 64
"""Ids that are looked for at a time."""
NEVER: Final = float("inf")


SourceFor = Callable[[Endpoint, bytes | None], bytes]
"""(destination, the address of ours that is to be used, if any) → from which address the host would send there. Raises
VerbsError with the errno of a host that has no route."""


class Resolving(NamedTuple):
    """An id whose destination's MAC is not known yet."""

    cm_id: CmId
    deadline: float


class Addresses:
    """Binds ids to the device's addresses and resolves their destinations; the answers are events."""

    def __init__(self, adapter: Any, ports: Ports, source_for: SourceFor) -> None:
        self._adapter = adapter
        self._ports = ports
        self._source_for = source_for
        self.resolving: dict[int, Resolving] = {}
        """By the ids' handles; who was looked for last is the last."""
        self.due = NEVER
        """When `advance` wants to be called."""

    def own(self, ip: bytes) -> bool:
        """Whether it is an address of the device."""
        mapped = len(ip) == 16 and ip.startswith(V4_PREFIX)
        return not mapped and gid_of(ip) in self._adapter.gids

    def bind(self, cm_id: CmId, endpoint: Endpoint) -> None:
        """rdma_bind_addr. What is of no device is bound to none, and nobody can reach loopback."""
        if cm_id.state is not IdState.IDLE:
            raise VerbsError(errno.EINVAL, "bound already")
        link_local = len(endpoint.ip) == 16 and endpoint.ip[0] == 0xFE and endpoint.ip[1] & 0xC0 == 0x80
        if link_local and not endpoint.scope:
            raise VerbsError(errno.EINVAL, "a link-local address of no interface")
        if not endpoint.unspecific and not self.own(endpoint.ip):
            raise VerbsError(errno.ENODEV if link_local else errno.EADDRNOTAVAIL, "not an address of the device")
        cm_id.family_only = cm_id.family_only or len(endpoint.ip) == 4
        cm_id.source = self._ports.bind(cm_id, endpoint)
        cm_id.on_device = not endpoint.unspecific
        cm_id.state = IdState.BOUND

    def resolve(self, cm_id: CmId, source: Endpoint | None, destination: Endpoint, timeout: float, now: float) -> None:
        """rdma_resolve_addr; what the routing table refuses is refused, the rest is an event."""
        if cm_id.state is IdState.IDLE:
            self.bind(cm_id, source or Endpoint(bytes(len(destination.ip))))
        elif cm_id.state is not IdState.BOUND or cm_id.source is None:
            raise VerbsError(errno.EINVAL, "resolved already")
        begin = cm_id.source
        assert begin is not None
        if len(begin.ip) != len(destination.ip):
            raise VerbsError(errno.EINVAL, "the addresses are of two families")
        if not destination.unspecific and (begin.unspecific or len(begin.ip) == 16):
            # An IPv4 address of the device's goes out there, whatever the routing table says.
            begin = begin._replace(ip=self._source_for(destination, None if begin.wildcard else begin.ip))
        cm_id.source = begin
        cm_id.destination = destination
        cm_id.flow_label = (begin.port * 31 + destination.port) & 0xFFFFF
        cm_id.path_mtu = limits.active_mtu(self._adapter.interface_mtu)
        if destination.unspecific:
            cm_id.on_device = True
            cm_id.state = IdState.ADDR_RESOLVED
            cm_id.tell(EventType.ADDR_RESOLVED)
        elif not self.own(begin.ip):
            cm_id.tell(EventType.ADDR_ERROR, -errno.ENODEV)
        else:
            cm_id.on_device = True
            cm_id.state = IdState.RESOLVING
            self._look(Resolving(cm_id, now + timeout), now)

    def wait(self, cm_id: CmId, deadline: float) -> None:
        """Look for the way to an id's destination until `deadline`."""
        self.resolving[cm_id.handle] = Resolving(cm_id, deadline)

    def advance(self, now: float) -> None:
        """Look again for some of what is being resolved, in turn: each look costs system calls."""
        self.due = now + RESOLVE_POLL if len(self.resolving) > RESOLVE_TURN else NEVER
        for handle in list(islice(self.resolving, RESOLVE_TURN)):
            item = self.resolving.pop(handle)
            if item.cm_id.queue.held_at is not None:
                self.resolving[handle] = item
            else:
                self._look(item, now)

    def _look(self, item: Resolving, now: float) -> None:
        cm_id = item.cm_id
        try:
            self.path(cm_id)
        except NotYet:
            if now < item.deadline:
                self.resolving[cm_id.handle] = item
                self.due = min(self.due, now + RESOLVE_POLL)
                return
            cm_id.state = IdState.BOUND
            cm_id.tell(EventType.ADDR_ERROR, -errno.ETIMEDOUT)
        except VerbsError as error:
            cm_id.state = IdState.BOUND
            cm_id.tell(EventType.ADDR_ERROR, -error.number)
        else:
            cm_id.state = IdState.ADDR_RESOLVED
            cm_id.tell(EventType.ADDR_RESOLVED)

    def shift(self, queue: EventQueue, seconds: float) -> None:
        """The ids of a program that stood still so long have more time."""
        for handle, item in self.resolving.items():
            if item.cm_id.queue is queue:
                self.resolving[handle] = item._replace(deadline=item.deadline + seconds)

    def forget(self, cm_id: CmId) -> None:
        """An id goes."""
        self.resolving.pop(cm_id.handle, None)

    def path(self, cm_id: CmId) -> Path:
        """The way of an id's messages. Raises NotYet while a MAC is not known, VerbsError."""
        path: Path = self._adapter.addressing.path(self.vector(cm_id), 0)
        return path

    def vector(self, cm_id: CmId) -> Destination:
        """The address vector of an id. Raises VerbsError(EINVAL) while it has no addresses."""
        if cm_id.source is None or cm_id.destination is None or not self.own(cm_id.source.ip):
            raise VerbsError(errno.EINVAL, "no address, or one that is not the device's any more")
        there = cm_id.source if cm_id.destination.unspecific else cm_id.destination
        return self.vector_to(cm_id, gid_of(there.ip))

    def vector_to(self, cm_id: CmId, gid: bytes) -> Destination:
        """The address vector from an id's address to `gid`."""
        assert cm_id.source is not None
        return Destination(
            dgid=gid,
            flow_label=cm_id.flow_label,
            sgid_index=self._adapter.gids.index(gid_of(cm_id.source.ip)),
            hop_limit=HOP_LIMIT if not is_multicast(gid) else 1,
            traffic_class=cm_id.tos,
            is_global=1,
            port_num=1,
        )
