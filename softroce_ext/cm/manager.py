"""The communication manager: brings ids, connections and QP1 together.

Messages come from QP1 (`incoming`), wishes from programs (`ucma` calls the methods), time from the loop (`due`,
`on_timer`). What a method refuses it refuses with VerbsError, before it has changed anything.
"""

from __future__ import annotations

import contextlib
import errno
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

from softroce_ext.cm import fields
from softroce_ext.cm import messages as m
from softroce_ext.cm.addresses import NEVER, Addresses, SourceFor
from softroce_ext.cm.connection import SIDR_REJECT, Connection, Event, Happened, State
from softroce_ext.cm.groups import Groups
from softroce_ext.cm.ids import (
    HANDLES_PER_BASE,
    MAX_IDS,
    QPT_UD,
    CmEvent,
    CmId,
    Endpoint,
    EventQueue,
    EventType,
    IdState,
    Ports,
)
from softroce_ext.cm.incoming import Incoming
from softroce_ext.cm.params import UDP_QKEY, ConnParam, conn_param, ud_param
from softroce_ext.cm.table import ConnectionTable
from softroce_ext.device.errors import NotYet, VerbsError
from softroce_ext.wire.path import Path

_EVENTS: Final = {
    Happened.RESPONSE: EventType.CONNECT_RESPONSE,
    Happened.ESTABLISHED: EventType.ESTABLISHED,
    Happened.REJECTED: EventType.REJECTED,
    Happened.UNREACHABLE: EventType.UNREACHABLE,
    Happened.DISCONNECTED: EventType.DISCONNECTED,
    Happened.TIMEWAIT_EXIT: EventType.TIMEWAIT_EXIT,
}


class CommunicationManager:
    """All of rdma_cm of one NIC."""

    def __init__(
        self,
        adapter: Any,
        gsi: Any,
        random: Callable[[int], int],
        source_for: SourceFor,
    ) -> None:
        """random(n): a number below n."""
        self.adapter = adapter
        self._gsi = gsi
        self._random = random
        self.ids: dict[int, CmId] = {}
        self.ports = Ports(random)
        self.addresses = Addresses(adapter, self.ports, source_for)
        self.groups = Groups(self.addresses, self._handle)
        self.connections = ConnectionTable(random)
        self._next_handle = 0
        self._timed: dict[int, Connection] = {}
        self.due = NEVER
        """When `on_timer` wants to be called."""
        self.counters: Counter[str] = Counter()
        """What became of received messages."""
        self.messages: Counter[str] = Counter()
        """Messages by the names of the kernel's files."""
        self.incoming = Incoming(self)
        gsi.on_mad = self.incoming.on_mad

    # -- ids -------------------------------------------------------------------------------------------------------

    def _handle(self) -> int:
        if len(self.ids) + len(self.groups.by_handle) >= MAX_IDS:
            raise VerbsError(errno.ENOMEM, "too many rdma_cm ids")
        # Numbers of different NICs differ, as those of queue pairs do: a program keeps its own when it is moved.
        base: int = self.adapter.number_base * HANDLES_PER_BASE
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
        """rdma_destroy_id. Returns how many of its events the program took."""
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
            self.work(connection)
        for event in cm_id.queue.withdraw(cm_id):
            if event.child is not None:
                self._forget(event.child, now)

    def migrate(self, cm_id: CmId, queue: EventQueue) -> int:
        """rdma_migrate_id: its events go to `queue` from now on. Returns how many the program took from the old one."""
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
        queue.events.clear()  # nobody reads them, and taking each id's out of many would take long
        for cm_id in self.ids_of(queue):
            if cm_id.handle in self.ids:
                self.destroy(cm_id, now)

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def hold(self, queue: EventQueue, now: float) -> None:
        """The program is frozen: its ids stand still. What comes for them is dropped; its sender repeats it."""
        queue.held_at = now
        for connection in self._connections_of(queue):
            self._timed.pop(connection.local_id, None)

    def release(self, queue: EventQueue, now: float) -> None:
        """The program runs again, here: its times go on where they stopped."""
        assert queue.held_at is not None
        stood, queue.held_at = now - queue.held_at, None
        for connection in self._connections_of(queue):
            if connection.deadline is not None:
                connection.deadline += stood
            self.work(connection)
        self.addresses.shift(queue, stood)
        self.due = now

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

    def _connections_of(self, queue: EventQueue) -> list[Connection]:
        connections = (cm_id.connection for cm_id in self.ids_of(queue))
        return [c for c in connections if c is not None and self.connections.holds(c)]

    def took(self, event: CmEvent) -> None:
        """The program took an event."""
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
        self.due = min(self.due, self.addresses.due)

    def resolve_route(self, cm_id: CmId) -> None:
        """rdma_resolve_route: on Ethernet the route is the address."""
        if cm_id.state is not IdState.ADDR_RESOLVED:
            raise VerbsError(errno.EINVAL, "no resolved address")
        if cm_id.source is None or not self.addresses.own(cm_id.source.ip):
            raise VerbsError(errno.ENODEV, "loopback is no way for a device")
        cm_id.state = IdState.ROUTE_RESOLVED
        cm_id.tell(EventType.ROUTE_RESOLVED)

    def listen(self, cm_id: CmId, backlog: int) -> None:
        """rdma_listen; an id that is not bound gets a port of its own."""
        if cm_id.state is IdState.IDLE:
            self.addresses.bind(cm_id, Endpoint(bytes(4)))
        if cm_id.state is not IdState.BOUND or cm_id.source is None:
            raise VerbsError(errno.EINVAL, "not bound")
        if cm_id.reuse:  # one that listens shares its port no more
            self.ports.check(cm_id, cm_id.source, False)
            cm_id.reuse = False
        cm_id.backlog = backlog
        cm_id.state = IdState.LISTEN

    def connect(self, cm_id: CmId, param: ConnParam, now: float) -> None:
        """rdma_connect."""
        if cm_id.state is not IdState.ROUTE_RESOLVED or cm_id.source is None or cm_id.destination is None:
            raise VerbsError(errno.EINVAL, "no resolved route")
        private = m.IpHeader(cm_id.source.port, cm_id.source.ip, cm_id.destination.ip).pack() + param.private
        kind = m.Kind.SIDR_REQ if cm_id.qp_type == QPT_UD else m.Kind.REQ
        fields.check_private(kind, private)
        try:
            path = self.addresses.path(cm_id)
        except NotYet as error:  # the neighbour is gone again
            raise VerbsError(errno.EHOSTUNREACH, str(error)) from None
        connection = self.connections.new(path, cm_id)
        cm_id.connection = connection
        cm_id.state = IdState.CONNECT
        service = m.service_id(cm_id.port_space, cm_id.destination.port)
        if kind is m.Kind.SIDR_REQ:
            connection.resolve({"pkey": fields.PKEY, "service_id": service}, private, now)
        else:
            self._remember(cm_id, param)
            about = fields.request(cm_id, param, service, self.adapter.guid)
            connection.connect(about, private, now, param.ece[1])
        self.work(connection)

    def _remember(self, cm_id: CmId, param: ConnParam) -> None:
        cm_id.responder_resources = param.responder_resources
        cm_id.initiator_depth = param.initiator_depth
        cm_id.retry_count = min(param.retry_count, 7)
        cm_id.rnr_retry_count = min(param.rnr_retry_count, 7)

    def accept(self, cm_id: CmId, uid: int, param: ConnParam | None, now: float) -> None:
        """rdma_accept; param None: the active end, whose queue pair is ready, answers the REP.

        What cannot be accepted is rejected, as by the kernel: the other end does not wait for a better answer.
        """
        connection = self._connected(cm_id)
        try:
            if cm_id.qp_type == QPT_UD:
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
        self.work(connection)

    def _connected(self, cm_id: CmId) -> Connection:
        if cm_id.connection is None:
            raise VerbsError(errno.EINVAL, "no connection")
        return cm_id.connection

    def reject(self, cm_id: CmId, reason: int, private: bytes) -> None:
        """rdma_reject."""
        connection = self._connected(cm_id)
        try:
            if cm_id.qp_type == QPT_UD:
                fields.check_private(m.Kind.SIDR_REP, private)
                connection.resolved(SIDR_REJECT, 0, 0, private)
            else:
                fields.check_private(m.Kind.REJ, private)
                connection.reject(reason or m.Reason.CONSUMER_DEFINED, private)
        except ValueError as error:
            raise VerbsError(errno.EINVAL, str(error)) from None
        self.work(connection)

    def disconnect(self, cm_id: CmId, now: float) -> None:
        """rdma_disconnect. Where something was begun that is no connection (yet), it does nothing, as in the kernel."""
        if cm_id.state is IdState.LISTEN and cm_id.on_device:
            return
        connection = self._connected(cm_id)
        with contextlib.suppress(ValueError):
            if cm_id.qp_type != QPT_UD:
                connection.disconnect(now)
        self.work(connection)

    def notify(self, cm_id: CmId) -> None:
        """rdma_notify of IB_EVENT_COMM_EST."""
        connection = self._connected(cm_id)
        if connection.state is State.ESTABLISHED and cm_id.qp_type != QPT_UD:
            raise VerbsError(errno.EISCONN, "it is known already")
        try:
            connection.established()
        except ValueError as error:
            raise VerbsError(errno.EINVAL, str(error)) from None
        self.work(connection)

    # -- the wire --------------------------------------------------------------------------------------------------

    def send(self, path: Path, message: m.Message) -> None:
        """Say something to the other end of `path`."""
        self.count("tx_msgs", message.kind)
        self._gsi.send(path, message.pack())

    def count(self, group: str, kind: m.Kind) -> None:
        """Count a message in `group` under the kernel's names (cm_tx_msgs/req, …)."""
        self.messages[f"cm_{group}/{kind.name.lower()}"] += 1

    def work(self, connection: Connection) -> None:
        """Send what a connection has to send, tell its owner what happened, forget it when it is over."""
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
            self.due = min(self.due, connection.deadline)
        events, connection.events = connection.events, []
        for event in events:
            owner = connection.owner
            if owner is not None:
                self._tell(owner, connection, event)
        if connection.state is State.ESTABLISHED:
            self.connections.know_qp(connection)
        elif connection.state is State.CLOSED:
            self.connections.forget(connection)

    def _tell(self, cm_id: CmId, connection: Connection, event: Event) -> None:
        kind, status, param, ece = _EVENTS[event.what], event.reason, b"", (0, 0)
        message = event.message
        if event.what is Happened.RESPONSE and message is not None:
            cm_id.initiator_depth = message["responder_resources"]
            cm_id.responder_resources = message["initiator_depth"]
            param, ece = fields.told(message, message.private), fields.ece(message)
        elif event.what is Happened.ESTABLISHED and message is not None and message.kind is m.Kind.SIDR_REP:
            try:
                vector = self.addresses.vector(cm_id)
            except VerbsError:  # the address went while the peer thought about it: the answer leads nowhere
                kind, status = EventType.UNREACHABLE, -errno.ENODEV
            else:
                cm_id.qkey = message["qkey"]
                param = ud_param(message["qpn"], message["qkey"], vector, message.private)
        elif event.what is Happened.REJECTED and message is not None:
            param = conn_param(private=message.private)
        elif event.what is Happened.DISCONNECTED:
            cm_id.state = IdState.DISCONNECT
        if event.late:
            status = -errno.ETIMEDOUT
        if cm_id.uid or event.what is Happened.ESTABLISHED:  # an id that was never accepted hears nothing
            cm_id.tell(kind, status, param, ece)

    # -- time ------------------------------------------------------------------------------------------------------

    def on_timer(self, now: float) -> None:
        """Do what is due by now."""
        self.addresses.advance(now)
        self.due = self.addresses.due
        for connection in list(self._timed.values()):
            assert connection.deadline is not None
            if connection.deadline <= now:
                connection.on_timer(now)
                self.work(connection)
            else:
                self.due = min(self.due, connection.deadline)
