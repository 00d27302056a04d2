"""One run of a topology, from the checks of the machine to the summary; everything is removed in reverse order.

The stages are those of `events.STAGES`. Whatever happens (a failure, Ctrl-C, SIGTERM), what exists is removed, newest
first; what a killed run leaves is in its state file, for `testbed clean`.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from testbed.base import ip6
from testbed.base.errors import BadInput, EnvironmentProblem, Interrupted, TestbedError
from testbed.checkpoint import criu_binary
from testbed.cleanup.state import RunState, read, runs
from testbed.lab.hosts import Host, connect_all
from testbed.lab.session import Session
from testbed.lab.transport import Address
from testbed.network import Network, fixtures
from testbed.record import summary as report
from testbed.record import versions
from testbed.record.folder import Listener, RunFolder
from testbed.run import captures, interrupts
from testbed.run.schedule import Schedule, addresses_at_end
from testbed.topology import ResolvedHost, ResolvedTopology

COUNTER_INTERVAL: Final = 0.5
"""Seconds between two readings of a NIC's counters."""

_DISK_TROUBLE: Final = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ENOENT)
_BLAMES: Final = {BadInput: "input", EnvironmentProblem: "environment", Interrupted: "interrupt"}


@dataclass(frozen=True, slots=True)
class Options:
    """How to run a topology."""

    root: Path | None = None
    """Root of the results folders; None: `record.folder.default_root()`."""
    seed: int | None = None
    """Seed that replaces the topology's; None: the topology's."""
    listener: Listener | None = None
    """Called with every event, from any thread, for example by a live view."""
    meanwhile: Callable[[Session], Any] | None = None
    """Called in the main thread once the applications run, for an experiment; the run continues when it returns."""


def run(topology: ResolvedTopology, options: Options | None = None) -> report.Summary:
    """Run `topology` once and return the summary, which is also in the results folder.

    What fails, interrupts (Ctrl-C, SIGTERM) or is missing on this machine is in its `problems`, by blame. In each case
    everything that the run has made is removed. Raises EnvironmentProblem only if the results cannot be written.
    """
    options = options or Options()
    if options.seed is not None:
        topology = replace(topology, seed=options.seed)
    try:
        folder = RunFolder.create(topology.name, seed=topology.seed, root=options.root)
    except OSError as error:
        raise EnvironmentProblem(
            f"cannot create the results folder: {error}", hint="choose another one with --results FOLDER"
        ) from error
    try:
        with interrupts.raised(), folder:
            if options.listener is not None:
                folder.subscribe(options.listener)
            return _Run(topology, options, folder).run()
    except OSError as error:
        if error.errno not in _DISK_TROUBLE:
            raise
        raise EnvironmentProblem(
            f"cannot write the results: {error}", where=str(folder.path), hint="everything else of the run was removed"
        ) from error


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
            with interrupts.postponed(
                lambda: folder.event("note", text="still removing what the run has created; please wait")
            ):
                try:
                    self._collect(error)
                finally:
                    self._take_down()
        summary = self._summary(error)
        if self.topology.report.plots and summary.migrations:
            from testbed.view import plots  # loads matplotlib for half a second, when no program runs any more

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
            session = self.session = Session(self.topology, self.folder, state, network)
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

        def on_event(host: str, event: Any) -> None:
            try:
                self._on_event(session, host, event)
            except Exception as error:  # a full disk, or a defect: the main thread raises it, the reader continues
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
        options = ["--mtu", str(host.nic.interface_mtu), "--seed", str(self.topology.seed + host.index)]
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

    # ---- events of the agents ----------------------------------------------------------------------------------------

    def _on_event(self, session: Session, host: str, event: Any) -> None:
        """Take an agent's event, in the thread that reads from its host."""
        name = event["event"]
        if name == "counters":
            self.nics[host] = event["counters"]
            self.folder.event("counters", at=event["t"], host=host, counters=event["counters"])
        elif name == "nic_ended":
            self._problem(host, f"the NIC ended with code {event['code']}", event.get("log") or None)
        elif name == "agent_gone" and not event["expected"]:
            self._problem(host, f"the connection to the agent ended: {event['reason']}")
        session.apps.on_event(host, event)

    def _problem(self, where: str, error: str, hint: str | None = None) -> None:
        self.problems.append(report.Problem(where=where, error=error, hint=hint))
        self.folder.event("problem", where=where, error=error, hint=hint)

    # ---- the end -----------------------------------------------------------------------------------------------------

    def _collect(self, error: TestbedError | None) -> None:
        """Note what went wrong, and fetch logs and last counters. What cannot be fetched is passed over."""
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
        """Remove everything, newest first; what remains is a problem of the run and stays in its state file."""
        try:
            with self._stack:
                self.folder.event("stage", name="teardown")
        except TestbedError as problem:
            self._problem(problem.where or "teardown", problem.message, problem.hint)

    def _migrations(self) -> list[report.Migration]:
        """The records of the migrations, with the exit codes that their applications ended with."""
        if self.schedule is None or self.session is None:
            return []
        apps = self.session.apps.all
        return [record.model_copy(update={"app_exit_code": apps[record.app].code}) for record in self.schedule.records]

    def _summary(self, error: TestbedError | None) -> report.Summary:
        migrations = self._migrations()
        if self.session is not None:
            self.problems += [problem for app in self.session.apps.all.values() for problem in app.problems]
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


def _prepare(migrations: bool) -> report.Environment:
    """Do what is possible while the network is built: compile, load paramiko, find CRIU, collect versions."""
    import paramiko  # noqa: F401 - takes 0.2 s, which the connections then do not wait for

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
    """Call `act` with every item at once; when all calls have ended, raise the first error."""
    if items:
        with concurrent.futures.ThreadPoolExecutor(len(items)) as pool:
            for future in [pool.submit(act, item) for item in items]:
                future.result()


def _close_all(hosts: dict[str, Host]) -> None:
    _in_parallel(Host.close, list(hosts.values()))


def _forget(state: RunState) -> None:
    """Remove the state file last, unless it names what could not be removed, which `testbed clean` then needs."""
    if not read(state.directory).entries:
        state.close()
    if not runs():
        fixtures.clean()


def _size(topology: ResolvedTopology) -> str:
    """The size of a topology in words: `3 hosts, 1 switch, 3 links`."""
    counts = {"host": len(topology.hosts), "switch": len(topology.switches), "link": len(topology.links)}
    plurals = {"switch": "switches"}
    return ", ".join(f"{n} {name if n == 1 else plurals.get(name, name + 's')}" for name, n in counts.items())
