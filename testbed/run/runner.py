"""One run of a topology, from the checks of the machine to the summary, and everything taken down in reverse order.

The stages are those of `events.STAGES`. Whatever happens (a failure, Ctrl-C, SIGTERM), what exists is removed,
newest first; what a killed run leaves is in its state file, for `testbed clean`.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import os
import queue
import secrets
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from testbed.base import ip6
from testbed.base.errors import BadInput, EnvironmentProblem, Interrupted, TestbedError
from testbed.checkpoint import criu_binary
from testbed.cleanup.state import RunState, read, runs
from testbed.lab.applications import Applications
from testbed.lab.hosts import Host, connect_all
from testbed.lab.session import Session
from testbed.lab.transport import Address
from testbed.network import Network, fixtures
from testbed.record import summary as report
from testbed.record import versions
from testbed.record.folder import Listener, RunFolder
from testbed.run import captures
from testbed.run.schedule import Schedule, addresses_at_end
from testbed.topology import ResolvedHost, ResolvedTopology
from testbed.topology.models import HEADROOM

COUNTER_INTERVAL: Final = 0.5
"""Seconds between two readings of a NIC's counters."""

_DISK_TROUBLE: Final = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ENOENT)
_BLAMES: Final = {BadInput: "input", EnvironmentProblem: "environment", Interrupted: "interrupt"}
_INTERRUPTS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class Options:
    """How to run, beside what to run."""

    root: Path | None = None
    """Root of the results folders; None: `results.default_root()`."""
    seed: int | None = None
    """In place of the topology's."""
    listener: Listener | None = None
    """Called with every event, from any thread (a live view)."""
    meanwhile: Callable[[Session], Any] | None = None
    """Called in the main thread once the applications run, by an experiment; the run goes on when it returns."""


def run(topology: ResolvedTopology, options: Options | None = None) -> report.Summary:
    """Run `topology` once; the summary returned is also in the results folder.

    What fails, interrupts (Ctrl-C, SIGTERM) or cannot be had on this machine is in its `problems`, by blame. Nothing
    that the run has made is left in any case. Raises EnvironmentProblem only if the results cannot be written.
    """
    options = options or Options()
    if options.seed is not None:
        topology = replace(topology, seed=options.seed)
    try:
        folder = RunFolder.create(topology.name, seed=topology.seed, root=options.root)
    except OSError as error:
        raise EnvironmentProblem(
            f"no results folder can be made: {error}", hint="choose another place: --results FOLDER"
        ) from error
    try:
        with _signals(), folder:
            if options.listener is not None:
                folder.subscribe(options.listener)
            return _Run(topology, options, folder).run()
    except OSError as error:
        if error.errno not in _DISK_TROUBLE:
            raise
        raise EnvironmentProblem(
            f"the results cannot be written: {error}", where=str(folder.path), hint="the run has been taken down"
        ) from error


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM and SIGHUP interrupt as Ctrl-C does, which does so itself even where a shell started us with it ignored.

    Only possible, and only needed, in the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    old = {number: signal.signal(number, interrupt) for number in _INTERRUPTS}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class _Run:
    """The stages of one run; `_stack` undoes them."""

    def __init__(self, topology: ResolvedTopology, options: Options, folder: RunFolder) -> None:
        self.topology = topology
        self.options = options
        self.folder = folder
        self.problems: list[report.Problem] = []
        self.session: Session | None = None
        self.schedule: Schedule | None = None
        self.environment = report.Environment()
        self.nics: dict[str, dict[str, int]] = {}
        self.apps: list[report.App] = []
        self._failure: Exception | None = None
        self._stack = contextlib.ExitStack()

    def run(self) -> report.Summary:
        folder, error = self.folder, None
        folder.write_topology(self.topology.to_plain())
        folder.event("run_started", topology=self.topology.name, seed=self.topology.seed)
        try:
            self._run()
        except TestbedError as caught:
            error = caught
        except KeyboardInterrupt:
            error = Interrupted()
        finally:
            with _no_interrupt(lambda: folder.event("note", text="still removing what was made; please wait")):
                try:
                    self._collect(error)
                finally:
                    self._take_down()
        summary = self._summary(error)
        if self.topology.report.plots and summary.migrations:
            from testbed.view import plots  # half a second for matplotlib, when nobody waits for a program any more

            plots.run_timeline(folder.path / "timeline.png", summary)
        folder.event("run_finished", ok=summary.ok)
        folder.finish(summary)
        return summary

    def _run(self) -> None:
        with concurrent.futures.ThreadPoolExecutor(2, thread_name_prefix="prepare") as pool:
            self.folder.event("stage", name="prepare")
            ahead = pool.submit(_prepare, bool(self.topology.migrations))
            state = RunState.create(f"{os.getpid()}-{secrets.token_hex(3)}")
            self._stack.callback(_forget, state)
            self.folder.event("stage", name="network", detail=_size(self.topology))
            network = Network(self.topology, self.folder.path, state)
            self._stack.callback(network.stop)
            network.start()
            for limit in network.limits:
                self.folder.event("limit", wanted=limit["wanted"], got=limit["got"], why=limit["why"])
            session = Session(self.topology, self.folder, state, network)
            self.session = session
            self.environment = ahead.result().model_copy(
                update={"datapath": network.datapath, "controller": network.controller_version}
            )
        self.folder.write_environment(self.environment)
        self._connect(session)
        self._start_nics(session)
        self.folder.event("stage", name="apps")
        self.schedule = Schedule(session)
        self._stack.callback(self.schedule.stop)
        session.apps.start_all()
        self.schedule.start()
        self.folder.event("stage", name="running")
        if self.options.meanwhile is not None:
            self.options.meanwhile(session)
        session.apps.wait(until=lambda: self._failure is not None)
        if self._failure is not None:
            raise self._failure
        self.schedule.finish()

    def _connect(self, session: Session) -> None:
        self._stack.callback(_close_all, session.hosts)
        session.apps = Applications(self.topology, session.hosts, self.folder)

        def on_event(host: str, event: Any) -> None:
            try:
                self._on_event(session, host, event)
            except Exception as error:  # a full disk, or a defect: the main thread's to raise, the reader must go on
                self._failure = self._failure or error

        addresses = [Address.of_virtual(host, session.state.run_id) for host in session.network.hosts.values()]
        session.hosts.update(connect_all(addresses, on_event))
        for name, host in session.network.hosts.items():
            self.folder.event("host_ready", host=name, ip=host.ip, node_ip=host.node_ip)

    def _start_nics(self, session: Session) -> None:
        self.folder.event("stage", name="nics")
        own = [app for app in self.topology.apps.values() if app.own_address]
        with session.controller() as controller:
            for app in own:
                session.hosts[app.host].call("address_add", ip=app.address, prefix=self.topology.hosts[app.host].prefix)
                controller.add_address(app.address, app.host)

        def start(host: ResolvedHost) -> None:
            ips = [host.ip, *(app.address for app in own if app.host == host.name)]
            addresses = [address for ip in ips for address in ip6.both(ip)]
            session.hosts[host.name].call(
                "start_nic",
                addresses=addresses,
                number_base=host.number_base,
                options=self._nic_options(session, host),
                timeout=90,
            )
            self.folder.event("nic_ready", host=host.name, ip=host.ip)
            session.hosts[host.name].call("poll_nic", interval=COUNTER_INTERVAL)

        _in_parallel(start, list(self.topology.hosts.values()))

    def _nic_options(self, session: Session, host: ResolvedHost) -> list[str]:
        # The NIC wants the interface MTU whose active RDMA MTU is the one wished for.
        options = ["--mtu", str(host.nic.mtu + HEADROOM), "--seed", str(self.topology.seed + host.index)]
        if not host.nic.migros:
            options.append("--no-migros")
        if host.nic.capture:
            options += ["--capture", str(self.folder.pcap(host.name))]
        if host.nic.trace:
            path = self.folder.trace(host.name)
            path.parent.mkdir(exist_ok=True)
            options += ["--trace-qp", str(path)]
        impair = session.network.nic_impairments.get(host.name, host.nic.impair)
        if impair:
            options += ["--impair", ",".join(f"{key}={value:g}" for key, value in impair.items())]
        return options

    # ---- what happens meanwhile --------------------------------------------------------------------------------------

    def _on_event(self, session: Session, host: str, event: Any) -> None:
        """An agent's event, in the thread of that host."""
        name = event["event"]
        if name == "counters":
            self.nics[host] = event["counters"]
            self.folder.event("counters", at=event["t"], host=host, counters=event["counters"])
        elif name == "nic_ended":
            self._problem(f"{host}", f"its NIC ended with {event['code']}", event.get("log") or None)
        elif name == "agent_gone" and not event["expected"]:
            self._problem(f"{host}", f"its agent has gone: {event['reason']}")
        session.apps.on_event(host, event)

    def _problem(self, where: str, error: str, hint: str | None = None) -> None:
        self.problems.append(report.Problem(where=where, error=error, hint=hint))
        self.folder.event("problem", where=where, error=error, hint=hint)

    # ---- the end -----------------------------------------------------------------------------------------------------

    def _collect(self, error: TestbedError | None) -> None:
        """Note what went wrong; fetch logs and last counters. What cannot be had is passed over."""
        if error is not None:
            blame = next((name for kind, name in _BLAMES.items() if isinstance(error, kind)), "run")
            problem = {"blame": blame, "where": error.where or "run", "error": error.message, "hint": error.hint}
            self.problems.append(report.Problem.model_validate(problem))
        if self.session is None or not self.session.hosts:
            return
        self.folder.event("stage", name="collect")
        self.apps = self.session.apps.collect()

        def collect(host: Host) -> None:
            with contextlib.suppress(TestbedError):
                log = host.call("read_nic_log", timeout=10)["text"]
                if log:
                    self.folder.log(f"{host.name}.nic.log").write_text(log)
            with contextlib.suppress(TestbedError):
                self.nics[host.name] = host.call("nic", command="counters", timeout=10)["counters"]

        _in_parallel(collect, [host for host in self.session.hosts.values() if host.alive])

    def _take_down(self) -> None:
        """Remove everything, newest first; what stayed is a problem of the run, and in its state file."""
        try:
            with self._stack:
                self.folder.event("stage", name="teardown")
        except TestbedError as problem:
            self._problem(problem.where or "teardown", problem.message, problem.hint)

    def _summary(self, error: TestbedError | None) -> report.Summary:
        migrations = self.schedule.records if self.schedule is not None else []
        if self.session is not None and hasattr(self.session, "apps"):
            migrations = [
                record.model_copy(update={"app_exit_code": self.session.apps.all[record.app].code})
                for record in migrations
            ]
            self.problems += [p for app in self.session.apps.all.values() for p in app.problems]
        self.problems += [
            report.Problem(where=f"migrations[{m.index}]", error=m.error or "failed", hint=m.hint)
            for m in migrations
            if not m.ok
        ]
        address_at = addresses_at_end(self.topology, migrations)
        complete = len(migrations) == len(self.topology.migrations) and len(self.apps) == len(self.topology.apps)
        return report.Summary(
            ok=error is None and complete and not self.problems and all(app.ok for app in self.apps),
            topology=self.topology.name,
            run_id=self.folder.run_id,
            started=self.folder.started_utc,
            duration_s=self.folder.now(),
            seed=self.topology.seed,
            interrupted=isinstance(error, Interrupted),
            problems=self.problems,
            limits=[report.Limit(**limit) for limit in self.session.network.limits] if self.session else [],
            environment=self.environment,
            hosts=[self._host(host, address_at) for host in self.topology.hosts.values()],
            apps=self.apps,
            migrations=migrations,
            flow_changes=self.schedule.flow_changes if self.schedule is not None else [],
            folder=str(self.folder.path),
        )

    def _host(self, host: ResolvedHost, address_at: dict[str, str]) -> report.Host:
        trace = self.folder.trace(host.name)
        return report.Host(
            name=host.name,
            ip=host.ip if address_at[host.ip] == host.name else None,
            node_ip=host.node_ip,
            nic=self.nics.get(host.name, {}),
            captures=captures.found(self.folder, host.name),
            trace=self.folder.relative(trace) if trace.exists() else None,
        )


@contextlib.contextmanager
def _no_interrupt(tell: Callable[[], None]) -> Iterator[None]:
    """A second Ctrl-C must not cut the clean-up short: it is answered by `tell`, in another thread.

    The handler itself takes no lock: the main thread, which it interrupts, may hold the very one that `tell` needs.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: queue.SimpleQueue[bool] = queue.SimpleQueue()  # its `put` may be called by a signal handler

    def answer() -> None:
        while asked.get():
            with contextlib.suppress(OSError):  # a full disk: whoever writes next in the main thread says so
                tell()

    teller = threading.Thread(target=answer, name="tell-interrupts", daemon=True)
    # Before the thread, which may have to wait for a processor: nothing may be interrupted from here on.
    old = {number: signal.signal(number, lambda *_: asked.put(True)) for number in _INTERRUPTS}
    try:
        teller.start()
        yield
    finally:
        asked.put(False)
        if teller.ident is not None:
            teller.join()
        for number, handler in old.items():
            signal.signal(number, handler)


def _prepare(migrations: bool) -> report.Environment:
    """What can be done while the network is built: compile, load paramiko, find CRIU, ask for versions."""
    import paramiko  # noqa: F401 - 0.2 s that the connections then do not wait for

    from softroce_ext.native import build

    try:
        for name in ("app_init", "bridge"):
            build.path(name)
    except build.BuildError as error:
        raise EnvironmentProblem(str(error), where="softroce_ext/native") from error
    try:
        criu = criu_binary.find()
    except TestbedError:
        if migrations:
            raise
        criu = None
    return versions.collect(criu=criu)


def _in_parallel(act: Callable[[Any], None], items: list[Any]) -> None:
    """`act` on every item at once; raises the first error when all have ended."""
    if items:
        with concurrent.futures.ThreadPoolExecutor(len(items)) as pool:
            for future in [pool.submit(act, item) for item in items]:
                future.result()


def _close_all(hosts: dict[str, Host]) -> None:
    _in_parallel(Host.close, list(hosts.values()))


def _forget(state: RunState) -> None:
    """The last thing: the state file goes, unless it names what could not be removed: then `testbed clean` needs it."""
    if not read(state.directory).entries:
        state.close()
    if not runs():
        fixtures.clean()


def _size(topology: ResolvedTopology) -> str:
    counts = {"host": len(topology.hosts), "switch": len(topology.switches), "link": len(topology.links)}
    plurals = {"switch": "switches"}
    return ", ".join(f"{n} {name if n == 1 else plurals.get(name, name + 's')}" for name, n in counts.items())
