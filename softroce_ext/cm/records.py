"""The records of rdma_cm's openings in an image. `device.image` keeps them as plain data; these models check them."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import Field

from softroce_ext.device.image import Record

MAX_RECORDS: Final = 65536

_HEX = r"^([0-9a-f]{2})*$"
_U8 = Field(ge=0, lt=1 << 8)
_U24 = Field(ge=0, lt=1 << 24)
_U31 = Field(ge=0, lt=1 << 31)
_U32 = Field(ge=0, lt=1 << 32)
_U64 = Field(ge=0, lt=1 << 64)
_COUNT = Field(ge=0, lt=1 << 32)


class EndpointRecord(Record):
    ip: str = Field(pattern=r"^([0-9a-f]{8}|[0-9a-f]{32})$")
    port: int = Field(ge=0, lt=65536)
    scope: int = _U32


class ConnectionRecord(Record):
    local_id: int = Field(ge=1, lt=1 << 32)
    remote_id: int = _U32
    transaction_id: int = _U64
    state: str
    request: str | None = Field(pattern=_HEX)
    """The MAD of the REQ or SIDR_REQ that began it."""
    remote_qpn: int = _U24
    remote_psn: int = _U24
    last: str | None = Field(pattern=_HEX)
    """The MAD that is repeated."""
    left: int = Field(ge=0, le=255)
    """Repeats that are left."""
    interval: float = Field(ge=0, le=1e6)
    remaining: float | None = Field(ge=-1e9, le=1e9)
    """Seconds to the next repeat or end."""
    passive: bool
    """Whether it is found by its peer's id."""
    path: dict[str, int | str] | None
    """wire.path.Path.to_plain. One that is over has none; its id only keeps its last state."""


class GroupRecord(Record):
    handle: int = _U31
    uid: int = _U64
    mgid: str = Field(pattern=r"^[0-9a-f]{32}$")
    reported: int = _COUNT


class IdRecord(Record):
    handle: int = _U31
    uid: int = _U64
    port_space: int = Field(ge=0, lt=65536)
    qp_type: int = Field(ge=2, le=4)
    state: int
    source: EndpointRecord | None
    bound: bool
    """Whether it has its port itself; a connection that a listener accepted has its listener's."""
    destination: EndpointRecord | None
    on_device: bool
    flow_label: int = Field(ge=0, lt=1 << 20)
    tos: int = _U8
    reuse: bool
    family_only: bool
    ack_timeout: int = Field(ge=0, le=31)
    qkey: int = _U32
    psn: int = _U24
    responder_resources: int = _U8
    initiator_depth: int = _U8
    retry_count: int = Field(ge=0, le=7)
    rnr_retry_count: int = Field(ge=0, le=7)
    path_mtu: int = Field(ge=1, le=5)
    backlog: int = Field(ge=0, lt=1 << 31)
    waiting: int = _COUNT
    reported: int = _COUNT
    resolving: float | None = Field(ge=-1e9, le=1e9)
    """Seconds that are left to resolve its destination."""
    connection: ConnectionRecord | None
    groups: list[GroupRecord] = Field(max_length=MAX_RECORDS)


class EventRecord(Record):
    kind: int
    status: int = Field(ge=-(1 << 31), lt=1 << 31)
    param: str = Field(pattern=_HEX, max_length=2 * 304)
    counted: int = _U31
    """Handle of the id that it counts to."""
    child: int | None
    group: int | None
    ece: list[Annotated[int, _U32]] = Field(min_length=2, max_length=2)
    """Vendor's id and options."""


class FileRecord(Record):
    """One opening of rdma_cm."""

    id: str = Field(pattern=r"^[0-9]+-[0-9]+$")
    inner_pid: int = Field(ge=1)
    uid: int = Field(ge=0)
    gid: int = Field(ge=0)
    guid: str = Field(pattern=r"^[0-9a-f]{16}$")
    """Node GUID of the device as the program knows it: librdmacm finds the device of a new id by it."""
    mailbox: str = Field(pattern=_HEX, max_length=2 * 4032)
    ids: list[IdRecord] = Field(max_length=MAX_RECORDS)
    events: list[EventRecord] = Field(max_length=MAX_RECORDS)
