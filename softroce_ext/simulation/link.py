"""A bad network, seeded: with bandwidth, delay and a queue; it loses, doubles, spoils and reorders frames."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Link:
    """The network: delivers to whoever has the destination address; impairments are probabilities per frame."""

    seed: int = 0
    loss: float = 0.0
    reorder: float = 0.0
    duplicate: float = 0.0
    corrupt: float = 0.0
    delay: float = 10e-6
    spacing: float = 0.0
    """Seconds between two frames on the wire: with some, frames arrive one by one instead of in batches."""
    drop: Callable[[bytes], bool] | None = None
    """Besides: frames to lose on purpose."""
    bandwidth: float = 0.0
    """Bit/s; 0: without limit."""
    queue: int = 0
    """Bytes that may wait for the wire; what comes then is lost. 0: without limit."""
    jitter: float = 0.0
    """Seconds; each frame's delay is longer by up to that (and frames may overtake each other)."""
    log: list[tuple[float, str, bytes]] | None = None
    """When it is a list: what became of each frame."""
    faults: dict[str, int] = field(default_factory=dict)
    """How many frames each fault befell."""
    random: random.Random = field(init=False)
    _free_at: float = 0.0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def carry(self, frame: bytes, now: float) -> list[tuple[float, bytes]]:
        """When, and as what, a frame arrives."""
        if self.drop and self.drop(frame):
            return self._fate(now, "dropped", frame)
        chance = self.random.random
        if chance() < self.loss:
            return self._fate(now, "lost", frame)
        copies = 2 if chance() < self.duplicate else 1
        wire = self.spacing + (8 * len(frame) / self.bandwidth if self.bandwidth else 0.0)
        start = max(now, self._free_at)
        if self.queue and (start - now) * self.bandwidth / 8 > self.queue:
            return self._fate(now, "overflowed", frame)
        sent, now = now, start + wire
        self._free_at = now
        arrivals = []
        for copy in range(copies):
            late = chance() < self.reorder
            delay = self.delay * (1 + (10 * chance() if late else 0))
            if self.jitter:
                delay += self.jitter * chance()
            carried = frame
            corrupt = chance() < self.corrupt
            if corrupt:
                spoiled = bytearray(frame)
                spoiled[self.random.randrange(14, len(frame))] ^= 1 << self.random.randrange(8)
                carried = bytes(spoiled)
            self._fate(sent, "corrupted" if corrupt else "duplicated" if copy else "late" if late else "", frame)
            arrivals.append((now + delay, carried))
        return arrivals

    def _fate(self, now: float, fate: str, frame: bytes) -> list[tuple[float, bytes]]:
        if fate:
            self.faults[fate] = self.faults.get(fate, 0) + 1
        if self.log is not None:
            self.log.append((now, fate, frame))
        return []
