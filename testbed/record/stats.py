"""Medians with bootstrap intervals, and paired ratios: the only statistics this project reports.

Medians and the percentile bootstrap are used because run times have long upper tails (a scheduler tick, a page fault),
which a mean and a normal interval would describe instead. Resampling is seeded: the same samples give the same
interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

RESAMPLES = 9_999
CONFIDENCE = 0.95


class Estimate(BaseModel):
    """The median of n samples and its 95 % bootstrap interval, in the unit of the samples."""

    model_config = ConfigDict(extra="forbid")

    n: int = Field(ge=1, description="number of samples")
    median: float = Field(description="sample median")
    low: float | None = Field(description="lower end of the 95 % interval; null when n < 2")
    high: float | None = Field(description="upper end of the 95 % interval; null when n < 2")
    values: list[float] = Field(description="the samples, in the order they were taken")

    def text(self, unit: str = "", digits: int = 3) -> str:
        """The estimate as text, such as `12.3 ms [11.8, 13.0] n=5`, with `digits` significant digits."""
        tail = f" {unit}" if unit else ""
        middle = f"{significant(self.median, digits)}{tail}"
        if self.low is None or self.high is None:
            return f"{middle} (n={self.n}, no interval)"
        return f"{middle} [{significant(self.low, digits)}, {significant(self.high, digits)}] n={self.n}"


def significant(value: float, digits: int = 3) -> str:
    """Plain decimal notation with `digits` significant digits and no exponent: 1234 → `1230`, 0.01234 → `0.0123`."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{Decimal(f'{value:.{digits - 1}e}'):f}"


def estimate(samples: Sequence[float], *, seed: int = 0) -> Estimate:
    """Median and 95 % percentile-bootstrap interval. Raises ValueError if there are no samples or one is not finite."""
    values = [float(sample) for sample in samples]
    if not values:
        raise ValueError("no samples; a median needs at least one")
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"samples must be finite numbers: {values}")
    if len(values) < 2:
        return Estimate(n=1, median=values[0], low=None, high=None, values=values)
    data = np.asarray(values)
    picks = np.random.default_rng(seed).integers(0, len(values), size=(RESAMPLES, len(values)))
    medians = np.median(data[picks], axis=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(medians, [tail, 1 - tail])
    return Estimate(n=len(values), median=float(np.median(data)), low=float(low), high=float(high), values=values)


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float], *, seed: int = 0) -> Estimate:
    """The median of a[i] / b[i]. The samples of a pair were taken one after the other, so slow drift cancels out.

    Raises ValueError for sequences of different lengths, a denominator of zero, and as `estimate` does.
    """
    if len(numerators) != len(denominators):
        raise ValueError(f"{len(numerators)} numerators but {len(denominators)} denominators; pairs are needed")
    if any(value == 0 for value in denominators):
        raise ValueError(f"denominators must not be zero: {list(denominators)}")
    return estimate([a / b for a, b in zip(numerators, denominators, strict=True)], seed=seed)


def over_runs(runs: Sequence[Mapping[str, Any]], *, seed: int = 0) -> dict[str, Estimate]:
    """One estimate for each measurement of a migration that at least one run has.

    `runs` are summaries as plain data; the result's keys are paths, such as `migrations[0].phases_ms.freeze`.
    """
    samples: dict[str, list[float]] = {}

    def collect(path: str, value: object, keep: Callable[[str], bool]) -> None:
        if isinstance(value, bool):
            return
        if isinstance(value, int | float) and keep(path):
            samples.setdefault(path, []).append(float(value))
        elif isinstance(value, Mapping):
            for key, inner in value.items():
                collect(f"{path}.{key}", inner, keep)

    for run in runs:
        for index, migration in enumerate(run.get("migrations", [])):
            if migration.get("ok"):
                collect(f"migrations[{index}]", migration, lambda path: path.rpartition(".")[2] not in NOT_MEASURED)
    return {path: estimate(values, seed=seed) for path, values in sorted(samples.items())}


NOT_MEASURED = frozenset({"index", "app_exit_code", "at_s"})
"""Fields of a migration that are numbers but not measurements."""
