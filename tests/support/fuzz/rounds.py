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

CORPUS = Path(__file__).parents[2] / "fuzz" / "corpus"
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
    scene: Any = None
    """How the round that runs was set up, as data; None: always the same."""
    steps: list[Any] = field(default_factory=list)
    """What it has done since, as data."""

    def begin(self, scene: Any = None) -> None:
        """A new round."""
        self.scene, self.steps = scene, []

    def row(self) -> str:
        """One line of the summary table."""
        kinds = " ".join(f"{name}={count}" for name, count in self.refusals.most_common(6))
        more = len(self.refusals) - 6
        return f"{self.target:<10} {self.seed:>10} {self.cases:>9} {len(self.failures):>8}  {kinds}" + (
            f" (+{more} kinds)" if more > 0 else ""
        )


HEADING = f"{'target':<10} {'seed':>10} {'cases':>9} {'failures':>8}  refusals by kind"


Replay = Callable[[Any, list[Any], Tally], None]
"""Sets a scene up, does some steps in it, checks everything: what `one_round` does with steps of its own making."""


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


def minimised(steps: list[Any], fails: Callable[[list[Any]], bool]) -> list[Any]:
    """As few of the steps as still fail: halves are left out, then quarters, and so on down to single ones."""
    size = max(len(steps) // 2, 1)
    while steps:
        at = 0
        while at < len(steps):
            fewer = steps[:at] + steps[at + size :]
            if fails(fewer):
                steps = fewer
            else:
                at += size
        if size == 1:
            break
        size //= 2
    return steps


def entry_of(tally: Tally, replay: Replay) -> str:
    """The failed round as a line for the corpus; empty if it cannot be repeated from what it has noted."""
    scene, quiet = tally.scene, Tally(tally.target, tally.seed)

    def fails(steps: list[Any]) -> bool:
        try:
            with watchdog():
                replay(scene, steps, quiet)
        except Exception:
            return True
        return False

    steps = list(tally.steps)
    if not fails(steps):
        return ""
    steps = minimised(steps, fails)
    if isinstance(scene, list):  # of parts, not all of which are needed

        def fails_in(parts: list[Any]) -> bool:
            nonlocal scene
            whole, scene = scene, parts
            if fails(steps):
                return True
            scene = whole
            return False

        minimised(scene, fails_in)
    return json.dumps({"found": "?", "scene": scene, "steps": steps})


def run_rounds(tally: Tally, rounds: int, one: Callable[[random.Random, Tally], None], replay: Replay) -> Tally:
    """Run `one` for `rounds` seeds (seed, seed + 1, …); a failing round is kept, with its seed and made smaller."""
    for number in range(rounds):
        seed = tally.seed + number
        try:
            with watchdog():
                one(random.Random(seed), tally)
        except Exception as error:
            place = "".join(traceback.format_exception(error)[-4:])
            stored = entry_of(tally, replay) or f"cannot be made smaller: --seed {seed} --rounds 1"
            tally.failures.append(f"{tally.target} seed {seed}: {type(error).__name__}: {error}\n{place}{stored}")
            if len(tally.failures) >= 5:
                break
    return tally


def corpus(target: str) -> list[tuple[str, dict[str, Any]]]:
    """The stored inputs of one target: (what was found, {"found", "scene", "steps"}), each as small as it can be."""
    lines = (CORPUS / f"{target}.jsonl").read_text().splitlines()
    return [(entry["found"], entry) for entry in map(json.loads, lines)]
