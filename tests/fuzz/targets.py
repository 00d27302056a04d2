"""The fuzz targets by name, and how many rounds each gets in CI (all together about three minutes on two cores)."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

import fuzz_frames
from fuzz_common import Tally


class Target(NamedTuple):
    """One round with a seed; CI's number of rounds."""

    one_round: Callable[[random.Random, Tally], None]
    rounds: int


TARGETS: dict[str, Target] = {
    "frames": Target(fuzz_frames.one_round, 1200),
}
