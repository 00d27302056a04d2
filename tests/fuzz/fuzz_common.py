"""What the fuzz targets share: seeds and counts, the corpus, a watchdog for hangs, and the table of results."""

from __future__ import annotations

import json
import random
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CORPUS = Path(__file__).parent / "corpus"
HANG = 20.0
"""Seconds that one case may take before it counts as a hang (a case takes milliseconds)."""


class Violation(AssertionError):
    """An invariant of a target does not hold."""


@dataclass
class Tally:
    """What one target did: cases, refusals by kind, and the failures (at most a few, each with its seed)."""

    target: str
    seed: int
    cases: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def row(self) -> str:
        """One line of the summary table."""
        kinds = " ".join(f"{name}={count}" for name, count in self.refusals.most_common(6))
        more = len(self.refusals) - 6
        return f"{self.target:<10} {self.seed:>10} {self.cases:>9} {len(self.failures):>8}  {kinds}" + (
            f" (+{more} kinds)" if more > 0 else ""
        )


HEADING = f"{'target':<10} {'seed':>10} {'cases':>9} {'failures':>8}  refusals by kind"


class Hang(Exception):
    """A case did not end in time."""


@contextmanager
def watchdog(seconds: float = HANG) -> Iterator[None]:
    """Raise Hang in the main thread when the body takes longer."""

    def ring(*_: object) -> None:
        raise Hang(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_rounds(tally: Tally, rounds: int, one: Callable[[random.Random, Tally], None]) -> Tally:
    """Run `one` for `rounds` seeds (seed, seed + 1, …); a failing round is kept with its own seed, to be run again."""
    for number in range(rounds):
        seed = tally.seed + number
        try:
            with watchdog():
                one(random.Random(seed), tally)
        except Exception as error:
            place = "".join(traceback.format_exception(error)[-4:])
            tally.failures.append(f"{tally.target} seed {seed}: {type(error).__name__}: {error}\n{place}")
            if len(tally.failures) >= 5:
                break
    return tally


def corpus(target: str) -> list[tuple[str, dict[str, Any]]]:
    """The stored inputs of one target: (file name, content), each a minimised bug or a seed worth keeping."""
    entries = []
    for path in sorted(CORPUS.glob(f"{target}-*.json")):
        entries.append((path.name, json.loads(path.read_text())))
    return entries
