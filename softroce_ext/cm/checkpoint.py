"""Openings of rdma_cm to an image and back: ids with their addresses and states, connections, memberships, events.

As with user contexts, a dump reads and changes nothing, a restore enters all or nothing, and what was restored is held:
it sends nothing, and messages for it are dropped (peers repeat them) until the program runs again.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

from pydantic import ValidationError

from softroce_ext.cm import messages as m
from softroce_ext.cm.connection import Connection, State
from softroce_ext.cm.ids import CmEvent, CmId, Endpoint, EventType, Group, IdState
from softroce_ext.cm.interfaces import File
from softroce_ext.cm.manager import CommunicationManager
from softroce_ext.cm.records import ConnectionRecord, EndpointRecord, EventRecord, FileRecord, GroupRecord, IdRecord
from softroce_ext.device.checkpoint import moved
from softroce_ext.device.errors import ImageError, VerbsError
from softroce_ext.wire.path import Path

FileT = TypeVar("FileT", bound=File)
_SCALARS: Final = (
    "handle", "uid", "port_space", "qp_type", "on_device", "flow_label", "tos", "reuse", "family_only", "ack_timeout",
    "qkey", "psn", "responder_resources", "initiator_depth", "retry_count", "rnr_retry_count", "path_mtu", "backlog",
    "waiting", "reported",
)  # fmt: skip
"""Fields of an id that are copied as they are."""
_ONE: Final = (m.Kind.REQ,)
_REQUESTS: Final[dict[State, tuple[m.Kind | None, ...]]] = {
    **dict.fromkeys(State, _ONE),
    State.IDLE: (None,),
    State.SIDR_SENT: (m.Kind.SIDR_REQ,),
    State.SIDR_RCVD: (m.Kind.SIDR_REQ,),
    State.CLOSED: (m.Kind.REQ, m.Kind.SIDR_REQ),
}
"""The kinds of message that can have started a connection in each state."""


# -- dump --------------------------------------------------------------------------------------------------------------


def dump(cm: CommunicationManager, files: Sequence[File]) -> list[dict[str, Any]]:
    """Describe openings of rdma_cm completely; their programs must be frozen, and held."""
    return [_dump_file(cm, file).model_dump() for file in files]


def _dump_file(cm: CommunicationManager, file: File) -> FileRecord:
    uid, gid = file.channel.owner
    held_at = file.queue.held_at
    assert held_at is not None, "a program that may be running"
    return FileRecord(
        id=file.id,
        inner_pid=file.inner_pid,
        uid=uid,
        gid=gid,
        guid=file.guid.hex(),
        mailbox=file.channel.dump_mailbox().hex(),
        ids=[_dump_id(cm, cm_id, held_at) for cm_id in cm.ids_of(file.queue)],
        events=[
            EventRecord(
                kind=event.kind.value,
                status=event.status,
                param=event.param.hex(),
                counted=event.counted.handle,
                child=event.child.handle if event.child is not None else None,
                group=event.group.handle if event.group is not None else None,
                ece=list(event.ece),
            )
            for event in file.queue.events
        ],
    )


def _dump_id(cm: CommunicationManager, cm_id: CmId, held_at: float) -> IdRecord:
    connection = cm_id.connection
    waiting = cm.addresses.resolving.get(cm_id.handle)
    return IdRecord(
        **{name: getattr(cm_id, name) for name in _SCALARS},
        state=cm_id.state.value,
        source=_dump_endpoint(cm_id.source),
        bound=cm.ports.holds(cm_id),
        destination=_dump_endpoint(cm_id.destination),
        resolving=waiting.deadline - held_at if waiting is not None else None,
        connection=_dump_connection(cm, connection, held_at) if connection is not None else None,
        groups=[
            GroupRecord(handle=group.handle, uid=group.uid, mgid=group.mgid.hex(), reported=group.reported)
            for group in cm_id.groups.values()
        ],
    )


def _dump_endpoint(endpoint: Endpoint | None) -> EndpointRecord | None:
    if endpoint is None:
        return None
    return EndpointRecord(ip=endpoint.ip.hex(), port=endpoint.port, scope=endpoint.scope)


def _dump_connection(cm: CommunicationManager, connection: Connection[CmId], held_at: float) -> ConnectionRecord:
    request, last, left, interval = connection.memory()
    kept = cm.connections.holds(connection)
    return ConnectionRecord(
        local_id=connection.local_id,
        remote_id=connection.remote_id,
        transaction_id=connection.transaction_id,
        state=connection.state.value,
        request=request.pack().hex() if request is not None else None,
        remote_qpn=connection.remote_qpn,
        remote_psn=connection.remote_psn,
        last=last.pack().hex() if last is not None else None,
        left=left,
        interval=interval,
        remaining=connection.deadline - held_at if connection.deadline is not None else None,
        passive=kept and cm.connections.has_peer(connection),
        path=cm.connections.paths[connection.local_id].to_plain() if kept else None,
    )


# -- restore -----------------------------------------------------------------------------------------------------------


def parse(plain: list[dict[str, Any]]) -> list[FileRecord]:
    """Check the records of an image. Raises ImageError, naming the place."""
    records = []
    for number, item in enumerate(plain):
        try:
            records.append(FileRecord.model_validate(item))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, ("cm", number, *first["loc"])))
            raise ImageError(f"{place}: {first['msg']} ({error.error_count()} faults)") from None
    return records


def restore(
    cm: CommunicationManager,
    records: list[FileRecord],
    make_file: Callable[[FileRecord], FileT],
    addresses: dict[bytes, bytes],
    now: float,
) -> list[FileT]:
    """Make every id of the records, all or nothing; `addresses`: IP address there → here. Raises ImageError.

    make_file: makes the opening of a record, which is restored and not yet attached.
    """
    made: list[FileT] = []
    record: FileRecord | None = None
    try:
        for record in records:
            file = make_file(record)
            made.append(file)
            file.queue.held_at = now
            _Fill(cm, file, addresses, now).fill(record)
    except Exception as error:  # whatever is wrong with an image, nothing of it may stay
        for file in made:
            cm.discard(file.queue)
        what = f"refers to {error}, which is not in the image" if isinstance(error, KeyError) else str(error)
        raise ImageError(f"rdma_cm file {record.id if record else '?'}: {what}") from error
    return made


class _Fill:
    """Puts one file's ids where they belong."""

    def __init__(self, cm: CommunicationManager, file: File, addresses: dict[bytes, bytes], now: float) -> None:
        self._cm = cm
        self._file = file
        self._addresses = addresses
        self._now = now

    def fill(self, record: FileRecord) -> None:
        """Raises ImageError, VerbsError, KeyError, ValueError."""
        ids: dict[int, CmId] = {}
        groups: dict[int, Group] = {}
        for item in record.ids:
            cm_id = self._id(item)
            ids[item.handle] = cm_id
            for entry in item.groups:
                self._free(entry.handle)
                groups[entry.handle] = Group(entry.handle, entry.uid, bytes.fromhex(entry.mgid), cm_id, entry.reported)
                self._cm.groups.enter(groups[entry.handle])
        for event in record.events:
            kind = EventType(event.kind)
            child = ids[event.child] if event.child is not None else None
            if (kind is EventType.CONNECT_REQUEST) != (child is not None):
                raise ImageError(f"an event of {kind.name} must have a new id if and only if it is a CONNECT_REQUEST")
            group = groups[event.group] if event.group is not None else None
            param = bytes.fromhex(event.param)
            # Not by `post`: its byte is in the FIFO that is restored with the program.
            self._file.queue.events.append(
                CmEvent(ids[event.counted], kind, event.status, param, child, group, (event.ece[0], event.ece[1]))
            )

    def _free(self, handle: int) -> None:
        if handle in self._cm.ids or handle in self._cm.groups.by_handle:
            raise ImageError(f"rdma_cm id {handle} is taken here; number bases must differ")

    def _id(self, record: IdRecord) -> CmId:
        cm = self._cm
        self._free(record.handle)
        cm_id = CmId(record.handle, record.uid, record.port_space, record.qp_type, self._file.queue)
        for name in _SCALARS:
            setattr(cm_id, name, getattr(record, name))
        cm_id.state = IdState(record.state)
        source, cm_id.destination = self._endpoint(record.source, True), self._endpoint(record.destination, False)
        if cm_id.state is not IdState.IDLE and source is None:
            raise ImageError(f"rdma_cm id {record.handle}: {cm_id.state.name} without an address")
        if source is not None and cm_id.destination is not None and len(source.ip) != len(cm_id.destination.ip):
            raise ImageError(f"rdma_cm id {record.handle}: its addresses are of different families")
        if source is not None and source.port == 0:
            raise ImageError(f"rdma_cm id {record.handle}: port 0")
        if source is not None and record.bound:
            try:
                cm.ports.adopt(cm_id, source)
            except VerbsError:
                raise ImageError(f"rdma_cm port {source.port} is taken here by another program") from None
        cm_id.source = source
        cm.ids[cm_id.handle] = cm_id
        if record.resolving is not None and cm_id.state is IdState.RESOLVING:
            cm.addresses.wait(cm_id, self._now + record.resolving)
        if record.connection is not None:
            cm_id.connection = self._connection(record.connection, cm_id)
        return cm_id

    def _endpoint(self, record: EndpointRecord | None, own: bool) -> Endpoint | None:
        if record is None:
            return None
        ip = bytes.fromhex(record.ip)
        return Endpoint(self._addresses.get(ip, ip) if own else ip, record.port, record.scope)

    def _connection(self, record: ConnectionRecord, owner: CmId) -> Connection[CmId]:
        cm = self._cm
        connection: Connection[CmId] = Connection(record.local_id, record.transaction_id)
        connection.remote_id, connection.state = record.remote_id, State(record.state)
        connection.remote_qpn, connection.remote_psn = record.remote_qpn, record.remote_psn
        request, last = self._mad(record.request), self._mad(record.last)
        where = f"connection {record.local_id:#x}"
        if (request.kind if request is not None else None) not in _REQUESTS[connection.state]:
            raise ImageError(f"{where}: {record.state} without a request, or with another's")
        connection.remember(request, last, record.left, record.interval)
        connection.deadline = self._now + record.remaining if record.remaining is not None else None
        connection.owner = owner
        if (record.path is None) != (connection.state is State.CLOSED):
            raise ImageError(f"{where}: {record.state} must have a path if and only if it is not over")
        if record.path is None:  # only its id refers to it, and no message can be for it
            if record.passive or record.remaining is not None:
                raise ImageError(f"{where}: {record.state}, but it is over and has nothing to wait for")
            return connection
        if record.local_id in cm.connections.by_id:
            raise ImageError(f"the connection id {record.local_id:#x} is taken here")
        if record.passive and request is None:
            raise ImageError(f"{where}: passive without a request")
        cm.connections.enter(connection, moved(cm.adapter.mac, Path.from_plain(record.path), self._addresses))
        if record.passive:
            cm.connections.index_by_peer(connection)
        return connection

    def _mad(self, text: str | None) -> m.Message | None:
        if text is None:
            return None
        try:
            return m.unpack(bytes.fromhex(text))
        except m.MessageError as error:
            raise ImageError(f"rdma_cm message: {error}") from None


def summary(cm: CommunicationManager, file: File) -> dict[str, Any]:
    """Return plain data of one opening for the management socket."""

    def text(endpoint: Endpoint | None) -> str | None:
        if endpoint is None:
            return None
        address = ipaddress.ip_address(endpoint.ip)
        return f"[{address}]:{endpoint.port}" if len(endpoint.ip) == 16 else f"{address}:{endpoint.port}"

    return {
        "id": file.id,
        "pid": file.pid,
        "inner_pid": file.inner_pid,
        "held": file.queue.held_at is not None,
        "events": len(file.queue.events),
        "ids": [
            {
                "handle": cm_id.handle,
                "state": cm_id.state.name,
                "source": text(cm_id.source),
                "destination": text(cm_id.destination),
                "connection": cm_id.connection.state.value if cm_id.connection is not None else None,
                "groups": [group.mgid.hex() for group in cm_id.groups.values()],
            }
            for cm_id in cm.ids_of(file.queue)
        ],
    }
