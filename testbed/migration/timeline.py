"""When each phase of a migration began and ended: reported by the agents, or measured here.

Agents and testbed share one machine and so one CLOCK_MONOTONIC; all times are time.monotonic() seconds.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

from testbed.record.summary import BLACKOUT_PHASES, PHASES, Phase

Emit = Callable[..., None]
"""The type of RunFolder.event."""


class Timeline:
    """The phases of one migration. `listen` is called from the hosts' reader threads."""

    def __init__(self, migration: str, index: int, emit: Emit) -> None:
        self._migration = migration
        self._index = index
        self._emit = emit
        self._lock = threading.Lock()
        self.began: dict[Phase, float] = {}
        self.ended: dict[Phase, float] = {}
        self.resumed = False
        """The destination's NIC was asked to resume: since then, peers may have been answered from there."""

    def listen(self, _host: str, event: Mapping[str, Any]) -> None:
        """Take the events `migration_phase` and `migration_resumed` of this migration, and ignore all others."""
        if event.get("migration") != self._migration:
            return
        if event["event"] == "migration_resumed":
            self.resumed = True
        elif event["event"] == "migration_phase" and event["phase"] in PHASES:
            phase = cast(Phase, event["phase"])
            if "ended" in event:
                self._end(phase, event["began"], event["ended"])
            else:
                self._begin(phase, event["began"])

    @contextlib.contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Measure a phase that the testbed carries out itself; it has ended only if it succeeds."""
        began = time.monotonic()
        self._begin(phase, began)
        yield
        self._end(phase, began, time.monotonic())

    def _begin(self, phase: Phase, at: float) -> None:
        with self._lock:
            self.began[phase] = at
        self._emit("phase_started", at=at, index=self._index, phase=phase)

    def _end(self, phase: Phase, began: float, ended: float) -> None:
        with self._lock:
            self.began[phase] = began
            self.ended[phase] = ended
        self._emit("phase_finished", at=ended, index=self._index, phase=phase, ms=_ms(ended - began))

    @property
    def unfinished(self) -> Phase | None:
        """The phase that began last of those that have not ended: the one that failed."""
        with self._lock:
            open_phases = [phase for phase in self.began if phase not in self.ended]
            return max(open_phases, key=lambda phase: self.began[phase], default=None)

    def lengths_ms(self) -> dict[Phase, float]:
        """The length of each phase that has ended, in the order of the phases."""
        with self._lock:
            return {phase: _ms(self.ended[phase] - self.began[phase]) for phase in PHASES if phase in self.ended}

    def starts_ms(self, origin: float) -> dict[Phase, float]:
        """The start of each phase that has ended, relative to `origin`."""
        with self._lock:
            return {phase: _ms(self.began[phase] - origin) for phase in PHASES if phase in self.ended}

    def frozen_ms(self) -> float | None:
        """From the start of freeze to the end of thaw; None if one of them did not take place."""
        with self._lock:
            first, last = BLACKOUT_PHASES[0], BLACKOUT_PHASES[-1]
            if first not in self.began or last not in self.ended:
                return None
            return _ms(self.ended[last] - self.began[first])


def _ms(seconds: float) -> float:
    """Convert to milliseconds, rounded to microseconds."""
    return round(seconds * 1000, 3)
