"""Messages of peers on QP1: for a connection that exists, or for a listener, which gets a child for it."""

from __future__ import annotations

from softroce_ext.cm import fields
from softroce_ext.cm import messages as m
from softroce_ext.cm.ids import CmEvent, Endpoint, EventType, IdState
from softroce_ext.cm.interfaces import Manager, Packet
from softroce_ext.cm.params import ud_param
from softroce_ext.device import limits
from softroce_ext.device.errors import VerbsError
from softroce_ext.transport.verbs import QpType
from softroce_ext.wire.path import Path


class Incoming:
    """Takes every MAD for a manager, and counts the outcome of each."""

    def __init__(self, cm: Manager) -> None:
        self._cm = cm

    def on_mad(self, packet: Packet, source_qpn: int, mad: memoryview, now: float) -> None:
        """Take a MAD of QP1. Never raises for its contents, nor for what is missing here (a removed address)."""
        try:
            self._take(packet, m.unpack(mad), now)
        except m.MessageError:
            self._cm.counters["malformed"] += 1
        except VerbsError:
            self._cm.counters["refused"] += 1

    def _take(self, packet: Packet, message: m.Message, now: float) -> None:
        cm = self._cm
        cm.count("rx_msgs", message.kind)
        source, destination = bytes(packet.source_ip), bytes(packet.destination_ip)
        reply_path = Path(cm.adapter.mac, bytes(packet.source_mac), destination, source, 0)
        connection = cm.connections.find(message, source)
        if connection is not None and connection.owner is not None and connection.owner.queue.held_at is not None:
            cm.counters["held"] += 1  # the peer repeats it, to wherever the program runs then
        elif connection is not None:
            cm.connections.heard_from(connection, reply_path)
            if connection.receive(message, now):
                cm.counters["received"] += 1
            else:
                cm.counters["out_of_state"] += 1
                cm.count("rx_duplicates", message.kind)
            cm.flush(connection)
        elif message.kind in (m.Kind.REQ, m.Kind.SIDR_REQ):
            try:
                self._requested(message, source, destination, reply_path, now)
            except (m.MessageError, VerbsError):
                cm.counters["malformed"] += 1
                self._refuse(message, reply_path, m.Reason.INVALID_SERVICE_ID)
        elif message.kind is m.Kind.DREQ:
            # Its connection is forgotten here: the peer need not wait.
            ids = {"local_comm_id": message["remote_comm_id"], "remote_comm_id": message["local_comm_id"]}
            cm.send(reply_path, m.Message(m.Kind.DREP, message.transaction_id, ids))
        elif message.kind is m.Kind.REP:
            self._refuse(message, reply_path, m.Reason.INVALID_COMM_ID)
        else:
            cm.counters["unknown_connection"] += 1

    def _refuse(self, message: m.Message, reply_path: Path, reason: m.Reason) -> None:
        if message.kind is m.Kind.SIDR_REQ:
            about = {"request_id": message["request_id"], "status": 1, "service_id": message["service_id"]}
            answer = m.Message(m.Kind.SIDR_REP, message.transaction_id, about)
        else:
            about = {
                "remote_comm_id": message["local_comm_id"],
                "message_rejected": int(message.kind is m.Kind.REP),
                "reason": reason,
            }
            answer = m.Message(m.Kind.REJ, message.transaction_id, about)
        self._cm.send(reply_path, answer)

    def _requested(self, message: m.Message, source: bytes, destination: bytes, reply_path: Path, now: float) -> None:
        cm = self._cm
        datagrams = message.kind is m.Kind.SIDR_REQ
        header = m.IpHeader.unpack(message.private)
        if header.source != source or header.destination != destination:
            raise m.MessageError("the IP header has other addresses than the packet")
        service = message["service_id"]
        port_space, port = service >> 16, service & 0xFFFF
        here, there = Endpoint(destination, port), Endpoint(source, header.source_port)
        listener = cm.ports.listener(port_space, here)
        if listener is None or (listener.qp_type == QpType.UD) != datagrams:
            cm.counters["no_listener"] += 1
            self._refuse(message, reply_path, m.Reason.INVALID_SERVICE_ID)
            return
        if listener.queue.held_at is not None:
            cm.counters["held"] += 1
            return
        if not datagrams:
            for other in cm.connections.stale(message, source):
                other.disconnect(now)
                cm.flush(other)
        if listener.waiting >= listener.backlog:
            cm.counters["backlog_full"] += 1
            self._refuse(message, reply_path, m.Reason.CONSUMER_DEFINED)
            return
        connection = cm.connections.new(reply_path, None)
        try:
            child = cm.create(listener.queue, 0, listener.port_space, listener.qp_type)
        except VerbsError:
            cm.connections.forget(connection)
            raise
        child.source, child.destination, child.on_device = here, there, True
        child.state = IdState.CONNECT
        child.tos = listener.tos
        connection.owner, child.connection = child, connection
        connection.requested(message)
        cm.connections.index_by_peer(connection)
        rest = message.private[m.IP_HEADER_BYTES :]
        if datagrams:
            child.path_mtu = limits.active_mtu(cm.adapter.interface_mtu)
            param = ud_param(0, 0, None, rest)
        else:
            mtu = message["path_mtu"] if message["path_mtu"] in limits.MTU_BYTES else 1
            child.path_mtu = min(mtu, limits.active_mtu(cm.adapter.interface_mtu))
            child.flow_label = message["primary_flow_label"]
            child.tos = message["primary_traffic_class"]
            child.ack_timeout = message["primary_ack_timeout"]
            child.retry_count = message["retry_count"]
            child.rnr_retry_count = message["rnr_retry_count"]
            child.responder_resources = message["initiator_depth"]
            child.initiator_depth = message["responder_resources"]
            param = fields.peer_parameters(message, rest)
        listener.waiting += 1
        ece = fields.ece(message)
        listener.queue.post(CmEvent(listener, EventType.CONNECT_REQUEST, 0, param, child=child, ece=ece))
        cm.flush(connection)
