"""The vertical axis of a sequence diagram: maps seconds to rows, keeps labels apart and shortens long waits."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

LONGEST_WAIT: Final = 3.0
"""Largest number of rows that a wait takes."""


class Point(NamedTuple):
    """A moment that needs a row."""

    when: float
    """Time of the moment in seconds."""
    order: int
    """Order among points with the same time; a point with 2 or more keeps no distance from labels."""
    side: int
    """The end that the point is at. Labels keep a row's distance from labels and arrow tips at the same end only."""
    written: bool
    """Whether the point has a label."""
    put: Callable[[float], None]
    """Called with the row of the point."""


class Axis:
    """The rows of all points, in chronological order."""

    def __init__(self, points: Iterable[Point], rate: float) -> None:
        """rate: rows per second, unless labels need more or a wait gets fewer."""
        self.waits: list[tuple[float, float]] = []
        """(row, milliseconds) of waits that were shortened."""
        self._times: list[float] = []
        self._rows: list[float] = []
        self._labelled: list[tuple[float, float]] = []
        row, previous = 0.0, None
        lowest: dict[int, float] = {}
        for when, order, side, written, put in sorted(points, key=lambda point: (point.when, point.order)):
            wait = when - previous if previous is not None else 0.0
            if wait * rate > LONGEST_WAIT:
                self.waits.append((row + LONGEST_WAIT / 2, wait * 1000))
            row += min(wait * rate, LONGEST_WAIT)
            if written:
                row = max(row, lowest.get(side, row - 1) + 1)
                self._labelled.append((row, when))
            if order < 2:
                lowest[side] = row
            put(row)
            self._times.append(when)
            self._rows.append(row)
            previous = when
        self.height = row + 0.5

    def at(self, when: float) -> float:
        """The row of a time; an end of the axis (−0.5 or `height`) before the first and after the last point."""
        index = bisect.bisect_left(self._times, when)
        if index == len(self._times):
            return self.height
        if self._times[index] == when:
            return self._rows[index]
        if index == 0:
            return -0.5
        t0, t1 = self._times[index - 1], self._times[index]
        r0, r1 = self._rows[index - 1], self._rows[index]
        return r0 + (r1 - r0) * (when - t0) / (t1 - t0)

    def ticks(self, origin: float) -> list[tuple[float, float]]:
        """(row, milliseconds after `origin`) of the times to print at the axis, at least two rows apart."""
        found: list[tuple[float, float]] = []
        for row, when in self._labelled:
            if not found or row >= found[-1][0] + 2:
                found.append((row, (when - origin) * 1000))
        return found
