"""The event loop, with parts that write down what it asks of them.

Invariants: what lies in a socket is read before a timer acts; a doorbell is served once and armed again before the loop
sleeps; the end of a program's doorbell is reported; what is no longer watched calls nothing; whatever was served, the
counters' files are brought up to date.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from softroce_ext.device.user_context import UserContext
from softroce_ext.device.user_queue_pair import UserQueuePair
from softroce_ext.port.batch import BATCH
from softroce_ext.process.loop import FLUSHES, LAST_TURNS, Descriptors, Loop


class Parts:
    """Engine, port, commands, connection manager and counter files of a loop, and the `log` of their calls."""

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.timer: float | None = None
        self.frames = 0
        """That the engine has to send, `BATCH` at a time."""
        self.waiting_frames: deque[bytes] = deque()
        self.sockets = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.files: Any = SimpleNamespace(next_write=float("inf"), stale=False)

    def engine(self) -> Any:
        return SimpleNamespace(
            receive=lambda frame, now: self.log.append(("frame", bytes(frame))), end_of_batch=lambda now: None,
            next_timer=lambda: self.timer, on_timer=self._on_timer, frames_to_send=self._frames_to_send,
            has_work=lambda: self.frames > 0, ring=lambda qp: self.log.append(("ring", qp)), flush_failed=lambda: None,
        )  # fmt: skip

    def port(self) -> Any:
        return SimpleNamespace(
            fileno=self.sockets[0].fileno, fileno6=self.sockets[1].fileno, receive=self._receive, receive6=list,
            flush=lambda: True, loopback=deque(), unsent=False, advance=lambda: None, next_time=lambda: None,
            flush_observers=lambda: None,
        )  # fmt: skip

    def _on_timer(self, now: float) -> None:
        self.log.append("timer")
        self.timer = None

    def _frames_to_send(self, _now: float, _port: Any) -> int:
        sent = min(self.frames, BATCH)
        self.frames -= sent
        if sent:
            self.log.append(("sent", sent))
        return sent

    def _receive(self) -> list[memoryview]:
        return [memoryview(self.waiting_frames.popleft()) for _ in range(min(BATCH, len(self.waiting_frames)))]

    def loop(self, descriptors: Descriptors) -> Loop:
        commands: Any = SimpleNamespace(waiting=False)
        cm: Any = SimpleNamespace(next_deadline=float("inf"))
        return Loop(0.0, descriptors, self.engine(), self.port(), commands, cm, self.files)


class Channel:
    """A doorbell, and the handles that were rung."""

    def __init__(self, log: list[Any]) -> None:
        self.doorbell, self.program = os.pipe2(os.O_NONBLOCK)
        self.dirty: list[int] = []
        self.log = log

    def silence_doorbell(self) -> None:
        self.log.append(("silence", os.read(self.doorbell, 64)))

    def arm_doorbell(self) -> None:
        self.log.append("arm")

    def take_dirty(self) -> list[int]:
        taken, self.dirty = self.dirty, []
        return taken


@pytest.fixture
def descriptors() -> Iterator[Descriptors]:
    made = Descriptors()
    yield made
    made.close()


@pytest.fixture
def parts() -> Iterator[Parts]:
    made = Parts()
    yield made
    for end in made.sockets:
        end.close()


@pytest.fixture
def channel(parts: Parts) -> Iterator[Channel]:
    made = Channel(parts.log)
    yield made
    for fd in (made.doorbell, made.program):
        try:
            os.close(fd)
        except OSError:  # the test has closed it
            continue


def context(channel: Channel) -> UserContext:
    memory: Any = None
    made = UserContext("c1", None, 1, channel, memory)
    queue_pair: Any = UserQueuePair.__new__(UserQueuePair)
    queue_pair.transport = "qp 5"
    made.objects[5] = queue_pair
    return made


def turns(loop: Loop, count: int) -> None:
    """Run until a wait has been asked `count` times."""
    left = iter(range(count - 1))

    def asked(_now: float) -> bool:
        if next(left, None) is None:
            loop.stop()
        return False  # as long as somebody waits, the loop does not sleep long

    loop.wait_for(asked)
    loop.run()


@pytest.mark.parametrize("event", [True, False])
def test_what_an_event_has_counted_is_shown(parts: Parts, descriptors: Descriptors, event: bool) -> None:
    """Without a frame or a work request, too; and an idle NIC's files are left alone."""
    reading, writing = os.pipe()
    descriptors.watch(reading, lambda _: parts.log.append(os.read(reading, 1)))
    if event:
        os.write(writing, b"x")
    turns(parts.loop(descriptors), 4)
    assert parts.log == [b"x"] * event
    assert parts.files.stale == event
    os.close(reading)
    os.close(writing)


def test_sockets_are_read_before_a_timer_acts(parts: Parts, descriptors: Descriptors) -> None:
    """All that has arrived, also more than one batch, without any notification."""
    loop = parts.loop(descriptors)
    parts.waiting_frames.extend([b"ack"] * (BATCH + 1))
    parts.timer = 0.0
    turns(loop, 3)
    assert parts.log == [("frame", b"ack")] * (BATCH + 1) + ["timer"]


def test_a_doorbell_is_served_once_and_armed_before_sleep(
    parts: Parts, descriptors: Descriptors, channel: Channel
) -> None:
    loop, program = parts.loop(descriptors), context(channel)
    loop.watch_doorbell(program, lambda _: parts.log.append("ended"))
    channel.dirty = [5, 6]  # 6 is no queue pair of this program
    os.write(channel.program, b"!")
    turns(loop, 5)
    assert parts.log == [("silence", b"!"), ("ring", "qp 5"), "arm"]
    assert not program.awake


def test_the_end_of_a_program_is_told(parts: Parts, descriptors: Descriptors, channel: Channel) -> None:
    loop, program = parts.loop(descriptors), context(channel)

    def ended(gone: UserContext) -> None:
        parts.log.append(gone)
        loop.stop_watching_doorbell(gone)

    loop.watch_doorbell(program, ended)
    os.close(channel.program)
    turns(loop, 5)
    assert parts.log == [program]
    assert not program.awake


def test_an_event_of_a_descriptor_is_not_for_who_has_its_number_next(descriptors: Descriptors) -> None:
    """Both are readable; the first closes the second, and its number is taken by a newcomer in the same round."""
    log: list[str] = []
    pipes = [os.pipe(), os.pipe(), os.pipe()]
    first, second, newcomer = (reader for reader, _ in pipes)

    def replace(name: str, other: int) -> None:
        log.append(name)
        descriptors.unwatch(other)
        os.dup2(newcomer, other)
        descriptors.watch(other, lambda _: log.append("the newcomer"))

    descriptors.watch(first, lambda _: replace("first", second))
    descriptors.watch(second, lambda _: replace("second", first))
    for _, writer in pipes[:2]:
        os.write(writer, b"!")
    descriptors.serve(0.0)
    assert log in (["first"], ["second"])
    os.write(pipes[2][1], b"!")
    os.read(first if log == ["first"] else second, 1)
    descriptors.serve(0.0)
    assert log[1:] == ["the newcomer"]
    for pipe in pipes:
        for fd in pipe:
            os.close(fd)


def test_an_ignored_program_calls_nothing(parts: Parts, descriptors: Descriptors, channel: Channel) -> None:
    loop, program = parts.loop(descriptors), context(channel)
    loop.watch_doorbell(program, lambda _: parts.log.append("ended"))
    loop.wake(program)
    loop.stop_watching_doorbell(program)
    channel.dirty = [5]
    os.write(channel.program, b"!")
    os.close(channel.program)
    turns(loop, 3)
    assert parts.log == [] and not program.awake


def test_what_a_program_rang_for_is_sent_before_its_next_command(
    parts: Parts, descriptors: Descriptors, channel: Channel
) -> None:
    loop, program = parts.loop(descriptors), context(channel)
    loop.settle(program)
    assert parts.log == []
    channel.dirty = [5]
    parts.frames = 3
    loop.settle(program)
    assert parts.log == [("ring", "qp 5"), ("sent", 3)]


def test_a_queue_pair_that_goes_sends_first(parts: Parts, descriptors: Descriptors) -> None:
    """Behind all that others have to send, but not behind what has no end."""
    loop = parts.loop(descriptors)

    class Transport:
        ready = property(lambda _: parts.frames > 400)

    leaving: Any = [SimpleNamespace(transport=Transport())]
    parts.frames = 1000
    loop.last_turn(leaving)
    assert 0 < parts.frames <= 400, "sent until it had its turn, and no longer"
    parts.frames = 10**9
    loop.last_turn(leaving)
    assert parts.frames >= 10**9 - LAST_TURNS * FLUSHES * BATCH


def test_unknown_descriptors_are_ignored(descriptors: Descriptors) -> None:
    reading, writing = os.pipe()
    seen: list[int] = []
    descriptors.watch(reading, seen.append)
    os.write(writing, b"!")
    assert descriptors.serve(0) and len(seen) == 1
    descriptors.unwatch(reading)
    descriptors.unwatch(reading)
    descriptors.unwatch(writing)
    assert not descriptors.serve(0) and len(seen) == 1
    os.close(reading)
    os.close(writing)
