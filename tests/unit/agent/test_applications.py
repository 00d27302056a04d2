"""Applications of a run, with hosts played by the test.

Invariants: none starts before those in its `after` are ready; each ends exactly once in the record; a failure is laid
at the door of the one that failed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from testbed.base.errors import BadInput, RunFailed
from testbed.lab import applications as module
from testbed.lab.applications import Applications
from testbed.record.folder import RunFolder
from testbed.topology import parse, resolve

TOPOLOGY = """
name: t
hosts: {{h1: {{}}, h2: {{}}, h3: {{}}}}
switches: [s1]
links: [[h1, s1], [h2, s1], [h3, s1]]
apps: {apps}
"""


class PlayedHost:
    """Answers like an agent. `ready[name]` is what wait_app_ready says, after `delay[name]` seconds."""

    def __init__(self, name: str, journal: list[str]) -> None:
        self.name = name
        self.journal = journal
        self.ready: dict[str, dict[str, Any]] = {}
        self.delay: dict[str, float] = {}
        self.logs: dict[str, str] = {}
        self.refuse: dict[str, Exception] = {}
        self.killed: Callable[[str], None] = lambda name: None
        self.alive = True
        self.before_ready: Callable[[], object] = lambda: None

    def call(self, op: str, *, timeout: float | None = None, **arguments: Any) -> dict[str, Any]:
        name = arguments["name"]
        if op == "start_app":
            if name in self.refuse:
                raise self.refuse[name]
            self.journal.append(f"start {name}")
            return {"init": 1}
        if op == "wait_app_ready":
            self.before_ready()
            time.sleep(self.delay.get(name, 0.0))
            self.journal.append(f"ready {name}")
            return self.ready.get(name, {"listening": [18515], "ended": None})
        if op == "signal_app":
            self.journal.append(f"kill {name}")
            self.killed(name)
            return {"sent": True}
        return {"text": self.logs.get(f"{name}.{arguments['stream']}", ""), "size": 0}


class World:
    def __init__(self, folder: RunFolder, apps: str) -> None:
        self.journal: list[str] = []
        self.hosts = {name: PlayedHost(name, self.journal) for name in ("h1", "h2", "h3")}
        topology = resolve(parse(TOPOLOGY.format(apps=apps), "t.yaml"))
        self.apps = Applications(topology, self.hosts, folder)  # type: ignore[arg-type]
        for host in self.hosts.values():
            host.killed = partial(self._killed, host.name)

    def _killed(self, host: str, name: str) -> None:
        self.exited(host, name, signal=9)

    def exited(self, host: str, name: str, **how: Any) -> None:
        self.apps.on_event(host, {"event": "app_exited", "app": name, "t": time.monotonic(), **how})


@pytest.fixture
def world(tmp_path: Path) -> Any:
    with RunFolder.create("t", seed=0, root=tmp_path) as folder:
        yield lambda apps: World(folder, apps)


def test_order_is_that_of_after(world: Any) -> None:
    w = world(
        "{c: {host: h3, command: x, after: [a, b]}, a: {host: h1, command: x}, b: {host: h2, command: x, after: a}}"
    )
    w.hosts["h1"].delay["a"] = w.hosts["h2"].delay["b"] = 0.05
    w.apps.start_all()
    assert w.journal == ["start a", "ready a", "start b", "ready b", "start c"]


def test_independent_ones_start_at_the_same_time(world: Any) -> None:
    w = world(
        "{a: {host: h1, command: x}, b: {host: h2, command: x},"
        " c: {host: h3, command: x, after: a}, d: {host: h3, command: x, after: b}}"
    )
    both = threading.Barrier(2, timeout=10)  # each readiness waits for the other: one after the other would break it
    w.hosts["h1"].before_ready = w.hosts["h2"].before_ready = both.wait
    w.apps.start_all()
    assert all(app.running for app in w.apps.all.values())


def test_predecessor_that_fails_is_to_blame(world: Any) -> None:
    w = world("{a: {host: h1, command: x}, b: {host: h2, command: x, after: a}}")
    w.hosts["h1"].ready["a"] = {"listening": [], "ended": {"code": 1}}
    w.hosts["h1"].logs["a.stderr"] = "first\nno such device\n"
    with pytest.raises(RunFailed, match="ended with code 1 before it listened") as caught:
        w.apps.start_all()
    assert caught.value.where == "apps.a" and caught.value.hint == "it said: no such device"
    assert "start b" not in w.journal


def test_predecessor_that_has_done_its_work_is_ready(world: Any) -> None:
    w = world("{a: {host: h1, command: x, expect: 3}, b: {host: h2, command: x, after: a}}")
    w.hosts["h1"].ready["a"] = {"listening": [], "ended": {"code": 3}}
    w.apps.start_all()
    assert "start b" in w.journal


def test_refused_start_keeps_its_blame(world: Any) -> None:
    w = world("{a: {host: h1, command: x}}")
    w.hosts["h1"].refuse["a"] = BadInput("no such program", where="h1")
    with pytest.raises(BadInput, match="no such program") as caught:
        w.apps.start_all()
    assert caught.value.where == "apps.a on h1"


def test_first_end_counts_wherever_it_happens(world: Any) -> None:
    w = world("{a: {host: h1, command: x}}")
    w.apps.start_all()
    w.exited("h2", "a", code=0)  # moved, and ended before the testbed learned of the move
    w.exited("h1", "a", signal=9)
    app = w.apps.all["a"]
    assert (app.host, app.code, app.signal) == ("h2", 0, None) and app.as_expected


def test_one_that_moved_to_a_host_whose_agent_has_gone_has_ended(world: Any) -> None:
    """Its end was reported before it was known to be there, and will not be reported again."""
    w = world("{a: {host: h1, command: x}}")
    w.apps.start_all()
    w.hosts["h2"].alive = False
    w.apps.on_event("h2", {"event": "agent_gone", "reason": "killed", "expected": False, "t": time.monotonic()})
    assert w.apps.all["a"].running
    w.apps.moved("a", "h2")
    assert not w.apps.all["a"].running and w.apps.all["a"].host == "h2"


def test_lost_agent_takes_its_own_programs_only(world: Any) -> None:
    w = world("{a: {host: h1, command: x}, b: {host: h2, command: x}, c: {host: h1, command: x}}")
    w.apps.start_all()
    w.apps.moved("c", "h3")
    # Whether the end was expected is a field, not a word of the reason.
    w.apps.on_event("h2", {"event": "agent_gone", "reason": "it ended", "expected": True, "t": time.monotonic()})
    w.apps.on_event("h1", {"event": "agent_gone", "reason": "closed", "expected": False, "t": time.monotonic()})
    assert {name: app.running for name, app in w.apps.all.items()} == {"a": False, "b": True, "c": True}
    assert w.apps.all["a"].signal == 9


def test_peers_of_a_failed_program_are_ended_and_no_others(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FAILURE_GRACE", 0.05)
    w = world("{a: {host: h1, command: x}, b: {host: h2, command: x, after: a}, lone: {host: h3, command: x}}")
    w.apps.start_all()
    w.exited("h1", "a", code=1)
    deadline = time.monotonic() + 10
    w.apps.wait(until=lambda: not w.apps.all["b"].running or time.monotonic() > deadline, poll=0.01)
    assert w.journal[-1] == "kill b" and w.apps.all["lone"].running
    judged = {app.name: app for app in w.apps.collect()}
    assert not judged["a"].ok and not judged["b"].ok
    assert "its peer a ended with code 1" in w.apps.all["b"].problems[0].error


def test_programs_whose_nic_has_ended_are_ended_and_then_their_peers(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FAILURE_GRACE", 0.05)
    w = world("{a: {host: h1, command: x}, b: {host: h2, command: x, after: a}, other: {host: h1, command: x}}")
    w.apps.start_all()
    w.apps.on_event("h1", {"event": "nic_ended", "apps": ["a"], "t": time.monotonic()})
    deadline = time.monotonic() + 10
    w.apps.wait(until=lambda: not w.apps.all["b"].running or time.monotonic() > deadline, poll=0.01)
    assert w.journal[-2:] == ["kill a", "kill b"] and w.apps.all["other"].running
    assert "the NIC of h1 has ended" in w.apps.all["a"].problems[0].error


def test_good_end_of_a_peer_ends_no_other(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FAILURE_GRACE", 0.0)
    w = world("{a: {host: h1, command: x}, b: {host: h2, command: x, after: a}}")
    w.apps.start_all()
    w.exited("h1", "a", code=0)
    until = time.monotonic() + 0.2
    w.apps.wait(until=lambda: time.monotonic() > until, poll=0.01)
    assert w.apps.all["b"].running


def test_timeout(world: Any) -> None:
    w = world("{a: {host: h1, command: x, timeout: 50ms}}")
    w.apps.start_all()
    w.apps.wait(poll=0.01)
    (judged,) = w.apps.collect()
    assert not judged.ok and judged.signal == 9
    assert [p.error for p in w.apps.all["a"].problems] == ["did not end within its timeout of 0.05 s"]


def test_wrong_data_fails_although_the_program_ends_with_0(world: Any) -> None:
    w = world('{a: {host: h1, command: "ibv_rc_pingpong -c"}}')
    w.hosts["h1"].logs["a.stdout"] = "invalid data in page 3\n10 iters in 1.00 seconds = 1.00 usec/iter\n"
    w.apps.start_all()
    w.exited("h1", "a", code=0)
    (judged,) = w.apps.collect()
    assert judged.checked and judged.exit_code == 0 and not judged.ok
    assert "invalid data in page 3" in w.apps.all["a"].problems[0].error


def test_interrupted_start_leaves_no_verdict(world: Any) -> None:
    w = world("{a: {host: h1, command: x}}")
    (judged,) = w.apps.collect()
    assert not judged.ok and judged.exit_code is None and judged.duration_s is None
    assert w.apps.all["a"].problems == []
