"""The NIC's event loop: frames in, doorbells, timers, frames out.

The loop sleeps in epoll while nothing happens. Once something does, it goes round without asking epoll each time,
until a short time has passed without work. While it is awake, `pending` of each program that rang stays set, so that
posting a work request costs the program no system call.
"""

from __future__ import annotations

import contextlib
import gc
import select
import time
from collections.abc import Callable, Sequence
from typing import Final

from softroce_ext.cm.manager import CommunicationManager
from softroce_ext.device.user_context import UserContext
from softroce_ext.device.user_queue_pair import UserQueuePair
from softroce_ext.port.batch import BATCH
from softroce_ext.port.packet_socket import Port
from softroce_ext.trace.queue_pairs import QpTrace
from softroce_ext.transport.engine import Engine
from softroce_ext.uverbs.hw_counters import CounterFiles
from softroce_ext.uverbs.server import CommandServer

MAX_SLEEP: Final = 1.0
NEIGHBOUR_POLL: Final = 0.002
"""Seconds between two queries of the neighbour table while a command waits for a MAC."""
FLUSHES: Final = 4
"""Batches sent in one round before received frames get their turn."""
LAST_TURNS: Final = 8
"""Times FLUSHES batches that are sent for a queue pair that is about to be destroyed."""
FAILED_POLL: Final = 1.0
"""Seconds between two visits to the receive queues of failed queue pairs."""
CATCH_UP: Final = 64
"""Batches that are read, at most, before timers act on what has not arrived."""
LOOPBACK_FULL: Final = 512
"""Frames to this NIC itself that may wait before more frames are built."""


class Descriptors:
    """The descriptors that the NIC waits for, and the callbacks for when one is readable."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[int], None]] = {}
        self._gone: set[int] = set()
        """Unwatched since the last poll: its events are not about a new descriptor with the same number."""

    def watch(self, fd: int, callback: Callable[[int], None]) -> None:
        """Call `callback(events)` when `fd` is readable or hung up."""
        self._callbacks[fd] = callback
        self._epoll.register(fd, select.EPOLLIN)

    def unwatch(self, fd: int) -> None:
        """Stop watching `fd`; unknown descriptors are ignored."""
        self._gone.add(fd)
        if self._callbacks.pop(fd, None) is not None:
            with contextlib.suppress(OSError):
                self._epoll.unregister(fd)

    def serve(self, timeout: float) -> bool:
        """Wait for events at most `timeout` seconds and serve them; whether there were any."""
        callbacks = self._callbacks
        events = self._epoll.poll(timeout)
        gone = self._gone
        gone.clear()
        for fd, what in events:
            callback = callbacks.get(fd)
            if callback is not None and fd not in gone:
                callback(what)
        return bool(events)

    def close(self) -> None:
        """Close the epoll descriptor."""
        self._epoll.close()


class Loop:
    """The turns of everything that a NIC does by itself. `run` returns when `stop` was called."""

    def __init__(
        self,
        spin: float,
        descriptors: Descriptors,
        engine: Engine,
        port: Port,
        commands: CommandServer,
        cm: CommunicationManager,
        counter_files: CounterFiles,
    ) -> None:
        """spin: seconds without work before the loop goes to sleep."""
        self._spin = spin
        self._descriptors = descriptors
        self._serve = descriptors.serve
        self.engine = engine
        self.port = port
        self.commands = commands
        self.cm = cm
        self.qp_trace: QpTrace | None = None
        """Flushed before the loop sleeps."""
        self._counter_files = counter_files
        self._awake: list[UserContext] = []
        self._stopping = False
        self._next_retry = 0.0
        self._next_flush = 0.0
        self._readable = self._readable6 = False
        self._waits: list[Callable[[float], bool]] = []
        descriptors.watch(port.fileno(), self._frames_wait)
        descriptors.watch(port.fileno6(), self._frames_wait6)

    def wait_for(self, poll: Callable[[float], bool]) -> None:
        """Call `poll(now)` about every millisecond until it returns True."""
        self._waits.append(poll)

    def stop(self) -> None:
        """Leave `run` after this round."""
        self._stopping = True

    # -- programs --------------------------------------------------------------------------------------------------

    def watch_doorbell(self, context: UserContext, ended: Callable[[UserContext], None]) -> None:
        """Serve a context's doorbell, and call `ended(context)` when the program has closed it."""
        self._descriptors.watch(context.channel.doorbell, lambda events: self._doorbell(context, events, ended))

    def stop_watching_doorbell(self, context: UserContext) -> None:
        """Ignore a context's doorbell from now on."""
        self._descriptors.unwatch(context.channel.doorbell)
        if context.awake:
            context.awake = False
            self._awake.remove(context)

    def wake(self, context: UserContext) -> None:
        """Visit a context's queue pairs in every round until the loop sleeps."""
        if not context.awake:
            context.awake = True
            self._awake.append(context)

    def _doorbell(self, context: UserContext, events: int, ended: Callable[[UserContext], None]) -> None:
        channel = context.channel
        if events & select.EPOLLIN:
            channel.silence_doorbell()
        self.wake(context)
        if events & (select.EPOLLHUP | select.EPOLLERR) and not events & select.EPOLLIN:
            ended(context)

    def serve_doorbell(self, context: UserContext) -> bool:
        """HOT. Make the queue pairs ready that a program rang for; whether there were any."""
        handles = context.channel.take_dirty()
        objects = context.objects
        for handle in handles:
            qp = objects.get(handle)
            if isinstance(qp, UserQueuePair):
                self.engine.ring(qp.transport)
        return bool(handles)

    # -- the loop ----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Run until `stop`."""
        gc.collect()
        gc.freeze()
        monotonic = time.monotonic
        spin = self._spin
        files = self._counter_files
        serve = self._serve
        while not self._stopping:
            served = self._sleep(monotonic())
            worked = 0.0
            while not self._stopping:
                now = monotonic()
                if self._round(now):
                    worked = now
                    if now >= files.next_write:
                        files.write(now)
                if serve(0):
                    served = True
                elif now - worked >= spin and not self._more():
                    break
                self._chores(now)
            if worked or served:  # an event alone can count: a command refused, a link lost, an ACK before the end
                files.stale = True

    def _more(self) -> bool:
        """Whether another round would have something to do, as far as is known without a system call."""
        return (self.engine.has_work() and not self.port.unsent) or bool(self.port.loopback)

    def _frames_wait(self, _events: int) -> None:
        self._readable = True

    def _frames_wait6(self, _events: int) -> None:
        self._readable6 = True

    def _round(self, now: float) -> bool:
        """HOT. Frames in, doorbells, timers, frames out. Whether there was anything to do."""
        engine, port = self.engine, self.port
        busy = False
        if self._readable:
            frames = port.receive()
            self._readable = len(frames) == BATCH  # else epoll reports when there are more
            busy = True
            self._take(frames, now)
        if self._readable6:
            frames = port.receive6()
            self._readable6 = len(frames) == BATCH
            busy = True
            self._take(frames, now)
        if port.loopback:
            busy = True
            inside = port.loopback
            self._take([memoryview(inside.popleft()) for _ in range(min(len(inside), 64))], now)
        for context in self._awake:
            if self.serve_doorbell(context):
                busy = True
        timer = engine.next_timer()
        if timer is not None and timer <= now:
            self._read_all(now)
            engine.on_timer(now)
        busy = self._send(now) or busy
        port.advance()
        return busy

    def _send(self, now: float) -> bool:
        """HOT. Some batches of frames out; whether there were any."""
        engine, port = self.engine, self.port
        sent = False
        # Datagrams to this NIC itself have no window: while many wait inside, no queue pair gets a turn, which is fair.
        if port.flush() and len(port.loopback) < LOOPBACK_FULL:
            for _ in range(FLUSHES):
                if not engine.frames_to_send(now, port):
                    break
                sent = True
                if not port.flush():
                    break
        return sent

    def settle(self, context: UserContext) -> None:
        """Do what a program has posted before its next command, or its end, is served.

        rxe sends from within ibv_post_send: a program that destroys a queue pair right after posting to it has sent.
        The same holds for an acknowledgement that is due when the program sees the message that it is for.
        """
        self.serve_doorbell(context)
        if self.engine.has_work():
            self._send(time.monotonic())

    def last_turn(self, leaving: Sequence[UserQueuePair]) -> None:
        """Queue pairs are about to be destroyed: send until they had their turn, up to a limit."""
        for _ in range(LAST_TURNS):
            if not any(qp.transport.ready for qp in leaving) or not self._send(time.monotonic()):
                break

    def _read_all(self, now: float) -> None:
        """Before a timer acts: what it waits for may be in a socket since this process last had a processor."""
        for receive in (self.port.receive, self.port.receive6):
            for _ in range(CATCH_UP):
                frames = receive()
                self._take(frames, now)
                if len(frames) < BATCH:
                    break

    def _take(self, frames: list[memoryview], now: float) -> None:
        """HOT. Let the engine take one batch of received frames."""
        receive = self.engine.receive
        for frame in frames:
            receive(frame, now)
        self.engine.end_of_batch(now)

    def _sleep(self, now: float) -> bool:
        """Wait for the next event, with every program's doorbell armed; whether one came."""
        for context in list(self._awake):
            context.channel.arm_doorbell()
            self.serve_doorbell(context)
            context.awake = False
        self._awake.clear()
        self._chores(now)
        self.port.flush_observers()
        if self.qp_trace is not None:
            self.qp_trace.flush()
        if now >= self._counter_files.next_write:
            self._counter_files.write(now)
        return self._serve(self._timeout(now))

    def _chores(self, now: float) -> None:
        if self.commands.waiting and now >= self._next_retry:
            self._next_retry = now + NEIGHBOUR_POLL
            self.commands.retry(now)
        if now >= self.cm.next_deadline:
            self.cm.on_timer(now)
        if now >= self._next_flush:
            self._next_flush = now + FAILED_POLL
            self.engine.flush_failed()
        if self._waits:
            self._waits = [poll for poll in self._waits if not poll(now)]

    def _timeout(self, now: float) -> float:
        if self.engine.has_work() or self.port.loopback:
            # Only a full socket can be the reason that work is left over.
            return 0.0005 if self.port.unsent else 0.0
        timeout = min(MAX_SLEEP, self.cm.next_deadline - now)
        timer = self.engine.next_timer()
        if timer is not None:
            timeout = min(timeout, timer - now)
        late = self.port.next_time()
        if late is not None:
            timeout = min(timeout, late - now)
        if self._counter_files.stale:
            timeout = min(timeout, self._counter_files.next_write - now)
        if self.commands.waiting or self._waits:
            timeout = min(timeout, NEIGHBOUR_POLL)
        return max(0.0, timeout)
