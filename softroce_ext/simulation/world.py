"""A simulated world for the sans-IO core: hosts, a link, and a clock that is a number.

Nothing here sleeps or does input or output. A `World` advances time from one event to the next, and raises `Stuck` when
no event is left.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

from softroce_ext.simulation.hosts import Host, destination_of, ip, ip6
from softroce_ext.simulation.link import Link


class Stuck(AssertionError):
    """The run did not reach the condition that it waited for."""


class World:
    """Hosts on one link. `location` maps an IP address to the host that has it; a migration's reroute changes it."""

    def __init__(self, *hosts: Host, link: Link | None = None) -> None:
        self.hosts = list(hosts)
        self.link = link or Link()
        self.location = {address(host.number): host for host in hosts for address in (ip, ip6)}
        self.now = 1000.0
        self.trace: list[tuple[float, bytes]] = []
        """(time, frame) of every frame that was sent."""
        self._sequence = 0
        self._air: list[tuple[float, int, bytes]] = []
        self._actions: list[tuple[float, int, Callable[[], None]]] = []
        self.after_step: Callable[[], None] | None = None

    def at(self, when: float, action: Callable[[], None]) -> None:
        """Schedule `action` for the time `when`."""
        self._sequence += 1
        heapq.heappush(self._actions, (when, self._sequence, action))

    def send(self, frames: list[bytes]) -> None:
        """Give frames to the link at the current time."""
        for frame in frames:
            self.trace.append((self.now, frame))
            for when, carried in self.link.carry(frame, self.now):
                self._sequence += 1
                heapq.heappush(self._air, (when, self._sequence, carried))

    def step(self, until: float = float("inf")) -> bool:
        """Process everything that is due now; if nothing is, advance the clock to the next event, but not past `until`.

        Returns False when no event is left before `until`.
        """
        due: dict[int, list[bytes]] = {}
        acted = False
        while self._actions and self._actions[0][0] <= self.now:
            heapq.heappop(self._actions)[2]()
            acted = True
        while self._air and self._air[0][0] <= self.now:
            frame = heapq.heappop(self._air)[2]
            host = self.location.get(destination_of(frame))
            if host is not None and host.alive:
                due.setdefault(host.number, []).append(frame)
        worked = acted or bool(due)
        for host in self.hosts:
            if host.alive:
                sent = host.turn(due.get(host.number, []), self.now)
                worked = worked or bool(sent)
                self.send(sent)
        if self.after_step:
            self.after_step()
        if worked:
            return True
        times = [heap[0][0] for heap in (self._air, self._actions) if heap]
        times += [when for host in self.hosts if host.alive and (when := host.engine.next_timer()) is not None]
        if not times or min(times) > until:
            return False
        self.now = max(min(times), self.now + 1e-9)
        return True

    def run(self, until: Callable[[], bool], limit: float = 600.0) -> None:
        """Step until `until()` is true. Raises Stuck if no event is left, or after `limit` seconds of virtual time."""
        end_at = self.now + limit
        while not until():
            if (not self.step() or self.now > end_at) and not until():
                raise Stuck(f"at {self.now:.3f}: {[dict(host.engine.counters) for host in self.hosts]}")

    def settle(self, seconds: float = 1.0) -> None:
        """Step for `seconds` of virtual time."""
        end_at = self.now + seconds
        while self.step(end_at):
            pass
        self.now = end_at
