"""The fuzz targets by name, and how many rounds each gets in CI (all together about three minutes on two cores)."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from tests.fuzz import fuzz_cm, fuzz_commands, fuzz_frames, fuzz_images, fuzz_rings
from tests.support.fuzz.rounds import Replay, Tally


class Target(NamedTuple):
    """One round with a seed; a round from what was noted of one; CI's number of rounds."""

    one_round: Callable[[random.Random, Tally], None]
    replay: Replay
    rounds: int


TARGETS: dict[str, Target] = {
    "frames": Target(fuzz_frames.one_round, fuzz_frames.replay, 1200),
    "commands": Target(fuzz_commands.one_round, fuzz_commands.replay, 2500),
    "images": Target(fuzz_images.one_round, fuzz_images.replay, 250),
    "cm": Target(fuzz_cm.one_round, fuzz_cm.replay, 1500),
    "rings": Target(fuzz_rings.one_round, fuzz_rings.replay, 1500),
}
