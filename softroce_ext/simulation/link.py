"""The network of a simulated world: the seeded impairment of `softroce_ext.port.impairment` in virtual time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

from softroce_ext.port.impairment import FaultInjector, ImpairmentSpec


@dataclass
class Link:
    """One network between all hosts of a world. The fields from `loss` to `queue` are those of `ImpairmentSpec`."""

    seed: int = 0
    loss: float = 0.0
    reorder: float = 0.0
    duplicate: float = 0.0
    corrupt: float = 0.0
    delay: float = 10e-6
    spacing: float = 0.0
    """Seconds between frames; when it is not 0, they arrive one at a time instead of in batches."""
    drop: Callable[[bytes], bool] | None = None
    """Selects frames to lose on purpose, before the seeded impairment is applied."""
    rate: float = 0.0
    queue: int = 0
    jitter: float = 0.0
    log: list[tuple[float, str, bytes]] | None = None
    """If a list, receives (time, fate, frame) of every frame and copy, as `FaultInjector.observe` reports them."""

    def __post_init__(self) -> None:
        spec = ImpairmentSpec(
            self.loss,
            self.duplicate,
            self.reorder,
            self.corrupt,
            self.delay,
            self.jitter,
            self.spacing,
            self.rate,
            self.queue,
            hold=10 * self.delay,
        )
        self.keeps_order = spec.keeps_order
        self._injector = FaultInjector(spec, self.seed, observe=None if self.log is None else self._observe)
        self._dropped = 0

    @property
    def faults(self) -> dict[str, int]:
        """Number of frames affected, by name of the fault; faults that never occurred are left out."""
        counts = asdict(self._injector.faults) | {"dropped": self._dropped}
        return {name: count for name, count in counts.items() if count}

    def carry(self, frame: bytes, now: float) -> list[tuple[float, bytes]]:
        """(arrival time, bytes) of each copy of a frame that is sent at `now`; empty if it is lost."""
        if self.drop is not None and self.drop(frame):
            self._dropped += 1
            self._observe(now, "dropped", frame)
            return []
        return [(when, carried) for when, carried, _ in self._injector.carry(frame, now)]

    def _observe(self, now: float, fate: str, frame: bytes) -> None:
        if self.log is not None:
            self.log.append((now, fate, frame))
