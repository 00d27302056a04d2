"""The NIC process: port, engine, programs and management, joined; `loop` runs them."""

from __future__ import annotations

import contextlib
import ipaddress
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

from softroce_ext.cm.manager import CommunicationManager
from softroce_ext.cm.routing import Memberships, Sources
from softroce_ext.cm.server import CmFiles
from softroce_ext.control.server import ControlServer
from softroce_ext.device.adapter import Adapter
from softroce_ext.device.errors import StateError
from softroce_ext.device.link import Link
from softroce_ext.device.user_context import UserContext
from softroce_ext.device.user_queue_pair import UserQueuePair
from softroce_ext.port.capture import Capture
from softroce_ext.port.ethtool import link_speed
from softroce_ext.port.impairment import Impairment, ImpairmentSpec
from softroce_ext.port.interface import InterfaceWatch
from softroce_ext.port.neighbours import Neighbours
from softroce_ext.port.packet_socket import Port
from softroce_ext.process.loop import Descriptors, Loop
from softroce_ext.process.management import Management
from softroce_ext.process.user_contexts import UserContexts
from softroce_ext.trace.commands import CommandTrace
from softroce_ext.trace.queue_pairs import DEFAULT_LIMIT, QpTrace
from softroce_ext.transport.engine import Engine, EngineConfig
from softroce_ext.uverbs.channel import FileChannel
from softroce_ext.uverbs.hw_counters import CounterFiles
from softroce_ext.uverbs.removal import remove_tree
from softroce_ext.uverbs.server import CommandServer
from softroce_ext.uverbs.sysfs import SysfsPicture
from softroce_ext.wire.path import address_text

MAX_WINDOW: Final = 384
"""Packets that one queue pair may have in flight. Linux rxe has 128; here a round trip takes several time slices."""


@dataclass(slots=True)
class NicConfig:
    """The options of the command line."""

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
    """Seconds without work before the loop goes to sleep. Spinning takes the processor from programs that poll; it is
    useful only where there are more processors than busy processes."""
    trace: str | None = None
    trace_qp: str | None = None
    follow: bool = False
    """The GID table follows the interface's addresses, as Linux's does."""


class Nic:
    """One NIC (device.host.Host). `run` returns when `stop` was called; `close` removes every file."""

    def __init__(self, config: NicConfig) -> None:
        """Raises OSError when the interface, the addresses or the run directory cannot be used."""
        self.config = config
        impaired = config.impairment != ImpairmentSpec()
        self.impairment = Impairment(config.impairment, config.seed) if impaired else None
        self.port = Port(config.interface, self.impairment)
        if config.mtu is not None:
            self.port.mtu = min(self.port.mtu, config.mtu)
        self.capture: Capture | None = None
        self.engine = Engine(EngineConfig(migros=config.migros, window=MAX_WINDOW))
        self.neighbours = Neighbours(self.port.index)
        self.adapter = Adapter(self.engine, self.port.mac, self.port.mtu, config.number_base, host=self)
        self._memberships = Memberships(self.port.index)
        self.cm = CommunicationManager(
            self.adapter, self.engine.gsi, secrets.randbelow, Sources(self.port.index), self._memberships
        )
        self.engine.peer_moved = self.cm.connections.peer_moved

        run = config.run_directory
        run.mkdir(parents=True, exist_ok=True)
        clear(run)
        self.sysfs = SysfsPicture(run, self.adapter, config.interface)
        self.sysfs.create()
        self._counter_files = CounterFiles(self.sysfs.port, self.counters)

        self.descriptors = Descriptors()
        self.cm_files = CmFiles(run, self.cm, self.descriptors, time.monotonic)
        self.commands = CommandServer(
            run, self.adapter, opened=self._opened, before_command=self.flush_before_command, cm=self.cm_files
        )
        self.loop = Loop(
            config.spin, self.descriptors, self.engine, self.port, self.commands, self.cm, self._counter_files
        )
        self.user_contexts = UserContexts(
            self.adapter, self.descriptors, loop=self.loop, commands=self.commands, port=self.port
        )
        follow = (self._address_added, self._address_removed) if config.follow else ()
        self.interface = InterfaceWatch(self.port.index, self._interface_changed, *follow)
        self.management = Management(self)
        self.control = ControlServer(
            run / "control.sock",
            self.management.handle,
            self.descriptors.watch,
            self.descriptors.unwatch,
            self.loop.wait_for,
        )
        self._trace_file: CommandTrace | None = None
        self._start()

    def _start(self) -> None:
        """Everything is made: take the addresses, and begin to watch."""
        config = self.config
        if config.capture:
            self.capture_to(config.capture, config.snaplen)
        self.port.set_addresses(self.adapter.addressing.own())
        for address in config.addresses:
            self.adapter.addressing.add(address)
        self.interface.start()
        self.descriptors.watch(self.interface.fileno(), lambda _: self.interface.read())
        self.descriptors.watch(self.commands.fileno(), self._serve_commands)
        if config.trace:
            self.trace_to(config.trace)
        if config.trace_qp:
            self.trace_qps(config.trace_qp)

    def _serve_commands(self, _events: int) -> None:
        self.commands.serve()

    def counters(self) -> dict[str, int]:
        """Return every count of engine, connection manager, port and impairment, by name."""
        counters = dict(self.engine.counters)
        for name, count in self.cm.counters.items():
            counters[f"cm_{name}"] = count
        counters |= self.cm.messages
        counters |= asdict(self.port.counters)
        if self.impairment is not None:
            for name in ("lost", "duplicated", "reordered", "corrupted"):
                counters[f"impairment_{name}"] = getattr(self.impairment.faults, name)
        return counters

    # -- capture and traces ----------------------------------------------------------------------------------------

    def capture_to(self, path: str | None, snaplen: int) -> int:
        """Capture all frames to `path` (None: stop). Returns the frames of the capture before. Raises OSError."""
        new = Capture(path, snaplen) if path else None
        frames = 0
        if self.capture is not None:
            self.port.observers.remove(self.capture)
            frames = self.capture.frames
            self.capture.close()
        self.capture = new
        if new is not None:
            self.port.observers.append(new)
        return frames

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
        """Trace queue pairs (None: all of them, later ones included) to `path`; None ends the trace.

        Returns the number of lines of the previous trace, which ends. Raises OSError.
        """
        about = {
            "interface": self.config.interface,
            "addresses": [str(ipaddress.ip_address(address)) for address in self.adapter.addressing.addresses()],
            "number_base": self.config.number_base,
        }
        before, self.loop.qp_trace = self.loop.qp_trace, None
        lines = before.close() if before is not None else 0
        if path:
            self.loop.qp_trace = QpTrace(self.engine, path, qpns, about=about, limit=limit)
        return lines

    # -- programs --------------------------------------------------------------------------------------------------

    def _opened(self, context: UserContext) -> None:
        self.user_contexts.watch(context)

    def flush_before_command(self, context: UserContext) -> None:
        """Serve a doorbell that a program rang before its command."""
        if context.channel.rung() or self.engine.has_work():
            self.loop.settle(context)

    def make_channel(self, identifier: str, owner: tuple[int, int], taken: list[tuple[int, int]]) -> FileChannel:
        """The channel of a context that is being restored."""
        return FileChannel(self.config.run_directory, identifier, owner, taken)

    # -- device.host.Host ------------------------------------------------------------------------------------------

    def resolve(self, address: bytes) -> bytes | None:
        """device.host.Host."""
        return self.neighbours.mac(address)

    def link_speed(self) -> int | None:
        """device.host.Host."""
        return link_speed(self.config.interface)

    def gid_changed(self, index: int, gid: bytes | None) -> None:
        """device.host.Host."""
        self.port.set_addresses(self.adapter.addressing.own())
        try:
            self.sysfs.set_gid(index, gid)
        except OSError as error:  # no descriptor, no room: programs can take both
            print(f"softroce_ext: row {index} of the GID table is not shown: {error}", file=sys.stderr)

    def link_changed(self) -> None:
        """device.host.Host."""
        try:
            self.sysfs.set_port()
        except OSError as error:
            print(f"softroce_ext: the change of {self.config.interface} is not shown: {error}", file=sys.stderr)

    def group_changed(self, address: bytes, member: bool) -> None:
        """device.host.Host."""
        self.port.set_group(address, member)

    def last_turn(self, leaving: Sequence[UserQueuePair]) -> None:
        """device.host.Host."""
        self.loop.last_turn(leaving)

    # -- the interface ---------------------------------------------------------------------------------------------

    def _interface_changed(self, up: bool, carrier: bool, mtu: int) -> None:
        if self.config.mtu is not None:
            mtu = min(mtu, self.config.mtu)
        self.adapter.set_link(Link(up, carrier, mtu, self.link_speed()))

    def _address_removed(self, address: bytes) -> None:
        with contextlib.suppress(StateError):  # not in the table: a command removed it, or it is row 0
            self.adapter.addressing.remove(address)

    def _address_added(self, address: bytes) -> None:
        try:
            self.adapter.addressing.add(address)
        except StateError as error:
            print(f"softroce_ext: {address_text(address)}: {error}", file=sys.stderr)

    # -- run and close -----------------------------------------------------------------------------------------------

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
        self.user_contexts.close_all()
        self._counter_files.close()
        self.trace_qps(None)
        self.control.close()
        self.commands.close()
        self.neighbours.close()
        self.interface.close()
        self.trace_to(None)
        self.capture_to(None, 0)
        self.port.close()
        self.descriptors.close()
        clear(self.config.run_directory)


def clear(run: Path) -> None:
    """Remove what a NIC left in its run directory (an earlier one that was killed, too), and nothing else."""
    for name in ("sys", "dev", "ctx"):
        remove_tree(run / name)
    for name in ("uverbs.sock", "control.sock"):
        (run / name).unlink(missing_ok=True)
