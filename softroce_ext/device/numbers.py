"""Numbers: handles of one user context, and the QPNs and keys of one NIC.

Each NIC allocates from a range of its own (`base`), so a queue pair or region keeps its number when it moves to another
NIC of the same network (MigrOS, section 4.2).
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Set
from heapq import heappop, heappush

from softroce_ext.device.errors import VerbsError

RANGE = 65536
"""Numbers of each kind that one base has."""
MAX_BASE = 255
FIRST_QPN = 16
"""0 and 1 are special, and rxe starts at 16 as well."""


class Handles:
    """Small numbers with reuse of the smallest free one, as the kernel's uobject table. Not below 1."""

    def __init__(self, limit: int = RANGE - 1) -> None:
        self._limit = limit
        self._next = 1
        self._free: list[int] = []

    def check(self) -> None:
        """Raise VerbsError(ENOMEM) when all are taken."""
        if not self._free and self._next > self._limit:
            raise VerbsError(errno.ENOMEM, f"more than {self._limit} objects in one user context")

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
        """Restart with exactly these numbers taken (a restore)."""
        taken = set(numbers)
        self._next = max(taken, default=0) + 1
        self._free = sorted(set(range(1, self._next)) - taken)


class Range:
    """Numbers of one kind in a NIC's own range; a number is not reused before all others have been.

    A late packet or a stale key of a destroyed object then finds nothing, instead of its successor.
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


class NumberPool(Set[int]):
    """The numbers of one kind that are in use, as a set.

    A number that moved here keeps its value, which another object may have already: it is free once no object has it.
    """

    def __init__(self, numbers: Range, limit: int, what: str) -> None:
        """limit: how many may be in use at a time; what: the kind, for the error text."""
        self._numbers = numbers
        self._limit = limit
        self._what = what
        self._users: Counter[int] = Counter()

    def take(self) -> int:
        """Return a number that no object has. Raises VerbsError(ENOMEM)."""
        if len(self._users) >= self._limit:
            raise VerbsError(errno.ENOMEM, f"too many {self._what}")
        return self._numbers.take(self._users)

    def claim(self, number: int) -> None:
        """An object has this number now."""
        self._users[number] += 1

    def give_back(self, number: int) -> None:
        """An object that had this number is gone."""
        self._users[number] -= 1
        if self._users[number] <= 0:
            del self._users[number]

    def __contains__(self, number: object) -> bool:
        return number in self._users

    def __iter__(self) -> Iterator[int]:
        return iter(self._users)

    def __len__(self) -> int:
        return len(self._users)
