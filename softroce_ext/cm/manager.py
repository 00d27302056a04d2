"""The communication manager: joins ids, connections and QP1.

Messages come from QP1 (`incoming`), requests from programs (`ucma` calls the methods), time from the loop
(`next_deadline`, `on_timer`). A method refuses a request with VerbsError, before it has changed anything.
"""

from __future__ import annotations

import contextlib
import errno
from collections import Counter
from collections.abc import Callable
from typing import Final

from softroce_ext.cm import fields
from softroce_ext.cm import messages as m
from softroce_ext.cm.addresses import NEVER, Addresses, SourceFor
from softroce_ext.cm.connection import SIDR_REJECT, Connection, ConnectionEvent, Event, State
from softroce_ext.cm.groups import Groups
from softroce_ext.cm.ids import (
    HANDLES_PER_BASE,
    MAX_IDS,
    CmEvent,
    CmId,
    Endpoint,
    EventQueue,
    EventType,
    IdState,
    Ports,
)
from softroce_ext.cm.incoming import Incoming
from softroce_ext.cm.interfaces import Device, Gsi
from softroce_ext.cm.params import UDP_QKEY, ConnParam, conn_param, ud_param
from softroce_ext.cm.table import ConnectionTable
from softroce_ext.device import limits
from softroce_ext.device.errors import NotYet, VerbsError
from softroce_ext.transport.verbs import QpType
from softroce_ext.wire.path import Path

_EVENTS: Final = {
    ConnectionEvent.RESPONSE: EventType.CONNECT_RESPONSE,
    ConnectionEvent.ESTABLISHED: EventType.ESTABLISHED,
    ConnectionEvent.REJECTED: EventType.REJECTED,
    ConnectionEvent.UNREACHABLE: EventType.UNREACHABLE,
    ConnectionEvent.DISCONNECTED: EventType.DISCONNECTED,
    ConnectionEvent.TIMEWAIT_EXIT: EventType.TIMEWAIT_EXIT,
}


class CommunicationManager:
    """All of rdma_cm of one NIC."""

    def __init__(
        self,
        adapter: Device,
        gsi: Gsi,
        random: Callable[[int], int],
        source_for: SourceFor,
        group_changed: Callable[[bytes, bool], None],
    ) -> None:
        """random(n): a number below n; group_changed: called with a multicast group's address when it gets its first
        member (True) and when it has lost its last (False).
        """
        self.adapter = adapter
        self._gsi = gsi
        self._random = random
        self.ids: dict[int, CmId] = {}
        self.ports = Ports(random)
        self.addresses = Addresses(adapter, self.ports, source_for)
        self.groups = Groups(self.addresses, self._handle, group_changed)
        self.connections = ConnectionTable(random)
        self._next_handle = 0
        self._timed: dict[int, Connection[CmId]] = {}
        self.next_deadline = NEVER
        """When `on_timer` must be called."""
        self.counters: Counter[str] = Counter()
        """The outcomes of received messages."""
        self.messages: Counter[str] = Counter()
        """Messages by the names of the kernel's files."""
        self.incoming = Incoming(self)
        gsi.on_mad = self.incoming.on_mad

    # -- ids -------------------------------------------------------------------------------------------------------

    def _handle(self) -> int:
        if len(self.ids) + len(self.groups.by_handle) >= MAX_IDS:
            raise VerbsError(errno.ENOMEM, "too many rdma_cm ids")
        # Like queue pair numbers, handles of different NICs differ: a program keeps its own when it is moved.
        base = self.adapter.number_base * HANDLES_PER_BASE
        while True:
            handle = base + self._next_handle
            self._next_handle = (self._next_handle + 1) % HANDLES_PER_BASE
            if handle not in self.ids and handle not in self.groups.by_handle:
                return handle

    def create(self, queue: EventQueue, uid: int, port_space: int, qp_type: int) -> CmId:
        """rdma_create_id."""
        cm_id = CmId(self._handle(), uid, port_space, qp_type, queue)
        cm_id.psn = self._random(1 << 24)
        self.ids[cm_id.handle] = cm_id
        return cm_id

    def destroy(self, cm_id: CmId, now: float) -> int:
        """rdma_destroy_id. Returns how many of its events the program has taken."""
        for group in list(cm_id.groups.values()):
            self.groups.leave(group)
        self._forget(cm_id, now)
        return cm_id.reported

    def _forget(self, cm_id: CmId, now: float) -> None:
        self.ids.pop(cm_id.handle, None)
        self.ports.release(cm_id)
        self.addresses.forget(cm_id)
        connection, cm_id.connection = cm_id.connection, None
        if connection is not None:
            connection.owner = None
            connection.destroy(now)
            self.flush(connection)
        for event in cm_id.queue.withdraw(cm_id):
            if event.child is not None:
                self._forget(event.child, now)

    def migrate(self, cm_id: CmId, queue: EventQueue) -> int:
        """rdma_migrate_id: its events go to `queue` from now on. Returns how many the program has taken so far."""
        if cm_id.queue is not queue:
            waiting = cm_id.queue.withdraw(cm_id)
            cm_id.queue = queue
            for event in waiting:
                if event.child is not None:
                    event.child.queue = queue
                queue.post(event)
        return cm_id.reported

    def ids_of(self, queue: EventQueue) -> list[CmId]:
        """All ids whose events go to `queue`, oldest first."""
        return [cm_id for cm_id in self.ids.values() if cm_id.queue is queue]

    def close(self, queue: EventQueue, now: float) -> None:
        """The program closed its descriptor, or ended."""
        queue.events.clear()  # they will not be read, and withdrawing each id's from many would take long
        for cm_id in self.ids_of(queue):
            if cm_id.handle in self.ids:
                self.destroy(cm_id, now)

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def hold(self, queue: EventQueue, now: float) -> None:
        """The program is frozen: the times of its ids stop. Messages for them are dropped; peers repeat them."""
        queue.held_at = now
        for connection in self._connections_of(queue):
            self._timed.pop(connection.local_id, None)

    def unhold(self, queue: EventQueue, now: float) -> None:
        """The program runs again, here: the times of its ids continue where they stopped."""
        assert queue.held_at is not None
        frozen, queue.held_at = now - queue.held_at, None
        for connection in self._connections_of(queue):
            if connection.deadline is not None:
                connection.deadline += frozen
            self.flush(connection)
        self.addresses.shift(queue, frozen)
        self.next_deadline = now

    def discard(self, queue: EventQueue) -> None:
        """Forget the ids of a held program without a message: they live elsewhere now."""
        queue.events.clear()
        for cm_id in self.ids_of(queue):
            for group in list(cm_id.groups.values()):
                self.groups.leave(group)
            if cm_id.connection is not None and self.connections.holds(cm_id.connection):
                self.connections.forget(cm_id.connection)
                self._timed.pop(cm_id.connection.local_id, None)
            cm_id.connection = None
            self.ids.pop(cm_id.handle, None)
            self.ports.release(cm_id)
            self.addresses.forget(cm_id)

    def _connections_of(self, queue: EventQueue) -> list[Connection[CmId]]:
        connections = (cm_id.connection for cm_id in self.ids_of(queue))
        return [c for c in connections if c is not None and self.connections.holds(c)]

    def on_event_taken(self, event: CmEvent) -> None:
        """The program has taken an event."""
        event.counted.reported += 1
        if event.group is not None:
            event.group.reported += 1
        if event.child is not None:
            event.counted.waiting -= 1

    # -- connections -----------------------------------------------------------------------------------------------

    def resolve_addr(
        self, cm_id: CmId, source: Endpoint | None, destination: Endpoint, timeout: float, now: float
    ) -> None:
        """rdma_resolve_addr; the answer is an event."""
        self.addresses.resolve(cm_id, source, destination, timeout, now)
        self.next_deadline = min(self.next_deadline, self.addresses.next_deadline)

    def resolve_route(self, cm_id: CmId) -> None:
        """rdma_resolve_route: on Ethernet the route is the address."""
        if cm_id.state is not IdState.ADDR_RESOLVED:
            raise VerbsError(errno.EINVAL, "the address is not resolved")
        if cm_id.source is None or not self.addresses.own(cm_id.source.ip):
            raise VerbsError(errno.ENODEV, "cannot route to loopback")
        cm_id.state = IdState.ROUTE_RESOLVED
        cm_id.emit(EventType.ROUTE_RESOLVED)

    def listen(self, cm_id: CmId, backlog: int) -> None:
        """rdma_listen; an id that is not bound gets a port of its own."""
        if cm_id.state is IdState.IDLE:
            self.addresses.bind(cm_id, Endpoint(bytes(4)))
        if cm_id.state is not IdState.BOUND or cm_id.source is None:
            raise VerbsError(errno.EINVAL, "the id is not bound")
        if cm_id.reuse:  # a listening id does not share its port
            self.ports.check(cm_id, cm_id.source, False)
            cm_id.reuse = False
        cm_id.backlog = backlog
        cm_id.state = IdState.LISTEN

    def connect(self, cm_id: CmId, param: ConnParam, now: float) -> None:
        """rdma_connect."""
        if cm_id.state is not IdState.ROUTE_RESOLVED or cm_id.source is None or cm_id.destination is None:
            raise VerbsError(errno.EINVAL, "the route is not resolved")
        private = m.IpHeader(cm_id.source.port, cm_id.source.ip, cm_id.destination.ip).pack() + param.private
        kind = m.Kind.SIDR_REQ if cm_id.qp_type == QpType.UD else m.Kind.REQ
        fields.check_private(kind, private)
        try:
            path = self.addresses.path(cm_id)
        except NotYet as error:  # the neighbour has been lost again
            raise VerbsError(errno.EHOSTUNREACH, str(error)) from None
        connection = self.connections.new(path, cm_id)
        cm_id.connection = connection
        cm_id.state = IdState.CONNECT
        service = m.service_id(cm_id.port_space, cm_id.destination.port)
        if kind is m.Kind.SIDR_REQ:
            connection.resolve({"pkey": limits.DEFAULT_PKEY, "service_id": service}, private, now)
        else:
            self._remember(cm_id, param)
            about = fields.request(cm_id, param, service, self.adapter.guid)
            connection.connect(about, private, now, param.ece[1])
        self.flush(connection)

    def _remember(self, cm_id: CmId, param: ConnParam) -> None:
        cm_id.responder_resources = param.responder_resources
        cm_id.initiator_depth = param.initiator_depth
        cm_id.retry_count = min(param.retry_count, 7)
        cm_id.rnr_retry_count = min(param.rnr_retry_count, 7)

    def accept(self, cm_id: CmId, uid: int, param: ConnParam | None, now: float) -> None:
        """rdma_accept; param None: the active end, whose queue pair is ready, answers the REP.

        What cannot be accepted is rejected, as by the kernel: the peer need not wait for another answer.
        """
        connection = self._connected(cm_id)
        try:
            if cm_id.qp_type == QpType.UD:
                private, qpn, qkey = (param.private, param.qp_num, param.qkey) if param is not None else (b"", 0, 0)
                fields.check_private(m.Kind.SIDR_REP, private)
                cm_id.qkey = qkey or UDP_QKEY
                connection.resolved(0, qpn & 0xFFFFFF, cm_id.qkey, private)
            elif param is None:
                connection.ready()
            else:
                fields.check_private(m.Kind.REP, param.private)
                self._remember(cm_id, param._replace(retry_count=cm_id.retry_count))
                about = fields.reply(cm_id, param, self.adapter.guid)
                connection.reply(about, param.private, now, param.ece[1])
        except (ValueError, VerbsError) as error:
            with contextlib.suppress(VerbsError):
                self.reject(cm_id, m.Reason.CONSUMER_DEFINED, b"")
            raise VerbsError(errno.EINVAL, str(error)) from None
        if param is not None:
            cm_id.uid = uid
        self.flush(connection)

    def _connected(self, cm_id: CmId) -> Connection[CmId]:
        if cm_id.connection is None:
            raise VerbsError(errno.EINVAL, "the id has no connection")
        return cm_id.connection

    def reject(self, cm_id: CmId, reason: int, private: bytes) -> None:
        """rdma_reject."""
        connection = self._connected(cm_id)
        try:
            if cm_id.qp_type == QpType.UD:
                fields.check_private(m.Kind.SIDR_REP, private)
                connection.resolved(SIDR_REJECT, 0, 0, private)
            else:
                fields.check_private(m.Kind.REJ, private)
                connection.reject(reason or m.Reason.CONSUMER_DEFINED, private)
        except ValueError as error:
            raise VerbsError(errno.EINVAL, str(error)) from None
        self.flush(connection)

    def disconnect(self, cm_id: CmId, now: float) -> None:
        """rdma_disconnect. As in the kernel, it does nothing when the connection is not established yet."""
        if cm_id.state is IdState.LISTEN and cm_id.on_device:
            return
        connection = self._connected(cm_id)
        with contextlib.suppress(ValueError):
            if cm_id.qp_type != QpType.UD:
                connection.disconnect(now)
        self.flush(connection)

    def notify(self, cm_id: CmId) -> None:
        """rdma_notify of IB_EVENT_COMM_EST."""
        connection = self._connected(cm_id)
        if connection.state is State.ESTABLISHED and cm_id.qp_type != QpType.UD:
            raise VerbsError(errno.EISCONN, "the connection is established already")
        try:
            connection.established()
        except ValueError as error:
            raise VerbsError(errno.EINVAL, str(error)) from None
        self.flush(connection)

    # -- the wire --------------------------------------------------------------------------------------------------

    def send(self, path: Path, message: m.Message) -> None:
        """Send a message to the other end of `path`."""
        self.count("tx_msgs", message.kind)
        self._gsi.send(path, message.pack())

    def count(self, group: str, kind: m.Kind) -> None:
        """Count a message in `group` under the kernel's names (cm_tx_msgs/req, …)."""
        self.messages[f"cm_{group}/{kind.name.lower()}"] += 1

    def flush(self, connection: Connection[CmId]) -> None:
        """Send what a connection has to send, report its events to its owner, forget it when it is over."""
        if not self.connections.holds(connection):
            return  # it was over before
        path = self.connections.paths[connection.local_id]
        for message in connection.outbox:
            self.send(path, message)
        for kind in connection.repeats:
            self.count("tx_retries", kind)
        connection.outbox.clear()
        connection.repeats.clear()
        if connection.deadline is None:
            self._timed.pop(connection.local_id, None)
        else:
            self._timed[connection.local_id] = connection
            self.next_deadline = min(self.next_deadline, connection.deadline)
        events, connection.events = connection.events, []
        for event in events:
            owner = connection.owner
            if owner is not None:
                self._report(owner, event)
        if connection.state is State.ESTABLISHED:
            self.connections.index_by_queue_pair(connection)
        elif connection.state is State.CLOSED:
            self.connections.forget(connection)

    def _report(self, cm_id: CmId, event: Event) -> None:
        kind, status, param, ece = _EVENTS[event.what], event.reason, b"", (0, 0)
        message = event.message
        if event.what is ConnectionEvent.RESPONSE and message is not None:
            cm_id.initiator_depth = message["responder_resources"]
            cm_id.responder_resources = message["initiator_depth"]
            param, ece = fields.peer_parameters(message, message.private), fields.ece(message)
        elif event.what is ConnectionEvent.ESTABLISHED and message is not None and message.kind is m.Kind.SIDR_REP:
            try:
                vector = self.addresses.vector(cm_id)
            except VerbsError:  # the address was removed meanwhile: the answer leads nowhere
                kind, status = EventType.UNREACHABLE, -errno.ENODEV
            else:
                cm_id.qkey = message["qkey"]
                param = ud_param(message["qpn"], message["qkey"], vector, message.private)
        elif event.what is ConnectionEvent.REJECTED and message is not None:
            param = conn_param(private=message.private)
        elif event.what is ConnectionEvent.DISCONNECTED:
            cm_id.state = IdState.DISCONNECT
        if event.late:
            status = -errno.ETIMEDOUT
        if cm_id.uid or event.what is ConnectionEvent.ESTABLISHED:  # an id that was never accepted gets no events
            cm_id.emit(kind, status, param, ece)

    # -- time ------------------------------------------------------------------------------------------------------

    def on_timer(self, now: float) -> None:
        """Do what must be done by now."""
        self.addresses.advance(now)
        self.next_deadline = self.addresses.next_deadline
        for connection in list(self._timed.values()):
            assert connection.deadline is not None
            if connection.deadline <= now:
                connection.on_timer(now)
                self.flush(connection)
            else:
                self.next_deadline = min(self.next_deadline, connection.deadline)
