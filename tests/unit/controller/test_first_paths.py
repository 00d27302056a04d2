"""The first paths, on an event loop of the test's own.

Invariants: they go in when nothing is missing, and not before; what was not confirmed is tried again without a further
event from a switch; a newer change takes the installation over; the attempts end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from testbed.controller.first_paths import ATTEMPTS, FirstPaths
from testbed.controller.northbound import Unready


class World:
    """Switches that confirm or not. What is spawned runs at `run`; `meanwhile` happens at the first sleep."""

    def __init__(self, *late: str) -> None:
        self.gone: list[str] = []
        self.late = list(late)
        """What the next attempts fail with."""
        self.attempts = 0
        self.spawned: list[Callable[[], None]] = []
        self.meanwhile: Callable[[], None] = lambda: None
        self.paths = FirstPaths(self.install, lambda: self.gone, self)

    def spawn(self, work: Callable[..., None], *arguments: Any) -> None:
        self.spawned.append(lambda: work(*arguments))

    def sleep(self, seconds: float) -> None:
        assert seconds > 0, "a refusal must not keep the event loop busy"
        meanwhile, self.meanwhile = self.meanwhile, lambda: None
        meanwhile()

    def install(self) -> None:
        self.attempts += 1
        if self.late:
            raise Unready(self.late.pop(0))

    def run(self) -> None:
        while self.spawned:
            self.spawned.pop(0)()


def test_nothing_goes_in_while_something_is_missing() -> None:
    w = World()
    w.gone = ["switch s2"]
    w.paths.check()
    w.run()
    assert w.attempts == 0 and w.paths.ready_at is None
    w.gone = []
    w.paths.check()
    w.run()
    assert w.attempts == 1 and w.paths.ready_at is not None
    w.paths.check()
    assert w.spawned == [], "once is enough"


def test_a_late_confirmation_is_waited_for_again_without_an_event() -> None:
    w = World("s1 did not confirm within 10 s", "s1 did not confirm within 10 s")
    w.paths.check()
    w.run()
    assert w.attempts == 3 and w.paths.ready_at is not None


def test_attempts_end() -> None:
    w = World(*["s1 refused"] * 100)
    w.paths.check()
    w.run()
    assert w.attempts == ATTEMPTS and w.paths.ready_at is None
    w.late = []
    w.paths.check()
    w.run()
    assert w.paths.ready_at is not None, "a later event starts again"


def test_a_newer_change_takes_over() -> None:
    w = World("s1 did not confirm within 10 s")
    w.meanwhile = w.paths.check
    w.paths.check()
    w.spawned.pop(0)()
    assert w.attempts == 1 and len(w.spawned) == 1, "the older one leaves it to the newer one"
    w.run()
    assert w.attempts == 2 and w.paths.ready_at is not None


def test_a_switch_that_goes_ends_the_attempts() -> None:
    w = World("s1 did not confirm within 10 s")
    w.meanwhile = lambda: w.gone.append("switch s1")
    w.paths.check()
    w.run()
    assert w.attempts == 1 and w.paths.ready_at is None
