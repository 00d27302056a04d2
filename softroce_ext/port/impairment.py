"""A seeded bad cable behind the port: frames lost, doubled, swapped, damaged, late; same seed, same faults."""

from __future__ import annotations

import heapq
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True)
class ImpairmentSpec:
    """Probabilities of 0..1 for each frame; `delay` in seconds for every frame."""

    loss: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    corrupt: float = 0.0
    delay: float = 0.0

    @classmethod
    def parse(cls, text: str) -> ImpairmentSpec:
        """From `loss=0.01,delay=0.002`. Raises ValueError naming the part and what is allowed."""
        names = [field.name for field in fields(cls)]
        values: dict[str, float] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            name, _, value = part.partition("=")
            if name not in names:
                raise ValueError(f"impairment {part!r}: unknown name, allowed are {', '.join(names)}")
            try:
                number = float(value)
            except ValueError:
                raise ValueError(f"impairment {part!r}: {value!r} is not a number") from None
            if not 0 <= number <= (10 if name == "delay" else 1):
                limit = "seconds from 0 to 10" if name == "delay" else "a probability from 0 to 1"
                raise ValueError(f"impairment {part!r}: must be {limit}")
            values[name] = number
        return cls(**values)


class Impairment:
    """Takes frames, lets them out when (and if) the bad cable does."""

    REORDER_HOLD = 0.001
    """Seconds that a swapped frame is held back, so that later ones overtake it."""

    def __init__(self, spec: ImpairmentSpec, seed: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.spec = spec
        self._random = random.Random(seed)
        self._clock = clock
        self._heap: list[tuple[float, int, bytes]] = []
        self._order = 0
        self.lost = self.duplicated = self.reordered = self.corrupted = 0

    def take(self, frame: bytes) -> None:
        """One frame enters the cable."""
        spec, chance = self.spec, self._random.random
        # Always the same number of draws for a frame, so that one fault does not shift the others.
        limits = (spec.loss, spec.duplicate, spec.reorder, spec.corrupt)
        lose, double, swap, damage = (chance() < limit for limit in limits)
        position = self._random.randrange(14, max(15, len(frame)))
        if lose:
            self.lost += 1
            return
        if damage:
            self.corrupted += 1
            changed = bytearray(frame)
            changed[position] ^= 1 << self._random.randrange(8)
            frame = bytes(changed)
        when = self._clock() + spec.delay
        if swap:
            self.reordered += 1
            when += self.REORDER_HOLD
        for _ in range(2 if double else 1):
            self._order += 1
            heapq.heappush(self._heap, (when, self._order, frame))
        self.duplicated += double

    def due(self) -> list[bytes]:
        """The frames that come out by now, in their order."""
        now = self._clock()
        out = []
        while self._heap and self._heap[0][0] <= now:
            out.append(heapq.heappop(self._heap)[2])
        return out

    def next_time(self) -> float | None:
        """When the next frame comes out, or None."""
        return self._heap[0][0] if self._heap else None
