"""The communication manager: brings ids, connections and QP1 together.

Messages come from QP1 (`on_mad`), wishes from programs (`ucma` calls the other methods), time from the loop
(`due`, `on_timer`). What a method refuses it refuses with VerbsError, before it has changed anything.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from softroce_ext.cm import messages as m
from softroce_ext.cm.connection import Connection, Event, Happened, State
from softroce_ext.cm.ids import (
    MAX_IDS,
    QPT_UC,
    QPT_UD,
    CmEvent,
    CmId,
    Endpoint,
    EventQueue,
    EventType,
    Group,
    IdState,
    Ports,
)
from softroce_ext.cm.params import ConnParam, conn_param, ud_param
from softroce_ext.device import limits
from softroce_ext.device.addressing import address_of, gid_of, is_multicast
from softroce_ext.device.errors import NotYet, VerbsError
from softroce_ext.device.queue_pair import Destination
from softroce_ext.wire.path import Path

UDP_QKEY: Final = 0x01234567
RESPONSE_TIMEOUT_CODE: Final = 20
PKEY: Final = 0xFFFF
HOP_LIMIT: Final = 64
MULTICAST_QPN: Final = 0xFFFFFF
TRANSACTION: Final = 2 << 32
"""The upper half of our transaction ids: the agent's number, as in Linux."""
RESOLVE_POLL: Final = 0.01
"""Seconds between looks at the neighbour table while an address is being resolved."""
MAX_CONNECTIONS: Final = 65536
NEVER: Final = float("inf")

_EVENTS: Final = {
    Happened.RESPONSE: EventType.CONNECT_RESPONSE,
    Happened.ESTABLISHED: EventType.ESTABLISHED,
    Happened.REJECTED: EventType.REJECTED,
    Happened.UNREACHABLE: EventType.UNREACHABLE,
    Happened.DISCONNECTED: EventType.DISCONNECTED,
    Happened.TIMEWAIT_EXIT: EventType.TIMEWAIT_EXIT,
}


class _Resolving(NamedTuple):
    cm_id: CmId
    deadline: float


class CommunicationManager:
    """All of rdma_cm of one NIC."""

    def __init__(
        self,
        adapter: Any,
        gsi: Any,
        random: Callable[[int], int],
        source_for: Callable[[bytes], bytes | None],
    ) -> None:
        """random(n): a number below n; source_for(destination IP): from which address the host would send there."""
        self.adapter = adapter
        self._gsi = gsi
        self._random = random
        self._source_for = source_for
        self.ids: dict[int, CmId] = {}
        self.groups: dict[int, Group] = {}
        self.ports = Ports(random)
        self.connections: dict[int, Connection] = {}
        self._by_peer: dict[tuple[bytes, int, bool], Connection] = {}
        self._paths: dict[int, Path] = {}
        self._resolving: list[_Resolving] = []
        self._next_handle = 0
        self._timed: dict[int, Connection] = {}
        self.due = NEVER
        """When `on_timer` wants to be called."""
        self.counters: Counter[str] = Counter()
        self.membership: Callable[[bytes, bool], None] = lambda _address, _member: None
        """Told of the first member of a group's address, and when there is none any more."""
        gsi.on_mad = self.on_mad

    # -- ids -------------------------------------------------------------------------------------------------------

    def _handle(self) -> int:
        if len(self.ids) + len(self.groups) >= MAX_IDS:
            raise VerbsError(errno.ENOMEM, "too many rdma_cm ids")
        while True:
            handle = self._next_handle
            self._next_handle = (self._next_handle + 1) & 0x7FFFFFFF
            if handle not in self.ids and handle not in self.groups:
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
            self.leave(group)
        self._forget(cm_id, now)
        return cm_id.reported

    def _forget(self, cm_id: CmId, now: float) -> None:
        self.ids.pop(cm_id.handle, None)
        self.ports.release(cm_id)
        self._resolving = [item for item in self._resolving if item.cm_id is not cm_id]
        connection, cm_id.connection = cm_id.connection, None
        if connection is not None:
            connection.owner = None
            connection.destroy(now)
            self._work(connection)
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

    def close(self, queue: EventQueue, now: float) -> None:
        """The program closed its descriptor, or ended."""
        for cm_id in [cm_id for cm_id in self.ids.values() if cm_id.queue is queue]:
            if cm_id.handle in self.ids:
                self.destroy(cm_id, now)

    def took(self, event: CmEvent) -> None:
        """The program took an event."""
        event.counted.reported += 1
        if event.group is not None:
            event.group.reported += 1
        if event.child is not None:
            event.counted.waiting -= 1

    def _post(self, cm_id: CmId, kind: EventType, status: int = 0, param: bytes = b"") -> None:
        cm_id.queue.post(CmEvent(cm_id, kind, status, param))

    # -- addresses -------------------------------------------------------------------------------------------------

    def _own(self, ip: bytes) -> bool:
        return gid_of(ip) in self.adapter.gids

    def bind(self, cm_id: CmId, endpoint: Endpoint) -> None:
        """rdma_bind_addr."""
        if cm_id.state is not IdState.IDLE:
            raise VerbsError(errno.EINVAL, "bound already")
        if not endpoint.wildcard and not self._own(endpoint.ip):
            raise VerbsError(errno.EADDRNOTAVAIL, "not an address of the device")
        cm_id.source = self.ports.bind(cm_id, endpoint)
        cm_id.on_device = not endpoint.wildcard
        cm_id.state = IdState.BOUND

    def resolve_addr(
        self, cm_id: CmId, source: Endpoint | None, destination: Endpoint, timeout: float, now: float
    ) -> None:
        """rdma_resolve_addr; the answer is an event."""
        if cm_id.state is IdState.IDLE:
            ip = source.ip if source is not None and not source.wildcard else self._choose(destination.ip)
            self.bind(cm_id, Endpoint(ip, source.port if source is not None else 0))
        elif cm_id.state is not IdState.BOUND or cm_id.source is None:
            raise VerbsError(errno.EINVAL, "resolved already")
        elif cm_id.source.wildcard:
            cm_id.source = cm_id.source._replace(ip=self._choose(destination.ip))
            cm_id.on_device = True
        assert cm_id.source is not None
        if len(cm_id.source.ip) != len(destination.ip):
            raise VerbsError(errno.EINVAL, "the addresses are of two families")
        cm_id.destination = destination
        cm_id.state = IdState.RESOLVING
        cm_id.flow_label = (cm_id.source.port * 31 + destination.port) & 0xFFFFF
        cm_id.path_mtu = limits.active_mtu(self.adapter.interface_mtu)
        self._resolving.append(_Resolving(cm_id, now + timeout))
        self._resolve(now)

    def _choose(self, destination: bytes) -> bytes:
        ip = destination if self._own(destination) else self._source_for(destination)
        if ip is not None and self._own(ip):
            return ip
        raise VerbsError(errno.ENODEV, "no route to the address over this device")

    def _resolve(self, now: float) -> None:
        waiting, self._resolving = self._resolving, []
        for item in waiting:
            cm_id = item.cm_id
            try:
                self._path_of(cm_id)
            except NotYet:
                if now < item.deadline:
                    self._resolving.append(item)
                    self.due = min(self.due, now + RESOLVE_POLL)
                    continue
                cm_id.state = IdState.BOUND
                self._post(cm_id, EventType.ADDR_ERROR, -errno.ETIMEDOUT)
            except VerbsError as error:
                cm_id.state = IdState.BOUND
                self._post(cm_id, EventType.ADDR_ERROR, -error.number)
            else:
                cm_id.state = IdState.ADDR_RESOLVED
                self._post(cm_id, EventType.ADDR_RESOLVED)

    def _path_of(self, cm_id: CmId) -> Path:
        path: Path = self.adapter.addressing.path(self.vector(cm_id), 0)
        return path

    def vector(self, cm_id: CmId) -> Destination:
        """The address vector of an id. Raises VerbsError(EINVAL) while it has no addresses."""
        if cm_id.source is None or cm_id.destination is None or gid_of(cm_id.source.ip) not in self.adapter.gids:
            raise VerbsError(errno.EINVAL, "no address, or one that is not the device's any more")
        return Destination(
            dgid=gid_of(cm_id.destination.ip),
            flow_label=cm_id.flow_label,
            sgid_index=self.adapter.gids.index(gid_of(cm_id.source.ip)),
            hop_limit=HOP_LIMIT,
            traffic_class=cm_id.tos,
            is_global=1,
            port_num=1,
        )

    def resolve_route(self, cm_id: CmId) -> None:
        """rdma_resolve_route: on Ethernet the route is the address."""
        if cm_id.state is not IdState.ADDR_RESOLVED:
            raise VerbsError(errno.EINVAL, "no resolved address")
        cm_id.state = IdState.ROUTE_RESOLVED
        self._post(cm_id, EventType.ROUTE_RESOLVED)

    def listen(self, cm_id: CmId, backlog: int) -> None:
        """rdma_listen; an id that is not bound gets a port of its own."""
        if cm_id.state is IdState.IDLE:
            self.bind(cm_id, Endpoint(bytes(4)))
        if cm_id.state is not IdState.BOUND or cm_id.source is None:
            raise VerbsError(errno.EINVAL, "not bound")
        cm_id.backlog = backlog
        cm_id.state = IdState.LISTEN

    # -- connections -----------------------------------------------------------------------------------------------

    def _new_connection(self, path: Path, owner: CmId | None) -> Connection:
        if len(self.connections) >= MAX_CONNECTIONS:
            raise VerbsError(errno.ENOMEM, "too many connections")
        number = 0
        while number == 0 or number in self.connections:
            number = self._random(1 << 32)
        transaction = TRANSACTION | int.from_bytes(number.to_bytes(4, "big"), "little")
        connection = Connection(number, transaction)
        connection.owner = owner
        self.connections[number] = connection
        self._paths[number] = path
        return connection

    def connect(self, cm_id: CmId, param: ConnParam, now: float) -> None:
        """rdma_connect."""
        if cm_id.state is not IdState.ROUTE_RESOLVED or cm_id.source is None or cm_id.destination is None:
            raise VerbsError(errno.EINVAL, "no resolved route")
        private = m.IpHeader(cm_id.source.port, cm_id.source.ip, cm_id.destination.ip).pack() + param.private
        kind = m.Kind.SIDR_REQ if cm_id.qp_type == QPT_UD else m.Kind.REQ
        _check_private(kind, private)
        try:
            path = self._path_of(cm_id)
        except NotYet as error:  # the neighbour is gone again
            raise VerbsError(errno.EHOSTUNREACH, str(error)) from None
        connection = self._new_connection(path, cm_id)
        cm_id.connection = connection
        cm_id.state = IdState.CONNECT
        service = m.service_id(cm_id.port_space, cm_id.destination.port)
        if kind is m.Kind.SIDR_REQ:
            connection.resolve({"pkey": PKEY, "service_id": service}, private, now)
        else:
            self._remember(cm_id, param)
            connection.connect(self._request(cm_id, param, service), private, now)
        self._work(connection)

    def _remember(self, cm_id: CmId, param: ConnParam) -> None:
        cm_id.responder_resources = param.responder_resources
        cm_id.initiator_depth = param.initiator_depth
        cm_id.retry_count = param.retry_count & 7
        cm_id.rnr_retry_count = param.rnr_retry_count & 7

    def _request(self, cm_id: CmId, param: ConnParam, service: int) -> dict[str, int]:
        assert cm_id.source is not None and cm_id.destination is not None
        return {
            "service_id": service,
            "local_ca_guid": int.from_bytes(self.adapter.guid, "big"),
            "local_qpn": param.qp_num & 0xFFFFFF,
            "responder_resources": param.responder_resources,
            "initiator_depth": param.initiator_depth,
            "remote_cm_response_timeout": RESPONSE_TIMEOUT_CODE,
            "transport_type": int(cm_id.qp_type == QPT_UC),
            "end_to_end_flow_control": param.flow_control & 1,
            "starting_psn": cm_id.psn,
            "local_cm_response_timeout": RESPONSE_TIMEOUT_CODE,
            "retry_count": cm_id.retry_count,
            "pkey": PKEY,
            "path_mtu": cm_id.path_mtu,
            "rnr_retry_count": cm_id.rnr_retry_count,
            "max_cm_retries": 15,
            "srq": int(param.srq != 0),
            "primary_local_lid": 0xFFFF,
            "primary_remote_lid": 0xFFFF,
            "primary_local_gid": int.from_bytes(gid_of(cm_id.source.ip), "big"),
            "primary_remote_gid": int.from_bytes(gid_of(cm_id.destination.ip), "big"),
            "primary_flow_label": cm_id.flow_label,
            "primary_traffic_class": cm_id.tos,
            "primary_hop_limit": HOP_LIMIT,
            "primary_ack_timeout": cm_id.ack_timeout,
        }

    def accept(self, cm_id: CmId, uid: int, param: ConnParam | None, now: float) -> None:
        """rdma_accept; param None: the active end, whose queue pair is ready, answers the REP."""
        connection = self._connected(cm_id)
        try:
            if param is None:
                connection.ready()
            elif cm_id.qp_type == QPT_UD:
                _check_private(m.Kind.SIDR_REP, param.private)
                cm_id.qkey = param.qkey or UDP_QKEY
                connection.resolved(0, param.qp_num & 0xFFFFFF, cm_id.qkey, param.private)
            else:
                _check_private(m.Kind.REP, param.private)
                self._remember(cm_id, param._replace(retry_count=cm_id.retry_count))
                connection.reply(self._reply(cm_id, param), param.private, now)
        except ValueError as error:
            raise VerbsError(errno.EINVAL, str(error)) from None
        if param is not None:
            cm_id.uid = uid
        self._work(connection)

    def _reply(self, cm_id: CmId, param: ConnParam) -> dict[str, int]:
        return {
            "local_qpn": param.qp_num & 0xFFFFFF,
            "starting_psn": cm_id.psn,
            "responder_resources": param.responder_resources,
            "initiator_depth": param.initiator_depth,
            "target_ack_delay": limits.LOCAL_CA_ACK_DELAY,
            "end_to_end_flow_control": param.flow_control & 1,
            "rnr_retry_count": param.rnr_retry_count & 7,
            "srq": int(param.srq != 0),
            "local_ca_guid": int.from_bytes(self.adapter.guid, "big"),
        }

    def _connected(self, cm_id: CmId) -> Connection:
        if cm_id.connection is None:
            raise VerbsError(errno.EINVAL, "no connection")
        return cm_id.connection

    def reject(self, cm_id: CmId, reason: int, private: bytes) -> None:
        """rdma_reject."""
        connection = self._connected(cm_id)
        try:
            if cm_id.qp_type == QPT_UD:
                _check_private(m.Kind.SIDR_REP, private)
                connection.resolved(3, 0, 0, private)
            else:
                _check_private(m.Kind.REJ, private)
                connection.reject(reason or m.Reason.CONSUMER_DEFINED, private)
        except ValueError as error:
            raise VerbsError(errno.EINVAL, str(error)) from None
        self._work(connection)

    def disconnect(self, cm_id: CmId, now: float) -> None:
        """rdma_disconnect."""
        connection = self._connected(cm_id)
        if cm_id.qp_type == QPT_UD:
            raise VerbsError(errno.EINVAL, "datagrams have no connection")
        try:
            connection.disconnect(now)
        except ValueError as error:
            raise VerbsError(errno.EINVAL, str(error)) from None
        self._work(connection)

    def notify(self, cm_id: CmId) -> None:
        """rdma_notify of IB_EVENT_COMM_EST."""
        connection = self._connected(cm_id)
        connection.established()
        self._work(connection)

    # -- multicast -------------------------------------------------------------------------------------------------

    def join(self, cm_id: CmId, uid: int, address: Endpoint) -> Group:
        """rdma_join_multicast; the queue pair is attached by the library when it sees the event."""
        if cm_id.source is None or not self._own(cm_id.source.ip) or not is_multicast(address.ip):
            raise VerbsError(errno.EINVAL, "no device, or not a group's address")
        if len(address.ip) != len(cm_id.source.ip):
            raise VerbsError(errno.EINVAL, "the group is of the other address family")
        group = Group(self._handle(), uid, gid_of(address.ip), cm_id)
        if all(other.mgid != group.mgid for other in self.groups.values()):
            self.membership(address.ip, True)
        self.groups[group.handle] = cm_id.groups[group.handle] = group
        vector = self.vector_to(cm_id, group.mgid)
        cm_id.qkey = cm_id.qkey or UDP_QKEY
        param = ud_param(MULTICAST_QPN, cm_id.qkey, vector)
        cm_id.queue.post(CmEvent(cm_id, EventType.MULTICAST_JOIN, 0, param, group=group))
        return group

    def vector_to(self, cm_id: CmId, gid: bytes) -> Destination:
        """The address vector from an id's address to `gid`."""
        assert cm_id.source is not None
        return Destination(
            dgid=gid,
            flow_label=cm_id.flow_label,
            sgid_index=self.adapter.gids.index(gid_of(cm_id.source.ip)),
            hop_limit=HOP_LIMIT if not is_multicast(gid) else 1,
            traffic_class=cm_id.tos,
            is_global=1,
            port_num=1,
        )

    def leave(self, group: Group) -> int:
        """rdma_leave_multicast. Returns how many of its events the program took."""
        self.groups.pop(group.handle, None)
        group.cm_id.groups.pop(group.handle, None)
        group.cm_id.queue.withdraw(group.cm_id, group)
        if all(other.mgid != group.mgid for other in self.groups.values()):
            self.membership(address_of(group.mgid), False)
        return group.reported

    # -- the wire --------------------------------------------------------------------------------------------------

    def on_mad(self, packet: Any, source_qpn: int, mad: memoryview, now: float) -> None:
        """Take a MAD of QP1. Never raises for what is in it."""
        try:
            message = m.unpack(mad)
        except m.MessageError:
            self.counters["malformed"] += 1
            return
        half = len(packet.addresses) // 2
        source, destination = bytes(packet.addresses[:half]), bytes(packet.addresses[half:])
        back = Path(self.adapter.mac, bytes(packet.source_mac), destination, source, 0)
        connection = self._find(message, source)
        if connection is not None:
            if connection.receive(message, now):
                self.counters["received"] += 1
            else:
                self.counters["out_of_state"] += 1
            self._work(connection)
        elif message.kind in (m.Kind.REQ, m.Kind.SIDR_REQ):
            try:
                self._requested(message, source, destination, back, now)
            except (m.MessageError, VerbsError):
                self.counters["malformed"] += 1
                self._refuse(message, back, m.Reason.INVALID_SERVICE_ID)
        elif message.kind is m.Kind.DREQ:
            # Its connection is forgotten here: the peer need not wait for us.
            ids = {"local_comm_id": message["remote_comm_id"], "remote_comm_id": message["local_comm_id"]}
            self._gsi.send(back, m.Message(m.Kind.DREP, message.transaction_id, ids).pack())
        elif message.kind is m.Kind.REP:
            self._refuse(message, back, m.Reason.INVALID_COMM_ID)
        else:
            self.counters["unknown_connection"] += 1

    def _find(self, message: m.Message, source: bytes) -> Connection | None:
        """The connection that a message of `source` is about; nobody else may speak for it."""
        if message.kind is m.Kind.REQ:
            return self._by_peer.get((source, message["local_comm_id"], True))
        if message.kind is m.Kind.SIDR_REQ:
            return self._by_peer.get((source, message["request_id"], False))
        if message.kind is m.Kind.SIDR_REP:
            connection = self.connections.get(message["request_id"])
        else:
            connection = self.connections.get(message["remote_comm_id"])
            if connection is None and message.kind is m.Kind.REJ and message["remote_comm_id"] == 0:
                connection = self._by_peer.get((source, message["local_comm_id"], True))
        if connection is None or self._paths[connection.local_id].destination_ip != source:
            return None
        if "local_comm_id" in message.fields and connection.remote_id not in (0, message["local_comm_id"]):
            return None
        return connection

    def _refuse(self, message: m.Message, back: Path, reason: m.Reason) -> None:
        if message.kind is m.Kind.SIDR_REQ:
            fields = {"request_id": message["request_id"], "status": 1, "service_id": message["service_id"]}
            answer = m.Message(m.Kind.SIDR_REP, message.transaction_id, fields)
        else:
            fields = {
                "remote_comm_id": message["local_comm_id"],
                "message_rejected": int(message.kind is m.Kind.REP),
                "reason": reason,
            }
            answer = m.Message(m.Kind.REJ, message.transaction_id, fields)
        self._gsi.send(back, answer.pack())

    def _requested(self, message: m.Message, source: bytes, destination: bytes, back: Path, now: float) -> None:
        datagrams = message.kind is m.Kind.SIDR_REQ
        header = m.IpHeader.unpack(message.private)
        if header.source != source or header.destination != destination:
            raise m.MessageError("the IP header speaks of other addresses than the packet")
        service = message["service_id"]
        port_space, port = service >> 16, service & 0xFFFF
        here, there = Endpoint(destination, port), Endpoint(source, header.source_port)
        listener = self.ports.listener(port_space, here)
        if listener is None or (listener.qp_type == QPT_UD) != datagrams:
            self.counters["no_listener"] += 1
            self._refuse(message, back, m.Reason.INVALID_SERVICE_ID)
            return
        if not datagrams:
            self._stale(message, source, now)
        if listener.waiting >= listener.backlog:
            self.counters["backlog_full"] += 1
            self._refuse(message, back, m.Reason.CONSUMER_DEFINED)
            return
        child = self.create(listener.queue, 0, listener.port_space, listener.qp_type)
        child.source, child.destination, child.on_device = here, there, True
        child.state = IdState.CONNECT
        child.tos = listener.tos
        connection = self._new_connection(back, child)
        connection.requested(message)
        child.connection = connection
        self._by_peer[(source, connection.remote_id, not datagrams)] = connection
        rest = message.private[m.IP_HEADER_BYTES :]
        if datagrams:
            child.path_mtu = limits.active_mtu(self.adapter.interface_mtu)
            param = ud_param(0, 0, None, rest)
        else:
            mtu = message["path_mtu"] if message["path_mtu"] in limits.MTU_BYTES else 1
            child.path_mtu = min(mtu, limits.active_mtu(self.adapter.interface_mtu))
            child.flow_label = message["primary_flow_label"]
            child.tos = message["primary_traffic_class"]
            child.ack_timeout = message["primary_ack_timeout"]
            child.retry_count = message["retry_count"]
            child.rnr_retry_count = message["rnr_retry_count"]
            child.responder_resources = message["initiator_depth"]
            child.initiator_depth = message["responder_resources"]
            param = _told(message, rest)
        listener.waiting += 1
        listener.queue.post(CmEvent(listener, EventType.CONNECT_REQUEST, 0, param, child=child))
        self._work(connection)

    def _stale(self, message: m.Message, source: bytes, now: float) -> None:
        """A REQ from a queue pair that we think is connected: its host has forgotten that (IBA 12.9.8.3.1)."""
        for other in list(self.connections.values()):
            request = other.request
            if (
                other.state is State.ESTABLISHED
                and other.remote_qpn == message["local_qpn"]
                and self._paths[other.local_id].destination_ip == source
                and request is not None
                and other.remote_id != message["local_comm_id"]
            ):
                other.disconnect(now)
                self._work(other)

    def _work(self, connection: Connection) -> None:
        """Send what a connection has to send, tell its owner what happened, forget it when it is over."""
        path = self._paths.get(connection.local_id)
        if path is None:
            return  # it was over before
        for message in connection.outbox:
            self._gsi.send(path, message.pack())
        connection.outbox.clear()
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
        if connection.state is State.CLOSED:
            self.connections.pop(connection.local_id, None)
            self._paths.pop(connection.local_id, None)
            for key in [key for key, value in self._by_peer.items() if value is connection]:
                del self._by_peer[key]

    def _tell(self, cm_id: CmId, connection: Connection, event: Event) -> None:
        status, param = event.reason, b""
        message = event.message
        if event.what is Happened.RESPONSE and message is not None:
            cm_id.initiator_depth = min(cm_id.initiator_depth, message["responder_resources"])
            cm_id.responder_resources = max(cm_id.responder_resources, message["initiator_depth"])
            param = _told(message, message.private)
        elif event.what is Happened.ESTABLISHED and message is not None and message.kind is m.Kind.SIDR_REP:
            cm_id.qkey = message["qkey"]
            param = ud_param(message["qpn"], message["qkey"], self.vector(cm_id), message.private)
        elif event.what is Happened.REJECTED and message is not None:
            param = conn_param(private=message.private)
        elif event.what is Happened.DISCONNECTED:
            cm_id.state = IdState.DISCONNECT
        if event.late:
            status = -errno.ETIMEDOUT
        if cm_id.uid or event.what is Happened.ESTABLISHED:  # an id that was never accepted hears nothing
            self._post(cm_id, _EVENTS[event.what], status, param)

    # -- time ------------------------------------------------------------------------------------------------------

    def on_timer(self, now: float) -> None:
        """Do what is due by now."""
        self.due = NEVER
        if self._resolving:
            self._resolve(now)
        for connection in list(self._timed.values()):
            assert connection.deadline is not None
            if connection.deadline <= now:
                connection.on_timer(now)
                self._work(connection)
            else:
                self.due = min(self.due, connection.deadline)


def _check_private(kind: m.Kind, private: bytes) -> None:
    if len(private) > m.LAYOUTS[kind].private[1]:
        raise VerbsError(errno.EINVAL, f"too much private data for {kind.name}")


def _told(message: m.Message, private: bytes) -> bytes:
    """What a REQ or REP says, from the other end's point of view: its initiator depth is our responder resources."""
    return conn_param(
        qp_num=message["local_qpn"],
        private=private,
        srq=message["srq"],
        responder_resources=message["initiator_depth"],
        initiator_depth=message["responder_resources"],
        flow_control=message["end_to_end_flow_control"],
        retry_count=message.fields.get("retry_count", 0),
        rnr_retry_count=message["rnr_retry_count"],
    )
