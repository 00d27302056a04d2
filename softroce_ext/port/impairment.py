"""A seeded bad link: frames are lost, duplicated, reordered, corrupted, delayed; one seed always gives the same faults.

`FaultInjector` decides what happens to each frame and when it arrives; it knows no clock and holds no frame. The NIC's
port and the relay of the interoperation tests put a queue behind it (`Impairment`), the simulator its own calendar, so
that all three mean the same by each word:

* *loss*: the frame does not arrive.
* *duplicate*: it arrives twice; each copy has faults of its own.
* *reorder*: it is held back, so that later frames overtake it.
* *corrupt*: one bit behind the Ethernet header is flipped.
* *delay*, *jitter*: every frame takes this long, and up to that much longer.
* *rate*, *queue*: a frame takes its length divided by the rate; what finds the queue full is lost.
"""

from __future__ import annotations

import heapq
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

_ETHERNET_BYTES = 14

COMMAND_LINE = ("loss", "duplicate", "reorder", "corrupt", "delay")
"""The fields that a command line or a topology may set."""


@dataclass(frozen=True, slots=True)
class ImpairmentSpec:
    """What a link does to its frames. Probabilities (0 to 1) are for each frame, times are in seconds."""

    loss: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    corrupt: float = 0.0
    delay: float = 0.0
    jitter: float = 0.0
    spacing: float = 0.0
    """Seconds between two frames on the wire, whatever their length."""
    rate: float = 0.0
    """Bit/s; 0: without limit."""
    queue: int = 0
    """Bytes that may wait for the wire; 0: without limit."""
    hold: float = 0.001
    """A reordered frame is held back for a random time between a tenth of this and all of it."""
    hold_frames: int = 0
    """It is let go as soon as this many later frames have passed; 0: only time counts. (`Impairment` only.)"""

    @classmethod
    def parse(cls, text: str) -> ImpairmentSpec:
        """From `loss=0.01,delay=0.002`. Raises ValueError naming the part and what is allowed."""
        values: dict[str, float] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            name, _, value = part.partition("=")
            if name not in COMMAND_LINE:
                raise ValueError(f"impairment {part!r}: unknown name, allowed are {', '.join(COMMAND_LINE)}")
            try:
                number = float(value)
            except ValueError:
                raise ValueError(f"impairment {part!r}: {value!r} is not a number") from None
            if not 0 <= number <= (10 if name == "delay" else 1):
                limit = "seconds from 0 to 10" if name == "delay" else "a probability from 0 to 1"
                raise ValueError(f"impairment {part!r}: must be {limit}")
            values[name] = number
        return replace(cls(), **values)  # type: ignore[arg-type]

    @property
    def keeps_order(self) -> bool:
        """Whether every frame arrives at most once and in the order in which it was sent."""
        return not (self.reorder or self.duplicate or self.jitter)


@dataclass(slots=True)
class Faults:
    """How many frames each fault befell, duplicates counted as frames of their own."""

    lost: int = 0
    duplicated: int = 0
    reordered: int = 0
    corrupted: int = 0
    overflowed: int = 0
    """Found the queue full."""


Arrival = tuple[float, bytes, bool]
"""When a frame arrives, its bytes, and whether it was held back to be reordered."""


@dataclass
class FaultInjector:
    """Decides the fate of frames, one after the other. Same `spec`, seed and frames: same fates."""

    spec: ImpairmentSpec
    seed: int = 0
    faults: Faults = field(default_factory=Faults)
    observe: Callable[[float, str, bytes], None] | None = None
    """Called with (time, fate, frame) for each frame and copy: the name of a field of `Faults`, or "" for no fault."""

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._free_at = 0.0

    def carry(self, frame: bytes, now: float) -> list[Arrival]:
        """The arrivals of a frame that is sent at `now`: none when it is lost, two when it is duplicated."""
        spec, chance = self.spec, self._random.random
        # The same number of draws for every frame, so that one fault does not shift the others.
        lose, duplicate = chance() < spec.loss, chance() < spec.duplicate
        fates = [tuple(chance() for _ in range(6)) for _ in range(2)]
        if lose:
            self.faults.lost += 1
            self._observed(now, "lost", frame)
            return []
        start = max(now, self._free_at)
        if spec.queue and (start - now) * spec.rate / 8 > spec.queue:
            self.faults.overflowed += 1
            self._observed(now, "overflowed", frame)
            return []
        self._free_at = sent = start + spec.spacing + (8 * len(frame) / spec.rate if spec.rate else 0.0)
        arrivals = []
        for copy in range(2 if duplicate else 1):
            reorder, corrupt, byte, bit, held, late = fates[copy]
            fate = "duplicated" if copy else ""
            if copy:
                self.faults.duplicated += 1
            when = sent + spec.delay + spec.jitter * late
            if reorder < spec.reorder:
                self.faults.reordered += 1
                fate = "reordered"
                when += spec.hold * (0.1 + 0.9 * held)
            carried = frame
            if corrupt < spec.corrupt:
                self.faults.corrupted += 1
                fate = "corrupted"
                carried = _flip(frame, byte, int(8 * bit))
            self._observed(now, fate, frame)
            arrivals.append((when, carried, reorder < spec.reorder))
        return arrivals

    def _observed(self, now: float, fate: str, frame: bytes) -> None:
        if self.observe is not None:
            self.observe(now, fate, frame)


def _flip(frame: bytes, where: float, bit: int) -> bytes:
    """The frame with one bit changed, `where` (0 to 1) of the way between the Ethernet header and the end."""
    changed = bytearray(frame)
    position = _ETHERNET_BYTES + int(where * (len(frame) - _ETHERNET_BYTES))
    changed[min(position, len(frame) - 1)] ^= 1 << bit
    return bytes(changed)


class Impairment:
    """The queue behind a fault injector: takes frames, and gives them back when the bad link delivers them."""

    def __init__(self, spec: ImpairmentSpec, seed: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.injector = FaultInjector(spec, seed)
        self.faults = self.injector.faults
        self._clock = clock
        self._heap: list[tuple[float, int, bytes]] = []
        self._order = 0
        self._held: list[tuple[int, float, bytes]] = []
        """Reordered frames: (later frames that have still to pass, when it is let go in any case, frame)."""

    def take(self, frame: bytes) -> None:
        """Take one frame that is sent now."""
        now = self._clock()
        after = self.injector.spec.hold_frames
        held, self._held = self._held, []
        for when, carried, reordered in self.injector.carry(frame, now):
            if reordered and after:
                self._held.append((after, when, carried))
            else:
                self._push(when, carried)
        for left, when, late in held:
            if left > 1:
                self._held.append((left - 1, when, late))
            else:
                self._push(now, late)

    def _push(self, when: float, frame: bytes) -> None:
        self._order += 1
        heapq.heappush(self._heap, (when, self._order, frame))

    def due(self) -> list[bytes]:
        """The frames that have arrived by now, in the order of their arrival."""
        now = self._clock()
        for entry in [entry for entry in self._held if entry[1] <= now]:
            self._held.remove(entry)
            self._push(entry[1], entry[2])
        out = []
        while self._heap and self._heap[0][0] <= now:
            out.append(heapq.heappop(self._heap)[2])
        return out

    def next_time(self) -> float | None:
        """When the next frame arrives at the latest, or None."""
        times = [when for _, when, _ in self._held]
        if self._heap:
            times.append(self._heap[0][0])
        return min(times, default=None)
