"""Waiting for the end of processes: each end is reported once, and no other's is taken for it."""

from __future__ import annotations

import select
import subprocess
import threading
from collections.abc import Iterator

import pytest

from testbed.agent.processes import ProcessWatch


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "100"])
    yield process
    process.kill()
    process.wait()


def test_an_end_is_told_once(sleeper: subprocess.Popen[bytes]) -> None:
    ended = threading.Semaphore(0)
    ProcessWatch().watch(sleeper.pid, ended.release)
    assert not ended.acquire(timeout=0.05)
    sleeper.kill()
    assert ended.acquire(timeout=10)
    assert not ended.acquire(timeout=0.05)


def test_a_process_that_is_forgotten_is_not_told_of(sleeper: subprocess.Popen[bytes]) -> None:
    ended = threading.Event()
    watch = ProcessWatch()
    watch.watch(sleeper.pid, ended.set)
    watch.unwatch(sleeper.pid)
    sleeper.kill()
    assert not ended.wait(0.1)


def test_the_end_of_one_that_had_the_same_descriptor_is_not_that_of_another(
    sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Polled, then forgotten, and its number given to the next one, all before the watch's thread has the lock."""
    polled, ended = threading.Event(), threading.Event()

    class Late:
        """Tells of every descriptor that is registered, as a poll before the exchange would have."""

        def __init__(self) -> None:
            self.registered: list[int] = []
            self.ready = threading.Event()

        def register(self, descriptor: int, _: int) -> None:
            self.registered.append(descriptor)
            self.ready.set()

        def unregister(self, descriptor: int) -> None:
            self.registered.remove(descriptor)

        def poll(self) -> list[tuple[int, int]]:
            if polled.is_set():
                threading.Event().wait()  # nothing more happens
            self.ready.wait()
            polled.set()
            return [(descriptor, select.EPOLLIN) for descriptor in self.registered]

    monkeypatch.setattr("testbed.agent.processes.select.epoll", Late)
    ProcessWatch().watch(sleeper.pid, ended.set)
    assert polled.wait(10)
    assert not ended.wait(0.1)
