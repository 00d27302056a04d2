"""What the device's objects ask of the channel to their program: rings, FIFOs, the doorbell's permission byte.

The layer above (`uverbs`) implements these; a unit test may hand in something smaller.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from softroce_ext.transport.interfaces import RecvWqe, SendWqe, WorkCompletion


class RingImage(NamedTuple):
    """One shared ring as it is dumped: where it lies, its indices (private ones included), and its bytes."""

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
        """Make it empty (a queue pair going to RESET)."""

    def free(self) -> None:
        """Give the shared memory back."""

    def dump(self) -> RingImage:
        """A copy of everything."""


class SendRing(Ring, Protocol):
    """transport.interfaces.SendQueue in shared memory."""

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

    def move_to(self, other: Any) -> None:
        """Copy what is posted into an empty ring of another length."""


class CompletionRing(Ring, Protocol):
    """The ring of a completion queue."""

    def push(self, completion: WorkCompletion) -> bool:
        """Publish one completion; False when the ring is full."""

    def waiting(self) -> int:
        """Completions that the program has not taken."""

    def move_to(self, other: Any) -> None:
        """Copy what waits into an empty ring of another length."""


class EventFifo(Protocol):
    """A FIFO of fixed-size records from the NIC to the program."""

    name: str

    def post(self, record: bytes) -> bool:
        """Append one record; False when the program does not read and the FIFO is full."""

    def withdraw(self, matches: Any) -> int:
        """Take back the unread records for which `matches(record)` holds; return how many."""


class Channel(Protocol):
    """The files between the NIC and one open of the device."""

    def send_ring(self, max_wr: int, max_sge: int, max_inline: int) -> SendRing: ...
    def receive_ring(self, max_wr: int, max_sge: int, shared: bool) -> ReceiveRing: ...
    def completion_ring(self, max_cqe: int) -> CompletionRing: ...
    def may_post(self, handle: int, allowed: bool) -> None:
        """Whether a doorbell for QP `handle` is accepted at the call."""

    def arm_bytes(self) -> tuple[Any, int]:
        """A buffer and where in it the bytes begin, one for each CQ handle, by which the program asks for events."""

    def close(self) -> None: ...
