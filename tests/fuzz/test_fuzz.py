"""Invariant: every stored bug stays fixed, and each target's CI budget finds no violation (see each fuzz_*.py)."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from tests.fuzz.targets import TARGETS
from tests.support.fuzz.rounds import HEADING, Tally, corpus, minimised, run_rounds, watchdog

SEED = 20260


STORED = [(target, entry) for target in TARGETS for _, entry in corpus(target)]


@pytest.mark.parametrize(("target", "entry"), STORED, ids=[f"{target}: {entry['found']}" for target, entry in STORED])
def test_corpus(target: str, entry: dict[str, Any]) -> None:
    """What once failed."""
    with watchdog():
        TARGETS[target].replay(entry["scene"], entry["steps"], Tally(target, 0))


@pytest.mark.parametrize("target", TARGETS)
def test_a_round_is_repeated_by_what_it_noted(target: str) -> None:
    """The same steps and the same refusals: else a failure could not be stored."""
    first, second = Tally(target, 0), Tally(target, 0)
    TARGETS[target].one_round(random.Random(5), first)
    noted = json.loads(json.dumps({"scene": first.scene, "steps": first.steps}))
    TARGETS[target].replay(noted["scene"], noted["steps"], second)
    assert second.steps == noted["steps"]
    if target not in ("images", "rings"):  # notes the last of its cases; counts deeds by name when it makes them up
        assert (second.cases, second.refusals) == (first.cases, first.refusals)


def test_as_few_steps_as_still_fail() -> None:
    steps = minimised(list(range(100)), lambda steps: 17 in steps and 63 in steps)
    assert steps == [17, 63]


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_budget(target: str) -> None:
    tally = run_rounds(Tally(target, SEED), TARGETS[target].rounds, TARGETS[target].one_round, TARGETS[target].replay)
    print("\n" + HEADING + "\n" + tally.row())
    assert tally.cases and tally.refusals, "a target that refuses nothing tests nothing"
    assert not tally.failures, "\n".join(tally.failures)
