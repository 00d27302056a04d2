"""The NIC process: one loop that joins port, engine, programs and management.

The loop sleeps in epoll while nothing happens. Once something does, it goes round without asking epoll each time:
frames in, doorbells, timers, frames out, until a short time has passed without work. While it is awake, `pending` of
each program that rang stays set, so that posting a work request costs the program no system call.
"""

from __future__ import annotations

import contextlib
import gc
import ipaddress
import os
import secrets
import select
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from softroce_ext.addresses import AddressWatch
from softroce_ext.capture import Capture
from softroce_ext.cm.manager import CommunicationManager
from softroce_ext.cm.server import CmFiles, Memberships, Sources
from softroce_ext.control import ControlServer
from softroce_ext.device.adapter import Adapter
from softroce_ext.device.addressing import address_of
from softroce_ext.device.context import Context
from softroce_ext.device.errors import StateError
from softroce_ext.impairment import Impairment, ImpairmentSpec
from softroce_ext.management import Management
from softroce_ext.neighbours import Neighbours
from softroce_ext.port import BATCH, Port
from softroce_ext.qp_trace import DEFAULT_LIMIT, QpTrace
from softroce_ext.transport.engine import Engine, EngineConfig
from softroce_ext.uverbs.channel import FileChannel
from softroce_ext.uverbs.hw_counters import CounterFiles
from softroce_ext.uverbs.server import CommandServer
from softroce_ext.uverbs.sysfs import SysfsPicture
from softroce_ext.wire.path import address_text

MAX_SLEEP: Final = 1.0
NEIGHBOUR_POLL: Final = 0.002
"""Seconds between looks at the neighbour table while a command waits for a MAC."""
MAX_WINDOW: Final = 384
"""Packets that one queue pair may have on the way. Linux rxe has 128; here a round trip takes several time slices."""
DRAIN_LIMIT: Final = 64
FLUSHES: Final = 4
"""Batches sent in one round before received frames get their turn."""
LOOPBACK_FULL: Final = 512
"""Frames to this NIC itself that may wait before the next ones are built."""


@dataclass(slots=True)
class NicConfig:
    """Everything that the command line says."""

    interface: str
    addresses: list[bytes]
    """4 or 16 bytes each."""
    run_directory: Path
    number_base: int = 0
    mtu: int | None = None
    """Bytes; lowers the interface's own."""
    migros: bool = True
    capture: str | None = None
    snaplen: int = 65535
    seed: int = 0
    impairment: ImpairmentSpec = field(default_factory=ImpairmentSpec)
    spin: float = 0.0
    """Seconds without work before the loop goes to sleep. Spinning takes the processor from programs that poll; it pays
    only where there are more processors than busy processes."""
    trace: str | None = None
    trace_qp: str | None = None
    follow: bool = False
    """The GID table follows the interface's addresses, as Linux's does."""


class Nic:
    """One NIC. `run` returns when `stop` was called; `close` removes every file."""

    def __init__(self, config: NicConfig) -> None:
        """Raises OSError when the interface, the addresses or the run directory cannot be used."""
        self.config = config
        self.port = Port(config.interface)
        if config.mtu is not None:
            self.port.mtu = min(self.port.mtu, config.mtu)
        if config.impairment != ImpairmentSpec():
            self.port.impairment = Impairment(config.impairment, config.seed)
        if config.capture:
            self.port.capture = Capture(config.capture, config.snaplen)
        self.engine = Engine(EngineConfig(migros=config.migros, window=MAX_WINDOW))
        self.neighbours = Neighbours(self.port.index)
        self.adapter = Adapter(self.engine, self.port.mac, self.port.mtu, config.number_base, self.neighbours.mac)
        self.adapter.groups.changed = lambda _: self._own_changed()
        for address in config.addresses:
            self.adapter.add_address(address)
        self._own_changed()

        run = config.run_directory
        run.mkdir(parents=True, exist_ok=True)
        clear(run)
        self.sysfs = SysfsPicture(run, self.adapter, config.interface)
        self.sysfs.create()
        self._counter_files = CounterFiles(self.sysfs.port, self.counters)
        self.adapter.gid_listeners.append(self._gid_changed)

        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[int], None]] = {}
        self._awake: list[Context] = []
        self._stopping = False
        self._next_retry = 0.0
        self._readable = self._readable6 = False
        self._waits: list[Callable[[float], bool]] = []
        self.commands = CommandServer(run, self.adapter, self.watch_context, self._ring_before)
        sources = Sources(self.port.index, self.adapter.addresses)
        self.cm = CommunicationManager(self.adapter, self.engine.gsi, secrets.randbelow, sources)
        self._memberships = self.cm.membership = Memberships(self.port.index)
        self.cm_files = self.commands.cm = CmFiles(run, self.cm, self.watch, self.unwatch, time.monotonic)
        self.watch(self.commands.fileno(), lambda _: self._serve())
        self.watch(self.port.fileno(), self._frames_wait)
        self.watch(self.port.fileno6(), self._frames_wait6)
        self.addresses: AddressWatch | None = None
        if config.follow:
            self._follow()
        self.management = Management(self)
        self.control = ControlServer(
            run / "control.sock", self.management.handle, self.watch, self.unwatch, self.wait_for
        )
        self._trace_file: Any = None
        if config.trace:
            self.trace_to(config.trace)
        self._qp_trace: QpTrace | None = None
        if config.trace_qp:
            self.trace_qps(config.trace_qp)

    def counters(self) -> dict[str, int]:
        """Every count of engine, port and impairment, by name."""
        port = self.port
        counters = dict(self.engine.counters)
        for name in ("tx_packets", "tx_bytes", "rx_packets", "rx_bytes", "tx_busy", "tx_errors", "loopback_lost"):
            counters[name] = getattr(port, name)
        if port.impairment is not None:
            for name in ("lost", "duplicated", "reordered", "corrupted"):
                counters[f"impairment_{name}"] = getattr(port.impairment, name)
        return counters

    # -- what the parts call ---------------------------------------------------------------------------------------

    def watch(self, fd: int, callback: Callable[[int], None]) -> None:
        """Call `callback(events)` when `fd` is readable or hung up."""
        self._callbacks[fd] = callback
        self._epoll.register(fd, select.EPOLLIN)

    def unwatch(self, fd: int) -> None:
        """The opposite of `watch`; unknown descriptors are ignored."""
        if self._callbacks.pop(fd, None) is not None:
            with contextlib.suppress(OSError):
                self._epoll.unregister(fd)

    def wait_for(self, poll: Callable[[float], bool]) -> None:
        """Call `poll(now)` about every millisecond until it returns True."""
        self._waits.append(poll)

    def trace_to(self, path: str | None) -> None:
        """Write one line for each command of a program to `path` (None: stop)."""
        if self._trace_file is not None:
            self._trace_file.close()
            self._trace_file = None
        self.commands.trace = self.cm_files.trace = None
        if path:
            self._trace_file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 - closed above
            file = self._trace_file
            self.commands.trace = lambda line: print(f"{time.monotonic():.6f} {line}", file=file)
            self.cm_files.trace = self.commands.trace

    def trace_qps(self, path: str | None, qpns: list[int] | None = None, limit: int = DEFAULT_LIMIT) -> int:
        """Trace queue pairs (None: all of them, those to come too) to `path`; None ends the trace.

        Returns the number of lines of the trace that was on before, which ends. Raises OSError.
        """
        about = {
            "interface": self.config.interface,
            "addresses": [str(ipaddress.ip_address(address)) for address in self.adapter.addresses()],
            "number_base": self.config.number_base,
        }
        before, self._qp_trace = self._qp_trace, None
        lines = before.close() if before is not None else 0
        if path:
            self._qp_trace = QpTrace(self.engine, path, qpns, about=about, limit=limit)
        return lines

    def watch_context(self, context: Context) -> None:
        """Listen to a context's doorbell and to the end of its process."""
        self.watch(context.channel.doorbell, lambda events: self._doorbell(context, events))
        if context.pid is not None:
            with contextlib.suppress(OSError):
                context.pidfd = os.pidfd_open(context.pid)
                self.watch(context.pidfd, lambda _: self.drop_context(context))

    def unwatch_context(self, context: Context) -> None:
        """Be deaf to a context: its end of file and its process's end mean nothing now."""
        self.unwatch(context.channel.doorbell)
        if context.pidfd >= 0:
            self.unwatch(context.pidfd)
            os.close(context.pidfd)
            context.pidfd = -1
        self._doze(context)

    def drop_context(self, context: Context) -> None:
        """The program closed the device or ended: free everything it owned."""
        if context.held or context.id not in self.adapter.contexts:
            return
        self.unwatch_context(context)
        self.adapter.forget(context)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def hold(self, context: Context) -> None:
        """The program is frozen: take in what it sent, be deaf to its end, stop its queue pairs."""
        self.drain(context)
        self.unwatch_context(context)
        context.held = True
        for qp in context.queue_pairs:
            qp.transport.stop()
        # What was executed must be seen: memory written, completions in their queues, before anything is copied.
        self.engine.end_of_batch(time.monotonic())

    def release(self, context: Context, source: bytes | None) -> None:
        """The program runs again, here: listen to it, un-stop its queue pairs, tell the partners.

        source: the IP address of queue pairs whose own is not here (None: they keep it).
        """
        context.held = False
        handles = []
        for qp in context.queue_pairs:
            path = qp.transport.context.path
            if path is not None:
                here = path.source_ip in self.port.own or (source is not None and len(source) != len(path.source_ip))
                path = path.replace(source_mac=self.port.mac, source_ip=None if here else source)
            qp.transport.resume(path)
            handles.append(qp.handle)
        context.channel.all_dirty(handles)
        self.watch_context(context)
        if context.pid is not None and context.pidfd < 0:
            context.held = False
            self.drop_context(context)  # it ended while it was held
            return
        context.awake = True
        self._awake.append(context)

    def make_channel(self, identifier: str, owner: tuple[int, int], taken: list[tuple[int, int]]) -> FileChannel:
        """The channel of a context that is being restored."""
        return FileChannel(self.config.run_directory, identifier, owner, taken)

    def stop(self) -> None:
        """Leave `run` after this round."""
        self._stopping = True

    # -- events ----------------------------------------------------------------------------------------------------

    def _own_changed(self) -> None:
        groups = {address_of(gid) for gid in self.engine.multicast}
        self.port.set_addresses(self.adapter.addressing.own(), groups)

    def _follow(self) -> None:
        """Let the GID table be what the interface's addresses are."""

        def removed(address: bytes) -> None:
            with contextlib.suppress(StateError):  # not in the table: taken out by a command, or row 0
                self.adapter.remove_address(address)

        self.addresses = AddressWatch(self.port.index, self._followed, removed, self.adapter.port_event)
        self.addresses.start()
        self.watch(self.addresses.fileno(), lambda _: self.addresses.read() if self.addresses else None)

    def _followed(self, address: bytes) -> None:
        try:
            self.adapter.add_address(address)
        except StateError as error:
            print(f"softroce_ext: {address_text(address)}: {error}", file=sys.stderr)

    def _gid_changed(self, index: int, gid: bytes | None) -> None:
        self._own_changed()
        self.sysfs.set_gid(index, gid)

    def _serve(self) -> None:
        self.commands.serve()

    def _doorbell(self, context: Context, events: int) -> None:
        channel = context.channel
        if events & select.EPOLLIN:
            channel.silence_doorbell()
        if not context.awake:
            context.awake = True
            self._awake.append(context)
        if events & (select.EPOLLHUP | select.EPOLLERR) and not events & select.EPOLLIN:
            self.drop_context(context)

    def _ring_before(self, context: Context) -> None:
        if context.channel.rung():
            self._ring(context)

    def _ring(self, context: Context) -> bool:
        """HOT. Look at the queue pairs that a program rang; whether there were any."""
        handles = context.channel.take_dirty()
        objects = context.objects
        for handle in handles:
            qp = objects.get(handle)
            if qp is not None and hasattr(qp, "transport"):
                self.engine.ring(qp.transport)
        return bool(handles)

    def drain(self, context: Context) -> None:
        """Take in every command and doorbell that a frozen program has sent (nothing new can come)."""
        for _ in range(DRAIN_LIMIT):  # others may go on sending
            if not self.commands.serve(64):
                break
        self.commands.fail_waiting(context)
        context.channel.silence_doorbell()
        context.channel.arm_doorbell()
        self._ring(context)

    def _doze(self, context: Context) -> None:
        if context.awake:
            context.awake = False
            self._awake.remove(context)

    # -- the loop ----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Run until `stop`."""
        gc.collect()
        gc.freeze()
        monotonic = time.monotonic
        spin = self.config.spin
        files = self._counter_files
        while not self._stopping:
            self._sleep(monotonic())
            worked = 0.0
            while not self._stopping:
                now = monotonic()
                if self._round(now):
                    worked = now
                    if now >= files.due:
                        files.write(now)
                if not self._dispatch(0) and now - worked >= spin and not self._more():
                    break
                self._chores(now)
            if worked:
                files.stale = True

    def _more(self) -> bool:
        """Whether another round would have something to do, as far as one can see without asking the kernel."""
        return (self.engine.has_work() and not self.port.unsent) or bool(self.port.loopback)

    def _dispatch(self, timeout: float) -> bool:
        """Wait for events at most `timeout` seconds and serve them; whether there were any."""
        callbacks = self._callbacks
        events = self._epoll.poll(timeout)
        for fd, what in events:
            callback = callbacks.get(fd)
            if callback is not None:
                callback(what)
        return bool(events)

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
            self._readable = len(frames) == BATCH  # else epoll says when there are more
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
            if self._ring(context):
                busy = True
        timer = engine.next_timer()
        if timer is not None and timer <= now:
            engine.on_timer(now)
        # Datagrams to this NIC itself have no window: what waits inside holds everybody's turns back, fairly.
        if port.flush() and len(port.loopback) < LOOPBACK_FULL:
            for _ in range(FLUSHES):
                if not engine.frames_to_send(now, port):
                    break
                busy = True
                if not port.flush():
                    break
        if port.impairment is not None:
            port.send_due()
        return busy

    def _take(self, frames: list[memoryview], now: float) -> None:
        """HOT. Let the engine take one batch of received frames."""
        receive = self.engine.receive
        for frame in frames:
            receive(frame, now)
        self.engine.end_of_batch(now)

    def _sleep(self, now: float) -> None:
        """Wait for the next event; before that, make every program's doorbell ring again."""
        for context in list(self._awake):
            context.channel.arm_doorbell()
            self._ring(context)
            context.awake = False
        self._awake.clear()
        self._chores(now)
        if self.port.capture is not None:
            self.port.capture.flush()
        if self._qp_trace is not None:
            self._qp_trace.flush()
        if now >= self._counter_files.due:
            self._counter_files.write(now)
        self._dispatch(self._timeout(now))

    def _chores(self, now: float) -> None:
        if self.commands.waiting and now >= self._next_retry:
            self._next_retry = now + NEIGHBOUR_POLL
            self.commands.retry(now)
        if now >= self.cm.due:
            self.cm.on_timer(now)
        if self._waits:
            self._waits = [poll for poll in self._waits if not poll(now)]

    def _timeout(self, now: float) -> float:
        if self.engine.has_work() or self.port.loopback:
            # Only a full socket can be the reason that work is left over.
            return 0.0005 if self.port.unsent else 0.0
        timeout = min(MAX_SLEEP, self.cm.due - now)
        timer = self.engine.next_timer()
        if timer is not None:
            timeout = min(timeout, timer - now)
        if self.port.impairment is not None:
            late = self.port.impairment.next_time()
            if late is not None:
                timeout = min(timeout, late - now)
        if self._counter_files.stale:
            timeout = min(timeout, self._counter_files.due - now)
        if self.commands.waiting or self._waits:
            timeout = min(timeout, NEIGHBOUR_POLL)
        return max(0.0, timeout)

    def close(self) -> None:
        """Free every context, close the port and remove what `Nic` created in the run directory."""
        self.cm_files.close_all()
        self._memberships.close()
        for context in list(self.adapter.contexts.values()):
            self.unwatch_context(context)
            self.adapter.forget(context)
        self._counter_files.close()
        self.trace_qps(None)
        self.control.close()
        self.commands.close()
        self.neighbours.close()
        self.trace_to(None)
        if self.port.capture is not None:
            self.port.capture.close()
        self.port.close()
        self._epoll.close()
        clear(self.config.run_directory)


def clear(run: Path) -> None:
    """Remove what a NIC (an earlier one that was killed, too) left in its run directory, and nothing else."""
    for name in ("sys", "dev", "ctx"):
        shutil.rmtree(run / name, ignore_errors=True)
    for name in ("uverbs.sock", "control.sock"):
        (run / name).unlink(missing_ok=True)
