"""A sequence diagram's vertical axis: seconds become rows, labels keep their distance, long waits are cut short."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

LONGEST_WAIT: Final = 3.0
"""Rows that a wait takes at most."""


class Point(NamedTuple):
    """A moment that needs a row."""

    when: float
    """Seconds."""
    order: int
    """Among those of the same moment; from 2 on it keeps no distance."""
    side: int
    """Labels of two ends may be level, but not within a row of another label, or of an arrow's tip, at the same end."""
    written: bool
    """It has a label."""
    put: Callable[[float], None]
    """Takes the row."""


class Axis:
    """Rows of all points, in the order of time."""

    def __init__(self, points: Iterable[Point], rate: float) -> None:
        """rate: rows per second, where nothing else asks for more or less."""
        self.waits: list[tuple[float, float]] = []
        """(row, milliseconds) of waits that were cut short."""
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
        """The row of a moment; before the first and after the last the ends of the axis (−0.5, `height`)."""
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
        """(row, milliseconds after `origin`) of moments to write at the axis, at least two rows apart."""
        found: list[tuple[float, float]] = []
        for row, when in self._labelled:
            if not found or row >= found[-1][0] + 2:
                found.append((row, (when - origin) * 1000))
        return found
