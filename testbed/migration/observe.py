"""What the NICs saw of a migration: growth of their counters, and the longest gaps between completions."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from testbed.base.errors import TestbedError
from testbed.lab.hosts import Host

GAP_SECONDS = 3.0
"""Longest wait for the first completion after the migration; a program without one has ended or pauses."""
_POLL = 0.02


class Growth:
    """What the NICs have counted since construction; read when the migration is over by `finish`."""

    def __init__(self, hosts: Mapping[str, Host]) -> None:
        self._hosts = hosts
        self._before = {name: counters(host) for name, host in hosts.items()}
        self._after: dict[str, dict[str, int]] = {}

    def finish(self) -> None:
        """Read the counters again."""
        self._after = {name: counters(host) for name, host in self._hosts.items() if host.alive}

    def of(self, host: str, counter: str) -> int | None:
        """Growth of one counter of a host's NIC; None if the NIC could not be asked."""
        after = self._after.get(host)
        # A NIC lists only what it has counted, so a missing counter is 0; an empty list means that it was not asked.
        return after.get(counter, 0) - self._before[host].get(counter, 0) if after else None

    def total(self, counter: str) -> int | None:
        """Growth of a counter over all NICs that could be asked; None if there was none."""
        found = [count for host in self._after if (count := self.of(host, counter)) is not None]
        return sum(found) if found else None


def counters(host: Host) -> dict[str, int]:
    """The NIC's counters; empty if no NIC answers."""
    try:
        answer = host.call("nic", command="counters", timeout=10)
    except TestbedError:
        return {}
    inner = answer.get("counters", answer)
    return {name: value for name, value in inner.items() if type(value) is int}


def queue_pairs(host: Host, pids: Iterable[int]) -> list[dict[str, Any]]:
    """The queue pairs of these processes, as the status of the host's NIC lists them; empty if no NIC answers."""
    try:
        contexts = host.call("nic", command="status", timeout=10).get("contexts", [])
    except TestbedError:
        return []
    wanted = set(pids)
    return [qp for context in contexts if context["pid"] in wanted for qp in context.get("qps", [])]


class Blackout(NamedTuple):
    """How long a migration interrupted the traffic, in milliseconds; None where it could not be measured."""

    program: float | None = None
    measured: Literal["completions", "phases"] | None = None
    """How `program` was measured: by the program's completions, or from freeze to thaw."""
    peer: float | None = None
    """The longest gap at a peer of the program."""


class Gaps:
    """The longest gap between completions at some queue pairs of one host, since `reset`."""

    def __init__(self, host: Host, qpns: set[int]) -> None:
        self.host = host
        self.qpns = qpns
        self._read: dict[int, dict[str, Any]] = {}

    def reset(self) -> None:
        """Discard the gaps before the migration."""
        self._ask(reset=True)
        self._read.clear()

    def _ask(self, reset: bool = False) -> None:
        try:
            answer = self.host.call("nic", command="gaps", reset=reset, timeout=10)
        except TestbedError:
            return
        for context in answer.get("contexts", []):
            for row in context.get("qps", []):
                if row["qpn"] in self.qpns:
                    self._read[row["qpn"]] = row

    def longest_ms(self, since: float, until: float) -> float | None:
        """Wait until `until` for a completion after `since` at every queue pair, and return the longest gap.

        Both are in time.monotonic(). None if no completion came: the program uses none here, or has ended.
        """
        while True:
            self._ask()
            # There is nothing to wait for at a host that has none of the queue pairs.
            if all((row.get("last") or 0.0) > since for row in self._read.values()):
                break
            if time.monotonic() >= until:
                break
            time.sleep(_POLL)
        ends = [row for row in self._read.values() if row.get("longest") is not None]
        if not any((row.get("last") or 0.0) > since for row in ends):
            return None
        return round(max(float(row["longest"]) for row in ends) * 1000, 3)
