"""One process's open device file, of verbs or of rdma_cm, and the set of all openings of one kind.

What both kinds have in common lives here: an identifier, the process behind the opening, watching that process for its
end, and being held while the program is frozen for a move. What an opening owns is the business of its subclass
(`user_context.UserContext`, `cm.server.CmFile`), and what holding or freeing it means that of the subclass of
`Openings`.
"""

from __future__ import annotations

import contextlib
import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, Final, Generic, Protocol, TypeVar

from softroce_ext.device.errors import StateError
from softroce_ext.device.memory import ProcessMemory
from softroce_ext.device.shared import Channel

NO_PROCESS: Final = 0
"""The pid of the memory of a restored opening before it is attached: process_vm_readv answers ESRCH for it."""


class Descriptors(Protocol):
    """The descriptors that an event loop waits for."""

    def watch(self, fd: int, callback: Callable[[int], None]) -> None:
        """Call `callback(events)` when `fd` is readable or hung up."""

    def unwatch(self, fd: int) -> None:
        """Stop watching `fd`; unknown descriptors are ignored."""


def open_process(pid: int | None) -> int:
    """Return a descriptor that becomes readable when process `pid` ends (a pidfd).

    Returns -1 when the process has ended, or when there is none (None). Raises StateError when that cannot be known
    because no descriptor is left: the process may well be alive.
    """
    if pid is None:
        return -1
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return -1
    except OSError as error:
        if error.errno == errno.EINVAL:
            return -1  # before Linux 6.15: it has ended, and its number is still a group's or a session's
        raise StateError(f"process {pid} cannot be watched, so nothing was changed: {error.strerror}") from None


def inner_pid_of(pid: int) -> int:
    """The number that process `pid` has in its own pid namespace. Raises OSError when it is gone."""
    with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith("NSpid:"):
                return int(line.split()[-1])
    return pid


class Opening(ABC):
    """One open device file of one process."""

    def __init__(
        self, identifier: str, pid: int | None, inner_pid: int, channel: Channel, memory: ProcessMemory
    ) -> None:
        self.id = identifier
        """Unique in the network: `<number base>-<counter>`."""
        self.pid = pid
        """The process's number here; None from a restore until `attach`."""
        self.inner_pid = inner_pid
        """The process's number in its own pid namespace, which it keeps when it moves."""
        self.channel = channel
        self.memory = memory
        self.held = False
        """The NIC has set it aside for a move: its program is frozen, and a closed descriptor is not its end."""
        self.pidfd = -1
        """Becomes readable when the process ends; -1: there is no such descriptor."""

    def open_process(self) -> None:
        """Open `pidfd` unless it is open. It stays -1 when the process has ended. Raises StateError."""
        if self.pidfd < 0:
            self.pidfd = open_process(self.pid)

    def close_process(self) -> None:
        """Close `pidfd` if it is open."""
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1

    @property
    def ended(self) -> bool:
        """Whether `open_process` found that the process has ended."""
        return self.pid is not None and self.pidfd < 0

    def attach(self, pid: int) -> None:
        """The restored program exists again, as process `pid`. Raises StateError when that is not its process."""
        try:
            inner = inner_pid_of(pid)
        except OSError:
            raise StateError(f"there is no process {pid}") from None
        if inner != self.inner_pid:
            raise StateError(f"process {pid} is {inner} inside, not {self.inner_pid}")
        self.pid = self.memory.pid = pid

    @abstractmethod
    def summary(self) -> dict[str, Any]:
        """Plain data for the management socket."""


OpeningT = TypeVar("OpeningT", bound=Opening)


def open_processes(openings: Iterable[Opening]) -> None:
    """Open the descriptor of each opening's process: all of them, or none. Raises StateError."""
    openings = list(openings)
    try:
        for opening in openings:
            opening.open_process()
    except StateError:
        for opening in openings:
            opening.close_process()
        raise


class Openings(ABC, Generic[OpeningT]):
    """All openings of one kind: watches their processes, sets them aside for a move, frees them.

    A subclass says what that means for its kind, in the methods that begin with an underscore.
    """

    def __init__(self, by_id: dict[str, OpeningT], descriptors: Descriptors) -> None:
        """by_id: the table of the openings, which whoever creates them fills."""
        self.by_id = by_id
        self._descriptors = descriptors

    def of(self, pids: set[int]) -> list[OpeningT]:
        """The openings of these processes."""
        return [opening for opening in self.by_id.values() if opening.pid in pids]

    def watch(self, opening: OpeningT) -> None:
        """Serve the opening's doorbell, and drop the opening when its process ends."""
        self._watch_doorbell(opening)
        with contextlib.suppress(StateError):  # without a descriptor: the end of the doorbell's file says so, too
            opening.open_process()
        if opening.pidfd >= 0:
            self._descriptors.watch(opening.pidfd, lambda _: self.drop(opening))

    def stop_watching(self, opening: OpeningT) -> None:
        """Ignore the end of the opening's files and of its process from now on."""
        self._stop_watching_doorbell(opening)
        if opening.pidfd >= 0:
            self._descriptors.unwatch(opening.pidfd)
            opening.close_process()

    def drop(self, opening: OpeningT) -> None:
        """The program closed the opening or ended: free everything that it owned, unless it is held."""
        if opening.held or opening.id not in self.by_id:
            return
        self._before_drop(opening)
        self.stop_watching(opening)
        self._close(opening)

    def hold(self, opening: OpeningT) -> None:
        """The program is frozen: take in what it sent, stop what it owns, and ignore its end."""
        self._before_hold(opening)
        self.stop_watching(opening)
        opening.held = True
        self._stop(opening)

    def unhold(self, opening: OpeningT, source: bytes | None = None) -> None:
        """The program runs again, here: watch it, and let what it owns continue.

        source: the IP address of queue pairs whose own is not here (None: they keep it). Raises StateError, and changes
        nothing, when no descriptor is left to watch the program with.
        """
        opening.open_process()
        opening.held = False
        self._resume(opening, source)
        self.watch(opening)
        if opening.ended:
            self.drop(opening)  # it ended while it was held

    def discard(self, opening: OpeningT) -> None:
        """Free a held opening without a packet: its program lives elsewhere now, or was never resumed here."""
        if opening.id in self.by_id:
            self.stop_watching(opening)
            self._discard(opening)

    def close_all(self) -> None:
        """The NIC ends: free every opening."""
        for opening in list(self.by_id.values()):
            self.stop_watching(opening)
            self._close(opening)

    @abstractmethod
    def _watch_doorbell(self, opening: OpeningT) -> None:
        """Watch its doorbell, whose end of file says that the program closed it."""

    @abstractmethod
    def _stop_watching_doorbell(self, opening: OpeningT) -> None:
        """Ignore its doorbell."""

    def _before_drop(self, opening: OpeningT) -> None:
        """Do what the program still asked for before it went."""

    @abstractmethod
    def _close(self, opening: OpeningT) -> None:
        """Free it as the end of its program asks for."""

    def _before_hold(self, opening: OpeningT) -> None:
        """Take in what the frozen program has sent."""

    @abstractmethod
    def _stop(self, opening: OpeningT) -> None:
        """Nothing that it owns may send, or change the program's memory, from now on."""

    @abstractmethod
    def _resume(self, opening: OpeningT, source: bytes | None) -> None:
        """What it owns may continue."""

    @abstractmethod
    def _discard(self, opening: OpeningT) -> None:
        """Free it without a packet."""
