"""What a program sees: rdma_cm_id with its addresses and state, its waiting events, and port numbers."""

from __future__ import annotations

import errno
import socket
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, NamedTuple

from softroce_ext.cm.connection import Connection
from softroce_ext.device.errors import VerbsError

PS_IPOIB, PS_TCP, PS_UDP, PS_IB = 0x0002, 0x0106, 0x0111, 0x013F
MAX_BACKLOG: Final = 1024
MAX_IDS: Final = 65536
HANDLES_PER_BASE: Final = 1 << 20
"""Handles of ids and memberships that a NIC with one number base can give."""
EPHEMERAL: Final = (32768, 60999)

AF_IB: Final = 27
SOCKADDR_BYTES: Final = 28
"""struct sockaddr_in6, which the *_IP commands use for both families."""
_LOOPBACK6: Final = bytes(15) + b"\1"
SOCKADDR_SIZES: Final[dict[int, int]] = {socket.AF_INET: 16, socket.AF_INET6: SOCKADDR_BYTES}
_IN = struct.Struct("<H2s4s")
_IN6 = struct.Struct("<H2s4x16sI")


class EventType(Enum):
    """enum rdma_cm_event_type."""

    ADDR_RESOLVED = 0
    ADDR_ERROR = 1
    ROUTE_RESOLVED = 2
    ROUTE_ERROR = 3
    CONNECT_REQUEST = 4
    CONNECT_RESPONSE = 5
    CONNECT_ERROR = 6
    UNREACHABLE = 7
    REJECTED = 8
    ESTABLISHED = 9
    DISCONNECTED = 10
    DEVICE_REMOVAL = 11
    MULTICAST_JOIN = 12
    MULTICAST_ERROR = 13
    ADDR_CHANGE = 14
    TIMEWAIT_EXIT = 15


class Endpoint(NamedTuple):
    """An IP address (4 or 16 bytes) and a port; `scope` is IPv6's interface index."""

    ip: bytes
    port: int = 0
    scope: int = 0

    @property
    def wildcard(self) -> bool:
        """Whether it is the address "any"."""
        return not any(self.ip)

    @property
    def unspecific(self) -> bool:
        """Whether it names no device: "any", or the host's loopback (which rdma_cm takes for the same)."""
        return self.wildcard or (self.ip[0] == 127 if len(self.ip) == 4 else self.ip == _LOOPBACK6)

    def pack(self) -> bytes:
        """struct sockaddr_in or sockaddr_in6, filled up to 28 bytes."""
        port = self.port.to_bytes(2, "big")
        if len(self.ip) == 4:
            return _IN.pack(socket.AF_INET, port, self.ip).ljust(SOCKADDR_BYTES, b"\0")
        return _IN6.pack(socket.AF_INET6, port, self.ip, self.scope)

    @classmethod
    def unpack(cls, data: bytes | memoryview, size: int | None = None) -> Endpoint | None:
        """Return None for family 0. size: as the program gave it; it must be that of the family.

        Raises VerbsError: EAFNOSUPPORT for InfiniBand addresses, EINVAL for other families and sizes.
        """
        family = int.from_bytes(data[:2], "little")
        if family == 0 and not size:
            return None
        if family == AF_IB and size is not None:
            raise VerbsError(errno.EAFNOSUPPORT, "an InfiniBand address")
        expected = SOCKADDR_SIZES.get(family)
        if expected is None or size not in (None, expected):
            raise VerbsError(errno.EINVAL, f"address of family {family} with {size} bytes")
        if family == socket.AF_INET:
            _, port, ip = _IN.unpack_from(data)
            return cls(ip, int.from_bytes(port, "big"))
        _, port, ip, scope = _IN6.unpack_from(data)
        return cls(ip, int.from_bytes(port, "big"), scope)


class IdState(Enum):
    """enum rdma_cm_state, as far as a program can observe it."""

    IDLE = 0
    BOUND = 1
    RESOLVING = 2
    ADDR_RESOLVED = 3
    ROUTE_RESOLVED = 4
    CONNECT = 5
    LISTEN = 6
    DISCONNECT = 7


@dataclass(slots=True, eq=False)
class CmId:
    """One rdma_cm_id."""

    handle: int
    uid: int
    port_space: int
    qp_type: int
    queue: EventQueue
    state: IdState = IdState.IDLE
    source: Endpoint | None = None
    destination: Endpoint | None = None
    on_device: bool = False
    """Whether an address of the device belongs to it (QUERY answers with the device's GUID then)."""
    connection: Connection[CmId] | None = None
    flow_label: int = 0
    tos: int = 0
    reuse: bool = False
    family_only: bool = False
    ack_timeout: int = 19
    """Local ACK timeout code: twice a packet's life time, one more than its code of 18."""
    qkey: int = 0
    psn: int = 0
    """PSN with which the peer shall start to send."""
    responder_resources: int = 0
    initiator_depth: int = 0
    retry_count: int = 7
    rnr_retry_count: int = 7
    path_mtu: int = 5
    backlog: int = 0
    waiting: int = 0
    """CONNECT_REQUEST events that the program has not taken."""
    reported: int = 0
    """Events that the program took; it acknowledges as many before it frees the id."""
    groups: dict[int, Group] = field(default_factory=dict)

    def emit(self, kind: EventType, status: int = 0, param: bytes = b"", ece: tuple[int, int] = (0, 0)) -> None:
        """Post an event of this id."""
        self.queue.post(CmEvent(self, kind, status, param, ece=ece))


@dataclass(slots=True, eq=False)
class Group:
    """One membership (struct cma_multicast)."""

    handle: int
    uid: int
    mgid: bytes
    cm_id: CmId
    reported: int = 0


@dataclass(slots=True, eq=False)
class CmEvent:
    """An event in a queue."""

    counted: CmId
    """The id that it counts to."""
    kind: EventType
    status: int = 0
    param: bytes = b""
    child: CmId | None = None
    """The new id of a CONNECT_REQUEST."""
    group: Group | None = None
    ece: tuple[int, int] = (0, 0)
    """The enhanced connection establishment options of the peer's program."""


class EventQueue:
    """The events of one opening of rdma_cm."""

    def __init__(self, signal: Callable[[int], None]) -> None:
        """signal(n): put n bytes into the FIFO of the opening, or take −n out."""
        self.events: deque[CmEvent] = deque()
        self.held_at: float | None = None
        """Since when the program is held: it is frozen, and the times of its ids have stopped."""
        self._signal = signal

    def post(self, event: CmEvent) -> None:
        """Append one."""
        self.events.append(event)
        self._signal(1)

    def take(self) -> CmEvent:
        """Return the oldest event. Raises VerbsError(EAGAIN) when there is none."""
        if not self.events:
            raise VerbsError(errno.EAGAIN, "no event")
        self._signal(-1)
        return self.events.popleft()

    def withdraw(self, cm_id: CmId, group: Group | None = None) -> list[CmEvent]:
        """Take out the events that count to an id (and to `group`, if given), and return them."""
        gone = [event for event in self.events if event.counted is cm_id and (group is None or event.group is group)]
        if gone:
            marked = set(gone)
            self.events = deque(event for event in self.events if event not in marked)
            self._signal(-len(gone))
        return gone


class Ports:
    """Which ids have which port of which port space."""

    def __init__(self, random: Callable[[int], int]) -> None:
        """random(n): a number below n."""
        self._random = random
        self._ids: dict[tuple[int, int], list[CmId]] = {}

    def bind(self, cm_id: CmId, endpoint: Endpoint) -> Endpoint:
        """Take the endpoint's port, or a free one for port 0. Raises VerbsError as `check`."""
        if endpoint.port:
            self.check(cm_id, endpoint, cm_id.reuse)
        else:
            endpoint = endpoint._replace(port=self._free(cm_id.port_space))
        self._ids.setdefault((cm_id.port_space, endpoint.port), []).append(cm_id)
        return endpoint

    def check(self, cm_id: CmId, endpoint: Endpoint, reuse: bool) -> None:
        """Check that the endpoint's port is free for an id; reuse: it may be shared with ids that allow that, too.

        Raises VerbsError: EADDRINUSE when another id has the same address, EADDRNOTAVAIL when one of the two has "any".
        """
        for other in self._ids.get((cm_id.port_space, endpoint.port), ()):
            self._collide(cm_id, endpoint, other, reuse)

    def holds(self, cm_id: CmId) -> bool:
        """Whether an id has its port itself (a connection that a listener accepted has none of its own)."""
        return cm_id.source is not None and cm_id in self._ids.get((cm_id.port_space, cm_id.source.port), ())

    def adopt(self, cm_id: CmId, endpoint: Endpoint) -> None:
        """Take the port of an id that was bound elsewhere. Only programs that were here before can collide with it.

        Raises VerbsError as `check`.
        """
        holders = self._ids.setdefault((cm_id.port_space, endpoint.port), [])
        for other in holders:
            if other.queue is not cm_id.queue:
                self._collide(cm_id, endpoint, other, cm_id.reuse)
        holders.append(cm_id)

    def _collide(self, cm_id: CmId, endpoint: Endpoint, other: CmId, reuse: bool) -> None:
        there = other.source
        if other is cm_id or there is None or (reuse and other.reuse):
            return
        if cm_id.family_only and other.family_only and len(there.ip) != len(endpoint.ip):
            return
        if there.unspecific or endpoint.unspecific:
            raise VerbsError(errno.EADDRNOTAVAIL, f"another id has port {endpoint.port}")
        if there.ip == endpoint.ip:
            raise VerbsError(errno.EADDRINUSE, f"port {endpoint.port} is in use")

    def _free(self, port_space: int) -> int:
        low, high = EPHEMERAL
        count = high - low + 1
        first = self._random(count)
        for step in range(count):
            port = low + (first + step) % count
            if not self._ids.get((port_space, port)):
                return port
        raise VerbsError(errno.EADDRNOTAVAIL, "no free port")

    def release(self, cm_id: CmId) -> None:
        """Give an id's port back."""
        if cm_id.source is None:
            return
        key = (cm_id.port_space, cm_id.source.port)
        holders = self._ids.get(key, [])
        if cm_id in holders:
            holders.remove(cm_id)
            if not holders:
                del self._ids[key]

    def listener(self, port_space: int, endpoint: Endpoint) -> CmId | None:
        """Return the id that listens there: one that is bound to the address before one that is bound to "any"."""
        found = None
        for cm_id in self._ids.get((port_space, endpoint.port), ()):
            if cm_id.state is not IdState.LISTEN or cm_id.source is None:
                continue
            same = len(cm_id.source.ip) == len(endpoint.ip)
            if same and cm_id.source.ip == endpoint.ip:
                return cm_id
            # As with a socket: "any" of IPv6 includes IPv4, unless the program wants its own family only.
            both = len(cm_id.source.ip) == 16 and not cm_id.family_only
            if cm_id.source.wildcard and (same or both):
                found = cm_id
        return found
