"""What the connection manager asks of the world around it: the device, QP1, and the openings of its programs.

The NIC process hands in its own objects, a test anything of these shapes.
"""

from __future__ import annotations

from collections import Counter
from typing import Protocol

from softroce_ext.cm.connection import Connection
from softroce_ext.cm.ids import CmId, EventQueue, Ports
from softroce_ext.cm.messages import Kind, Message
from softroce_ext.cm.table import ConnectionTable
from softroce_ext.device.addressing import Addressing
from softroce_ext.transport.gsi import OnMad
from softroce_ext.wire.path import Path


class Device(Protocol):
    """The RDMA device (`device.adapter.Adapter`)."""

    @property
    def addressing(self) -> Addressing: ...

    @property
    def mac(self) -> bytes:
        """6 bytes."""

    @property
    def guid(self) -> bytes:
        """8 bytes."""

    @property
    def number_base(self) -> int:
        """0..255."""

    @property
    def interface_mtu(self) -> int:
        """Bytes."""


class Gsi(Protocol):
    """QP1 (`transport.gsi.Gsi`)."""

    on_mad: OnMad | None
    """Takes each received MAD."""

    def send(self, path: Path, mad: bytes) -> None:
        """Send one MAD of 256 bytes to QP1 at the end of `path`."""


class Packet(Protocol):
    """What came with a MAD (`wire.frame.Packet`)."""

    @property
    def source_ip(self) -> bytes:
        """4 or 16 bytes."""

    @property
    def destination_ip(self) -> bytes:
        """4 or 16 bytes."""

    @property
    def source_mac(self) -> bytes:
        """6 bytes."""


class Files(Protocol):
    """The files of an opening, as a checkpoint sees them (`device.shared.Channel`)."""

    @property
    def owner(self) -> tuple[int, int]:
        """(uid, gid)."""

    def dump_mailbox(self) -> bytes:
        """Return the last answer."""


class File(Protocol):
    """An opening of rdma_cm, as commands and checkpoints see it (`server.CmFile`)."""

    @property
    def id(self) -> str: ...

    @property
    def pid(self) -> int | None: ...

    @property
    def inner_pid(self) -> int: ...

    @property
    def guid(self) -> bytes:
        """Node GUID of the device as the program knows it."""

    @property
    def channel(self) -> Files: ...

    @property
    def queue(self) -> EventQueue: ...

    def read(self, address: int, length: int) -> bytes:
        """Read memory of the program. Raises VerbsError(EFAULT)."""

    def sibling(self, descriptor: int) -> File:
        """Return another opening by the same process, by its descriptor there. Raises VerbsError."""


class Manager(Protocol):
    """The manager as what takes messages sees it (`manager.CommunicationManager`)."""

    @property
    def adapter(self) -> Device: ...

    @property
    def counters(self) -> Counter[str]: ...

    @property
    def ports(self) -> Ports: ...

    @property
    def connections(self) -> ConnectionTable: ...

    def create(self, queue: EventQueue, uid: int, port_space: int, qp_type: int) -> CmId:
        """Make an id. Raises VerbsError."""

    def send(self, path: Path, message: Message) -> None:
        """Send a message to the other end of `path`."""

    def count(self, group: str, kind: Kind) -> None:
        """Count a message in `group`."""

    def flush(self, connection: Connection[CmId]) -> None:
        """Send and report what a connection has to send and to report."""
