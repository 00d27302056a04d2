"""Invariant: every stored bug stays mended, and each target's CI budget finds no violation (see each fuzz_*.py)."""

from __future__ import annotations

import random

import pytest
from fuzz_common import HEADING, Tally, corpus, run_rounds, watchdog
from targets import TARGETS

SEED = 20260


def _stored() -> list[tuple[str, str, int]]:
    return [(name, target, entry["seed"]) for target in TARGETS for name, entry in corpus(target)]


@pytest.mark.parametrize(("name", "target", "seed"), _stored(), ids=[name for name, _, _ in _stored()])
def test_corpus(name: str, target: str, seed: int) -> None:
    """Rounds that once failed."""
    with watchdog():
        TARGETS[target].one_round(random.Random(seed), Tally(target, seed))


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_budget(target: str) -> None:
    tally = run_rounds(Tally(target, SEED), TARGETS[target].rounds, TARGETS[target].one_round)
    print("\n" + HEADING + "\n" + tally.row())
    assert tally.cases and tally.refusals, "a target that refuses nothing tests nothing"
    assert not tally.failures, "\n".join(tally.failures)
