"""What the NICs saw of a migration: counters before and after, and the longest gap between completions around it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from testbed.base.errors import TestbedError
from testbed.lab.hosts import Host

GAP_SECONDS = 3.0
"""How long to wait for the first completion after the migration; a program without any has ended or pauses."""
_POLL = 0.02


def counters(host: Host) -> dict[str, int]:
    """The NIC's counters; empty if there is no NIC to ask."""
    try:
        answer = host.call("nic", command="counters", timeout=10)
    except TestbedError:
        return {}
    inner = answer.get("counters", answer)
    return {name: value for name, value in inner.items() if type(value) is int}


def queue_pairs(host: Host, pids: Iterable[int]) -> list[dict[str, Any]]:
    """The queue pairs of these processes, as the host's NIC tells them (`status`); empty if there is no NIC."""
    try:
        contexts = host.call("nic", command="status", timeout=10).get("contexts", [])
    except TestbedError:
        return []
    wanted = set(pids)
    return [qp for context in contexts if context["pid"] in wanted for qp in context.get("qps", [])]


class Gaps:
    """The longest gap between completions at some queue pairs of one host, from `reset` on."""

    def __init__(self, host: Host, qpns: set[int]) -> None:
        self.host = host
        self.qpns = qpns
        self._read: dict[int, dict[str, Any]] = {}

    def reset(self) -> None:
        """Forget gaps of before the migration."""
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
        """The longest gap, waiting until time.monotonic() `until` for a completion after `since` at every queue pair.

        None if no completion came at all: the program does not use completions here, or has ended.
        """
        while True:
            self._ask()
            # A host that has none of the queue pairs has nothing to wait for.
            if all((row.get("last") or 0.0) > since for row in self._read.values()):
                break
            if time.monotonic() >= until:
                break
            time.sleep(_POLL)
        ends = [row for row in self._read.values() if row.get("longest") is not None]
        if not any((row.get("last") or 0.0) > since for row in ends):
            return None
        return round(max(float(row["longest"]) for row in ends) * 1000, 3)
