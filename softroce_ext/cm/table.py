"""The table of connections: where each one's peer is, and to which one a message belongs."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Final

from softroce_ext.cm.connection import Connection, State
from softroce_ext.cm.ids import CmId
from softroce_ext.cm.messages import Kind, Message
from softroce_ext.device.errors import VerbsError
from softroce_ext.wire.path import Path

MAX_CONNECTIONS: Final = 65536
TRANSACTION: Final = 2 << 32
"""The upper half of transaction ids made here: the agent's number, as in Linux."""

Peer = tuple[bytes, int, bool]
"""IP address, the peer's id of the connection, and whether it is a connection (or a resolution of a service)."""


RemoteQp = tuple[bytes, int]
"""IP address and number of the peer's queue pair."""


class ConnectionTable:
    """All connections of one NIC, by the id here and by the peer's."""

    def __init__(self, random: Callable[[int], int]) -> None:
        """random(n): a number below n."""
        self._random = random
        self.by_id: dict[int, Connection[CmId]] = {}
        self.paths: dict[int, Path] = {}
        """By the id here: the path to the peer."""
        self._by_peer: dict[Peer, Connection[CmId]] = {}
        self._peers: dict[int, Peer] = {}
        self._by_qp: dict[RemoteQp, list[Connection[CmId]]] = {}
        """Established connections, and some that were established."""
        self._qps: dict[int, RemoteQp] = {}

    def new(self, path: Path, owner: CmId | None) -> Connection[CmId]:
        """A connection over `path`, with an id that is free. Raises VerbsError(ENOMEM)."""
        if len(self.by_id) >= MAX_CONNECTIONS:
            raise VerbsError(errno.ENOMEM, "too many connections")
        number = 0
        while number == 0 or number in self.by_id:
            number = self._random(1 << 32)
        transaction = TRANSACTION | int.from_bytes(number.to_bytes(4, "big"), "little")
        connection: Connection[CmId] = Connection(number, transaction)
        connection.owner = owner
        self.enter(connection, path)
        return connection

    def enter(self, connection: Connection[CmId], path: Path) -> None:
        """Enter a connection."""
        self.by_id[connection.local_id] = connection
        self.paths[connection.local_id] = path

    def holds(self, connection: Connection[CmId]) -> bool:
        """Whether a connection is in the table. One that is over is not, and its id may be another's by now."""
        return self.by_id.get(connection.local_id) is connection

    def index_by_peer(self, connection: Connection[CmId]) -> None:
        """Let a passive end be found by its peer's id: the peer repeats its request before it knows the id here."""
        assert connection.request is not None
        peer = (
            self.paths[connection.local_id].destination_ip,
            connection.remote_id,
            connection.request.kind is Kind.REQ,
        )
        self._by_peer[peer] = connection
        self._peers[connection.local_id] = peer

    def has_peer(self, connection: Connection[CmId]) -> bool:
        """Whether `index_by_peer` was called."""
        return connection.local_id in self._peers

    def index_by_queue_pair(self, connection: Connection[CmId]) -> None:
        """Let an established connection be found by its peer's queue pair, too."""
        number = connection.local_id
        qp = self.paths[number].destination_ip, connection.remote_qpn
        if self._qps.get(number) != qp:
            self._forget_qp(connection)
            self._qps[number] = qp
            self._by_qp.setdefault(qp, []).append(connection)

    def _forget_qp(self, connection: Connection[CmId]) -> None:
        qp = self._qps.pop(connection.local_id, None)
        if qp is not None:
            others = self._by_qp[qp]
            others.remove(connection)
            if not others:
                del self._by_qp[qp]

    def forget(self, connection: Connection[CmId]) -> None:
        """Forget a connection that is over."""
        self._forget_qp(connection)
        self.by_id.pop(connection.local_id, None)
        self.paths.pop(connection.local_id, None)
        peer = self._peers.pop(connection.local_id, None)
        if peer is not None and self._by_peer.get(peer) is connection:
            del self._by_peer[peer]

    def find(self, message: Message, source: bytes) -> Connection[CmId] | None:
        """Return the connection that a message of `source` is about; a message from another address has none."""
        if message.kind is Kind.REQ:
            return self._by_peer.get((source, message["local_comm_id"], True))
        if message.kind is Kind.SIDR_REQ:
            return self._by_peer.get((source, message["request_id"], False))
        if message.kind is Kind.SIDR_REP:
            connection = self.by_id.get(message["request_id"])
        else:
            connection = self.by_id.get(message["remote_comm_id"])
            if connection is None and message.kind is Kind.REJ and message["remote_comm_id"] == 0:
                connection = self._by_peer.get((source, message["local_comm_id"], True))
        if connection is None or self.paths[connection.local_id].destination_ip != source:
            return None
        if "local_comm_id" in message.fields and connection.remote_id not in (0, message["local_comm_id"]):
            return None
        return connection

    def stale(self, message: Message, source: bytes) -> list[Connection[CmId]]:
        """Return the connections that the sender of a REQ must have lost: its queue pair asks again (IBA 12.9.8.3.1).

        Those of a held program are left alone: their times have stopped, and they may be on another NIC by now.
        """
        return [
            other
            for other in self._by_qp.get((source, message["local_qpn"]), ())
            if other.state is State.ESTABLISHED
            and other.remote_id != message["local_comm_id"]
            and (other.owner is None or other.owner.queue.held_at is None)
        ]

    def heard_from(self, connection: Connection[CmId], reply_path: Path) -> None:
        """A message of a connection came; `reply_path` leads to its sender: a peer that was moved has another MAC."""
        path = self.paths[connection.local_id]
        if path.destination_mac != reply_path.destination_mac:
            self.paths[connection.local_id] = path.replace(destination_mac=reply_path.destination_mac)

    def peer_moved(self, remote_qpn: int, before: bytes, path: Path) -> None:
        """A RESUME said that the peer's queue pair at address `before` is now at the end of `path`."""
        for number, connection in self.by_id.items():
            old = self.paths[number]
            if connection.remote_qpn != remote_qpn or old.destination_ip != before:
                continue
            self.paths[number] = old.replace(destination_ip=path.destination_ip, destination_mac=path.destination_mac)
            if number in self._qps:
                self.index_by_queue_pair(connection)
            peer = self._peers.get(number)
            if peer is not None:
                self._by_peer.pop(peer, None)
                self.index_by_peer(connection)
