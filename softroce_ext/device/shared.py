"""What the device's objects ask of the channel to their program: rings, FIFOs, the doorbell, the mailbox.

The layer above (`uverbs`) implements these protocols; a unit test may hand in something smaller.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import NamedTuple, Protocol, Self

from softroce_ext.transport.interfaces import RecvWqe, SendWqe, WorkCompletion


class RingImage(NamedTuple):
    """One shared ring as it is dumped: its place, its indices (private ones included), and its bytes."""

    offset: int
    size: int
    element: int
    mask: int
    producer: int
    consumer: int
    fetched: int
    data: bytes


class Ring(Protocol):
    """A queue in memory shared with the program."""

    offset: int
    size: int
    capacity: int
    """Elements that fit."""

    def reset(self) -> None:
        """Empty the ring (its queue pair goes to RESET)."""

    def free(self) -> None:
        """Give the shared memory back."""

    def dump(self) -> RingImage:
        """Return a copy of everything."""


class SendRing(Ring, Protocol):
    """transport.interfaces.SendQueue in shared memory."""

    max_inline: int
    """Bytes of a work request that may lie in the queue itself."""
    datagrams: bool
    """Its work requests are a UD queue pair's: they name an address handle."""

    def fetch(self) -> SendWqe | None: ...
    def retire(self) -> None: ...


class ReceiveRing(Ring, Protocol):
    """transport.interfaces.ReceiveQueue in shared memory."""

    def fetch(self) -> RecvWqe | None: ...
    def retire(self) -> None: ...
    def posted(self) -> int:
        """Receives that are posted and not yet fetched."""

    def move_to(self, other: Self) -> None:
        """Copy the posted receives into an empty ring of another length."""


class CompletionRing(Ring, Protocol):
    """The ring of a completion queue."""

    def push(self, completion: WorkCompletion) -> bool:
        """Publish one completion; False when the ring is full."""

    def waiting(self) -> int:
        """Completions that the program has not taken."""

    def move_to(self, other: Self) -> None:
        """Copy the waiting completions into an empty ring of another length."""


class EventFifo(Protocol):
    """A FIFO of fixed-size records from the NIC to the program."""

    name: str

    def post(self, record: bytes) -> bool:
        """Append one record; False when the program does not read and the FIFO is full."""

    def withdraw(self, matches: Callable[[bytes], bool]) -> int:
        """Take back the unread records for which `matches(record)` holds; return how many."""

    def identity(self) -> tuple[int, int]:
        """Return (st_dev, st_ino)."""

    def close(self) -> None:
        """Close and remove it."""


class Channel(Protocol):
    """The files between the NIC and one opening of the device."""

    doorbell: int
    """Descriptor of the FIFO that the program writes to; its end of file is the program's last descriptor closed."""

    @property
    def owner(self) -> tuple[int, int]:
        """(uid, gid) of the files."""

    def close(self) -> None: ...

    # -- doorbell --------------------------------------------------------------------------------------------------

    def silence_doorbell(self) -> None:
        """Drain the doorbell's FIFO, which became readable."""

    def arm_doorbell(self) -> None:
        """From now on the program's next doorbell writes to the FIFO."""

    def rung(self) -> bool:
        """Whether the program rang since the last `arm_doorbell`."""

    def take_dirty(self) -> list[int]:
        """Return the handles of queue pairs that the program rang for since the last call."""

    def all_dirty(self, handles: list[int]) -> None:
        """Mark queue pairs as rung for."""

    def may_post(self, handle: int, allowed: bool) -> None:
        """Whether a doorbell for QP `handle` is accepted at the call."""

    def arm_bytes(self) -> tuple[bytearray | mmap.mmap, int]:
        """A buffer and where in it the bytes begin, one for each CQ handle, by which the program asks for events."""

    # -- answers and events ----------------------------------------------------------------------------------------

    def answer(self, sequence: int, error: int, data: bytes = b"", install: str = "") -> None:
        """Answer the command `sequence`; install: name of the FIFO that becomes a descriptor of the program."""

    def dump_mailbox(self) -> bytes:
        """Return the last answer."""

    def load_mailbox(self, data: bytes) -> None:
        """Put a dumped answer back."""

    def event_fifo(self, record_bytes: int, name: str = "") -> EventFifo:
        """Return a new FIFO of events; without a name the next comp-N."""

    def drop_fifo(self, fifo: EventFifo) -> None:
        """Close and remove a FIFO of events."""

    # -- rings -----------------------------------------------------------------------------------------------------

    def send_ring(self, max_wr: int, max_sge: int, max_inline: int) -> SendRing: ...
    def receive_ring(self, max_wr: int, max_sge: int, shared: bool) -> ReceiveRing: ...
    def completion_ring(self, max_cqe: int) -> CompletionRing: ...
    def restore_send_ring(self, image: RingImage, max_sge: int, max_inline: int) -> SendRing: ...
    def restore_receive_ring(self, image: RingImage, max_sge: int, shared: bool) -> ReceiveRing: ...
    def restore_completion_ring(self, image: RingImage) -> CompletionRing: ...
