"""What every object of a user context is: something with a handle that enters the device's tables and leaves them.

A dump asks each object for its record (`to_record`), a restore makes it from one (`from_record`); the order of kinds
is `checkpoint.ORDER`.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

from softroce_ext.device.image import RingRecord
from softroce_ext.device.memory import ProcessMemory
from softroce_ext.device.numbers import NumberPool
from softroce_ext.device.shared import Channel, EventFifo, RingImage
from softroce_ext.wire.path import Path


class Device(Protocol):
    """What objects ask of the device (`adapter.Adapter`) when they enter and leave it."""

    @property
    def srq_numbers(self) -> NumberPool: ...

    @property
    def ah_numbers(self) -> NumberPool: ...

    def adopt(self, item: UserObject) -> None:
        """Enter a user queue pair into the device and the engine."""

    def withdraw(self, item: UserObject) -> None:
        """Take a user queue pair out of its groups, the device and the engine; one that is not there is ignored."""


class UserObject:
    """An object of a user context."""

    __slots__ = ("handle",)
    handle: int
    """By which the program names it; 0 until its user context has taken it in."""

    def enter(self, device: Device) -> None:
        """Enter the tables of the device, and count the references to other objects. The handle must be known."""

    def free(self, device: Device) -> None:
        """Leave the tables of the device, at once and without a packet; the whole user context goes."""


ObjectT = TypeVar("ObjectT", bound=UserObject)


class Restore(Protocol):
    """A restore that is under way, as `from_record` sees it. Its lookups raise ImageError, or KeyError for a handle."""

    @property
    def keys(self) -> dict[int, Any]:
        """`regions.Keys` of the device."""

    @property
    def memory(self) -> ProcessMemory: ...

    @property
    def channel(self) -> Channel: ...

    @property
    def async_fifo(self) -> EventFifo:
        """Where asynchronous events go."""

    @property
    def completion_channels(self) -> dict[str, Any]:
        """`completion.CompletionChannel` by the name of its FIFO."""

    def get(self, handle: int, kind: type[ObjectT]) -> ObjectT:
        """The restored object with `handle`."""

    def find(self, handle: int) -> UserObject:
        """The same, of any kind."""

    def ring(self, record: RingRecord) -> RingImage:
        """The bytes and indices of a ring."""

    def path(self, plain: dict[str, int | str]) -> Path:
        """A path of the image as it is here: with this host's MAC, and the address that replaces the old one."""
