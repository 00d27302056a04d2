"""Openings: one process's open device files, whatever their kind.

Invariants: a program that ends is dropped once, unless it is held; holding stops and ignores, unholding watches and
resumes; what cannot be watched stays held; a process that is not the restored one is refused.
"""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from softroce_ext.device.errors import StateError
from softroce_ext.device.numbers import NumberPool, Range, VerbsError
from softroce_ext.device.opening import Opening, Openings, open_processes


class Plain(Opening):
    """An opening that owns nothing."""

    def summary(self) -> dict[str, Any]:
        return {"id": self.id}


class Kind(Openings[Plain]):
    """Keeps a log of what it is asked to do."""

    def __init__(self) -> None:
        self.watched: dict[int, Callable[[int], None]] = {}
        self.log: list[str] = []
        descriptors = SimpleNamespace(watch=self.watched.__setitem__, unwatch=lambda fd: self.watched.pop(fd, None))
        super().__init__({}, descriptors)

    def add(self, identifier: str, pid: int | None) -> Plain:
        made = Plain(identifier, pid, os.getpid(), SimpleNamespace(), SimpleNamespace(pid=0))  # type: ignore[arg-type]
        self.by_id[identifier] = made
        return made

    def _watch_doorbell(self, opening: Plain) -> None:
        self.log.append("watch")

    def _stop_watching_doorbell(self, opening: Plain) -> None:
        self.log.append("ignore")

    def _close(self, opening: Plain) -> None:
        self.log.append("close")
        del self.by_id[opening.id]

    def _stop(self, opening: Plain) -> None:
        assert opening.held
        self.log.append("stop")

    def _resume(self, opening: Plain, source: bytes | None) -> None:
        assert not opening.held
        self.log.append(f"resume {source!r}")

    def _discard(self, opening: Plain) -> None:
        self.log.append("discard")
        del self.by_id[opening.id]


@pytest.fixture
def kind() -> Kind:
    return Kind()


def test_the_end_of_a_process_drops_its_opening_once(kind: Kind) -> None:
    process = subprocess.Popen(["sleep", "60"])
    opening = kind.add("1-0", process.pid)
    kind.watch(opening)
    (ended,) = kind.watched.values()
    process.kill()
    process.wait()
    ended(1)
    ended(1)
    assert kind.log == ["watch", "ignore", "close"]
    assert not kind.watched and opening.pidfd < 0 and not kind.by_id


def test_a_held_opening_is_not_dropped_and_resumes(kind: Kind) -> None:
    opening = kind.add("1-0", os.getpid())
    kind.watch(opening)
    kind.hold(opening)
    kind.drop(opening)
    assert kind.by_id and not kind.watched and opening.pidfd < 0
    kind.unhold(opening, b"\n\0\0\1")
    assert kind.log == ["watch", "ignore", "stop", r"resume b'\n\x00\x00\x01'", "watch"]
    assert set(kind.watched) == {opening.pidfd}
    kind.stop_watching(opening)


def test_what_cannot_be_watched_stays_held(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    openings = [kind.add(f"1-{number}", os.getpid()) for number in range(2)]
    for opening in openings:
        kind.hold(opening)
    real = os.pidfd_open
    calls = iter((real, None))

    def pidfd_open(pid: int) -> int:
        call = next(calls)
        if call is None:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return call(pid)

    monkeypatch.setattr(os, "pidfd_open", pidfd_open)
    with pytest.raises(StateError, match="cannot be watched"):
        open_processes(openings)
    assert all(opening.held and opening.pidfd < 0 for opening in openings)


def test_a_discarded_opening_sends_nothing(kind: Kind) -> None:
    opening = kind.add("1-0", None)
    opening.held = True
    kind.discard(opening)
    kind.discard(opening)
    assert kind.log == ["ignore", "discard"]


def test_only_the_restored_process_is_attached(kind: Kind) -> None:
    opening = kind.add("1-0", None)
    with pytest.raises(StateError, match="is 1 inside, not"):
        opening.attach(1)
    opening.attach(os.getpid())
    assert opening.pid == opening.memory.pid == os.getpid()
    with pytest.raises(StateError, match="there is no process"):
        opening.attach(1 << 22)


def test_a_number_is_free_once_no_object_has_it() -> None:
    pool = NumberPool(Range(0, size=3), limit=2, what="things")
    first = pool.take()
    assert first not in pool, "it is claimed by the object that enters"
    pool.claim(first)
    pool.claim(first)
    pool.give_back(first)
    assert first in pool and pool == {first}
    pool.claim(pool.take())
    with pytest.raises(VerbsError, match="too many things"):
        pool.take()
    pool.give_back(first)
    assert first not in pool and len(pool) == 1
