"""Numbers: handles of one context, and the QPNs and keys of one NIC.

Each NIC allocates from a range of its own (`base`), so a queue pair or region keeps its number when it moves to another
NIC of the same network (MigrOS, section 4.2).
"""

from __future__ import annotations

import errno
from collections.abc import Container, Iterable
from heapq import heappop, heappush

from softroce_ext.device.errors import VerbsError

RANGE = 65536
"""Numbers of each kind that one base has."""
MAX_BASE = 255
FIRST_QPN = 16
"""0 and 1 are special, and rxe begins at 16 as well."""


class Handles:
    """Small numbers with reuse of the smallest free one, as the kernel's uobject table. Not below 1."""

    def __init__(self, limit: int = RANGE - 1) -> None:
        self._limit = limit
        self._next = 1
        self._free: list[int] = []

    def check(self) -> None:
        """Raise VerbsError(ENOMEM) when all are taken."""
        if not self._free and self._next > self._limit:
            raise VerbsError(errno.ENOMEM, f"more than {self._limit} objects in one context")

    def take(self) -> int:
        """Return a free number. Raises VerbsError(ENOMEM) when all are taken."""
        self.check()
        if self._free:
            return heappop(self._free)
        number = self._next
        self._next += 1
        return number

    def give_back(self, number: int) -> None:
        """Make `number` free again."""
        heappush(self._free, number)

    def claim(self, numbers: Iterable[int]) -> None:
        """Begin anew with exactly these numbers taken (a restore)."""
        taken = set(numbers)
        self._next = max(taken, default=0) + 1
        self._free = sorted(set(range(1, self._next)) - taken)


class Range:
    """Numbers of one kind in a NIC's own range; a number is not reused before the range has been gone round.

    A late packet or a stale key of a dead object then meets nobody, instead of its successor.
    """

    def __init__(self, base: int, first: int = 1, size: int = RANGE - FIRST_QPN) -> None:
        if not 0 <= base <= MAX_BASE:
            raise ValueError(f"number base {base} is not in 0..{MAX_BASE}")
        self._start = base * RANGE
        self._first = first
        self._size = size
        self._next = 0

    def take(self, taken: Container[int]) -> int:
        """Return a number that is not in `taken`. Raises VerbsError(ENOMEM) when the range is exhausted."""
        for _ in range(self._size):
            number = self._start + self._first + self._next
            self._next = (self._next + 1) % self._size
            if number not in taken:
                return number
        raise VerbsError(errno.ENOMEM, f"all {self._size} numbers of this NIC are in use")
