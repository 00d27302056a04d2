"""The NIC process: port, engine, programs and management, joined; `loop` runs them."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import secrets
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from softroce_ext.cm.manager import CommunicationManager
from softroce_ext.cm.server import CmFiles, Memberships, Sources
from softroce_ext.control.server import ControlServer
from softroce_ext.device.adapter import Adapter
from softroce_ext.device.context import Context
from softroce_ext.device.errors import StateError
from softroce_ext.device.link import Link
from softroce_ext.port.capture import Capture
from softroce_ext.port.ethtool import link_speed
from softroce_ext.port.impairment import Impairment, ImpairmentSpec
from softroce_ext.port.interface import InterfaceWatch
from softroce_ext.port.neighbours import Neighbours
from softroce_ext.port.packet_socket import Port
from softroce_ext.process.loop import MAX_SLEEP, Descriptors, Loop
from softroce_ext.process.management import Management
from softroce_ext.trace.commands import CommandTrace
from softroce_ext.trace.queue_pairs import DEFAULT_LIMIT, QpTrace
from softroce_ext.transport.engine import Engine, EngineConfig
from softroce_ext.uverbs.channel import FileChannel
from softroce_ext.uverbs.hw_counters import CounterFiles
from softroce_ext.uverbs.removal import remove_tree
from softroce_ext.uverbs.server import CommandServer, open_process
from softroce_ext.uverbs.sysfs import SysfsPicture
from softroce_ext.wire.path import address_text

MAX_WINDOW: Final = 384
"""Packets that one queue pair may have on the way. Linux rxe has 128; here a round trip takes several time slices."""
DRAIN_LIMIT: Final = 64


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
        self.adapter.measure_speed = lambda: link_speed(config.interface)
        self.adapter.groups.changed = self.port.set_group
        for address in config.addresses:
            self.adapter.add_address(address)
        self._own_changed()
        sources = Sources(self.port.index)
        self.cm = CommunicationManager(self.adapter, self.engine.gsi, secrets.randbelow, sources)

        run = config.run_directory
        run.mkdir(parents=True, exist_ok=True)
        clear(run)
        self.sysfs = SysfsPicture(run, self.adapter, config.interface)
        self.sysfs.create()
        self.adapter.gid_listeners.append(self._gid_changed)

        self.descriptors = descriptors = Descriptors()
        watch, unwatch = descriptors.watch, descriptors.unwatch
        self.commands = CommandServer(run, self.adapter, self.watch_context, self._ring_before)
        self._memberships = self.cm.groups.changed = Memberships(self.port.index)
        self.engine.peer_moved = self.cm.connections.peer_moved
        self.cm_files = self.commands.cm = CmFiles(run, self.cm, watch, unwatch, time.monotonic)
        self._counter_files = CounterFiles(self.sysfs.port, self.counters)
        self.loop = Loop(config.spin, descriptors, self.engine, self.port, self.commands, self.cm, self._counter_files)
        self.adapter.last_turn = self.loop.last_turn
        watch(self.commands.fileno(), lambda _: self._serve())
        self.adapter.link_listeners.append(self._port_changed)
        follow = (self._followed, self._unfollowed) if config.follow else ()
        self.interface = InterfaceWatch(self.port.index, self._link_changed, *follow)
        self.interface.start()
        watch(self.interface.fileno(), lambda _: self.interface.read())
        self.management = Management(self)
        self.control = ControlServer(run / "control.sock", self.management.handle, watch, unwatch, self.loop.wait_for)
        self._trace_file: CommandTrace | None = None
        if config.trace:
            self.trace_to(config.trace)
        if config.trace_qp:
            self.trace_qps(config.trace_qp)

    def counters(self) -> dict[str, int]:
        """Every count of engine, connection manager, port and impairment, by name."""
        port = self.port
        counters = dict(self.engine.counters)
        for name, count in self.cm.counters.items():
            counters[f"cm_{name}"] = count
        counters |= self.cm.messages
        for name in ("tx_packets", "tx_bytes", "rx_packets", "rx_bytes", "tx_busy", "tx_errors", "loopback_lost"):
            counters[name] = getattr(port, name)
        if port.impairment is not None:
            for name in ("lost", "duplicated", "reordered", "corrupted"):
                counters[f"impairment_{name}"] = getattr(port.impairment.faults, name)
        return counters

    # -- traces ----------------------------------------------------------------------------------------------------

    def trace_to(self, path: str | None) -> None:
        """Write one line for each command of a program to `path` (None: stop)."""
        if self._trace_file is not None:
            self._trace_file.close()
            self._trace_file = None
        self.commands.trace = self.cm_files.trace = None
        if path:
            self._trace_file = CommandTrace(path)
            self.commands.trace = self.cm_files.trace = self._trace_file.write

    def trace_qps(self, path: str | None, qpns: list[int] | None = None, limit: int = DEFAULT_LIMIT) -> int:
        """Trace queue pairs (None: all of them, those to come too) to `path`; None ends the trace.

        Returns the number of lines of the trace that was on before, which ends. Raises OSError.
        """
        about = {
            "interface": self.config.interface,
            "addresses": [str(ipaddress.ip_address(address)) for address in self.adapter.addresses()],
            "number_base": self.config.number_base,
        }
        before, self.loop.qp_trace = self.loop.qp_trace, None
        lines = before.close() if before is not None else 0
        if path:
            self.loop.qp_trace = QpTrace(self.engine, path, qpns, about=about, limit=limit)
        return lines

    # -- contexts --------------------------------------------------------------------------------------------------

    def watch_context(self, context: Context) -> None:
        """Listen to a context's doorbell and to the end of its process."""
        self.loop.listen(context, self.drop_context)
        with contextlib.suppress(StateError):  # no descriptor: the doorbell's end tells, too
            if context.pidfd < 0:
                context.pidfd = open_process(context.pid)
        if context.pidfd >= 0:
            self.descriptors.watch(context.pidfd, lambda _: self.drop_context(context))

    def unwatch_context(self, context: Context) -> None:
        """Be deaf to a context: its end of file and its process's end mean nothing now."""
        self.loop.ignore(context)
        if context.pidfd >= 0:
            self.descriptors.unwatch(context.pidfd)
            os.close(context.pidfd)
            context.pidfd = -1

    def drop_context(self, context: Context) -> None:
        """The program closed the device or ended: free everything it owned."""
        if context.held or context.id not in self.adapter.contexts:
            return
        self.loop.settle(context)
        self.loop.last_turn(context.queue_pairs)
        self.unwatch_context(context)
        self.adapter.forget(context)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def serve_waiting(self) -> None:
        """Take in the commands that have been sent by now."""
        for _ in range(DRAIN_LIMIT):  # others may go on sending
            if not self.commands.serve(64, MAX_SLEEP):
                break

    def drain(self, context: Context) -> None:
        """Take in every command and doorbell that a frozen program has sent (nothing new can come)."""
        self.serve_waiting()
        self.commands.fail_waiting(context)
        context.channel.silence_doorbell()
        context.channel.arm_doorbell()
        self.loop.ring(context)

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

        source: the IP address of queue pairs whose own is not here (None: they keep it). Raises StateError, and changes
        nothing, when no descriptor is left to watch the program with.
        """
        if context.pidfd < 0:
            context.pidfd = open_process(context.pid)
        context.held = False
        handles = []
        for qp in context.queue_pairs:
            path = qp.transport.attributes.path
            if path is not None:
                here = path.source_ip in self.port.own or (source is not None and len(source) != len(path.source_ip))
                path = path.replace(source_mac=self.port.mac, source_ip=None if here else source)
            qp.transport.resume(path)
            handles.append(qp.handle)
        context.channel.all_dirty(handles)
        self.watch_context(context)
        if context.pid is not None and context.pidfd < 0:
            self.drop_context(context)  # it ended while it was held
            return
        self.loop.wake(context)

    def make_channel(self, identifier: str, owner: tuple[int, int], taken: list[tuple[int, int]]) -> FileChannel:
        """The channel of a context that is being restored."""
        return FileChannel(self.config.run_directory, identifier, owner, taken)

    # -- events ----------------------------------------------------------------------------------------------------

    def _own_changed(self) -> None:
        self.port.set_addresses(self.adapter.addressing.own())

    def _link_changed(self, up: bool, carrier: bool, mtu: int) -> None:
        if self.config.mtu is not None:
            mtu = min(mtu, self.config.mtu)
        self.adapter.set_link(Link(up, carrier, mtu, link_speed(self.config.interface)))

    def _unfollowed(self, address: bytes) -> None:
        with contextlib.suppress(StateError):  # not in the table: taken out by a command, or row 0
            self.adapter.remove_address(address)

    def _followed(self, address: bytes) -> None:
        try:
            self.adapter.add_address(address)
        except StateError as error:
            print(f"softroce_ext: {address_text(address)}: {error}", file=sys.stderr)

    def _gid_changed(self, index: int, gid: bytes | None) -> None:
        self._own_changed()
        try:
            self.sysfs.set_gid(index, gid)
        except OSError as error:  # no descriptor, no room: programs can take both
            print(f"softroce_ext: row {index} of the GID table is not shown: {error}", file=sys.stderr)

    def _port_changed(self) -> None:
        try:
            self.sysfs.set_port()
        except OSError as error:
            print(f"softroce_ext: the change of {self.config.interface} is not shown: {error}", file=sys.stderr)

    def _serve(self) -> None:
        self.commands.serve()

    def _ring_before(self, context: Context) -> None:
        if context.channel.rung() or self.engine.has_work():
            self.loop.settle(context)

    # -- beginning and end -------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Run until `stop`."""
        self.loop.run()

    def stop(self) -> None:
        """Leave `run` after this round."""
        self.loop.stop()

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
        self.interface.close()
        self.trace_to(None)
        if self.port.capture is not None:
            self.port.capture.close()
        self.port.close()
        self.descriptors.close()
        clear(self.config.run_directory)


def clear(run: Path) -> None:
    """Remove what a NIC (an earlier one that was killed, too) left in its run directory, and nothing else."""
    for name in ("sys", "dev", "ctx"):
        remove_tree(run / name)
    for name in ("uverbs.sock", "control.sock"):
        (run / name).unlink(missing_ok=True)
