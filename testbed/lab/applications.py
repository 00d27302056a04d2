"""The applications of a run: started in order, followed when they move, and judged by how they end."""

from __future__ import annotations

import concurrent.futures
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from testbed.base.errors import RunFailed, TestbedError
from testbed.lab import output
from testbed.lab.hosts import Host
from testbed.record import summary
from testbed.record.folder import RunFolder
from testbed.topology import ResolvedApp, ResolvedTopology

READY_TIMEOUT: Final = 15.0
"""Seconds within which a program that others wait for should listen; after that it is considered ready."""
FAILURE_GRACE: Final = 10.0
"""Seconds in which the peers of a failed program may end by themselves, before they are ended."""
LONGEST_LOG: Final = 16 << 20
"""Bytes of each log that are kept: the last ones."""


@dataclass
class Application:
    """One application of the run. Guarded by its Applications."""

    spec: ResolvedApp
    host: str
    """The host where it is now."""
    started: float | None = None
    """time.monotonic() of its start; None before it."""
    ended: float | None = None
    """time.monotonic() at which its end was noticed; None before it."""
    code: int | None = None
    signal: int | None = None
    longest_gap: float | None = None
    """Longest time between two completions, in seconds; None if it had none."""
    lost_nic: float | None = None
    """time.monotonic() at which the NIC that it uses ended; a program that polls may not notice it."""
    problems: list[summary.Problem] = field(default_factory=list)
    killed: str | None = None
    """Why the testbed has ended it; None if it has not done so."""

    @property
    def running(self) -> bool:
        """Whether it has started and not ended."""
        return self.started is not None and self.ended is None

    @property
    def as_expected(self) -> bool:
        """Whether it has ended with the exit code that the topology expects."""
        return self.ended is not None and self.code == self.spec.expect and self.killed is None

    def end_in_words(self) -> str:
        """How it ended, for example `ended with code 1` or `was ended by signal 9`; `is running` before that."""
        if self.killed is not None:
            return self.killed
        if self.ended is None:
            return "is running" if self.started is not None else "was not started"
        return f"ended with code {self.code}" if self.code is not None else f"was ended by signal {self.signal}"


class Applications:
    """All applications of a run. Thread-safe; `on_event` is a listener of every host."""

    def __init__(self, topology: ResolvedTopology, hosts: Mapping[str, Host], folder: RunFolder) -> None:
        self.all = {name: Application(spec, spec.host) for name, spec in topology.apps.items()}
        self._hosts = hosts
        self._folder = folder
        self._tail = topology.report.tail
        self._changed = threading.Condition()

    def host_of(self, name: str) -> Host:
        """Return the host where application `name` is."""
        with self._changed:
            return self._hosts[self.all[name].host]

    def running(self, name: str) -> bool:
        """Whether application `name` has started and not ended."""
        with self._changed:
            return self.all[name].running

    # ---- starting ----------------------------------------------------------------------------------------------------

    def start_all(self) -> None:
        """Start each application when those in its `after` are ready, independent ones at the same time.

        Raises the TestbedError of the first start that failed; applications that wait for it are not started.
        """
        if not self.all:
            return
        needed = {name for app in self.all.values() for name in app.spec.after}
        ready: dict[str, concurrent.futures.Future[None]] = {name: concurrent.futures.Future() for name in self.all}

        def start(name: str) -> None:
            try:
                for other in self.all[name].spec.after:
                    ready[other].result()
                self._start(self.all[name], wait=name in needed)
            except BaseException as error:
                ready[name].set_exception(error)
            else:
                ready[name].set_result(None)

        threads = [threading.Thread(target=start, args=(name,), name=f"start-{name}", daemon=True) for name in self.all]
        for thread in threads:
            thread.start()
        for future in ready.values():
            future.result()

    def _start(self, app: Application, *, wait: bool) -> None:
        host = self._hosts[app.host]
        where = f"apps.{app.spec.name}"
        with self._changed:
            app.started = time.monotonic()
        try:
            answer = host.call("start_app", name=app.spec.name, argv=list(app.spec.argv), env=app.spec.env)
        except TestbedError as error:
            with self._changed:
                app.started = None
            raise type(error)(error.message, where=f"{where} on {error.where}", hint=error.hint) from error
        self._folder.event(
            "app_started", app=app.spec.name, host=app.host, pid=answer["init"], command=app.spec.command
        )
        if not wait:
            return
        answer = host.call("wait_app_ready", name=app.spec.name, patience=READY_TIMEOUT, timeout=READY_TIMEOUT + 30)
        ended = answer["ended"]
        if ended is not None and ended.get("code") != app.spec.expect:
            how = f"code {ended['code']}" if "code" in ended else f"signal {ended['signal']}"
            said = host.call("read_log", name=app.spec.name, stream="stderr", limit=2000)["text"].strip()
            raise RunFailed(
                f"ended with {how} before it listened on a TCP port",
                where=where,
                hint=f"it said: {said.splitlines()[-1]}" if said else f"see {self._folder.path}/logs",
            )
        if ended is None and not answer["listening"]:
            text = f"{app.spec.name} does not listen on a TCP port after {READY_TIMEOUT:g} s; considered ready"
            self._folder.event("note", text=text)

    # ---- events of the agents ----------------------------------------------------------------------------------------

    def on_event(self, host: str, event: Mapping[str, Any]) -> None:
        """Take an agent's event."""
        if event["event"] == "app_exited" and event["app"] in self.all:  # experiments start other programs, too
            with self._changed:
                self.all[str(event["app"])].longest_gap = event.get("longest_gap")
            self._ended(host, str(event["app"]), event.get("code"), event.get("signal"), float(event["t"]))
        elif event["event"] == "nic_ended":
            with self._changed:
                for name in event["apps"]:
                    if name in self.all and self.all[name].host == host:
                        self.all[name].lost_nic = float(event["t"])
        elif event["event"] == "agent_gone" and not event["expected"]:
            with self._changed:
                lost = [name for name, app in self.all.items() if app.host == host and app.running]
            for name in lost:
                self._ended(host, name, None, 9, float(event["t"]))

    def _ended(self, host: str, name: str, code: int | None, number: int | None, at: float) -> None:
        with self._changed:
            app = self.all[name]
            if app.ended is not None:
                return
            # It may have ended at a migration's destination before the testbed learned that it had moved.
            app.host, app.ended, app.code, app.signal = host, at, code, number
            self._changed.notify_all()
        how = {"code": code} if code is not None else {"signal": number}
        self._folder.event("app_exited", app=name, host=host, **how)

    def moved(self, name: str, to: str) -> None:
        """Note that application `name` belongs to host `to` from now on: its migration has been committed."""
        with self._changed:
            app = self.all[name]
            source, app.host = app.host, to
            self._changed.notify_all()
        self._folder.event("app_moved", app=name, from_host=source, to_host=to)
        if not self._hosts[to].alive:  # the agent has gone before the move was known, and its applications with it
            self._ended(to, name, None, 9, time.monotonic())

    # ---- waiting -----------------------------------------------------------------------------------------------------

    def wait(self, until: Callable[[], bool] = lambda: False, poll: float = 0.2) -> None:
        """Wait until every application has ended or `until()` holds; end those that are overdue (`_overdue`)."""
        while True:
            with self._changed:
                if until() or not any(app.running for app in self.all.values()):
                    return
                self._changed.wait(poll)
                overdue = self._overdue(time.monotonic())
            for app, why in overdue:
                self._kill(app, why)

    def _overdue(self, now: float) -> list[tuple[Application, str]]:
        """The applications to be ended, with the reason: timeout, its NIC has ended, or a peer has failed."""
        due = []
        for app in self.all.values():
            if not app.running or app.started is None or app.killed is not None:
                continue
            if now - app.started > app.spec.timeout:
                due.append((app, f"did not end within its timeout of {app.spec.timeout:g} s"))
                continue
            if app.lost_nic is not None and now - app.lost_nic > FAILURE_GRACE:
                due.append((app, f"was ended by the testbed: the NIC of {app.host} has ended"))
                continue
            for other in self._peers(app):
                if other.ended is not None and not other.as_expected and now - other.ended > FAILURE_GRACE:
                    due.append((app, f"was ended by the testbed: its peer {other.spec.name} {other.end_in_words()}"))
                    break
        return due

    def _kill(self, app: Application, why: str) -> None:
        app.killed = why
        self._note(app, why)
        self._folder.event("problem", where=f"apps.{app.spec.name}", error=why)
        try:
            self.host_of(app.spec.name).call("signal_app", name=app.spec.name, signal="SIGKILL", timeout=10)
        except TestbedError as error:
            self._ended(app.host, app.spec.name, None, 9, time.monotonic())
            self._folder.event("note", text=f"cannot end {app.spec.name}: {error.message}")

    def _peers(self, app: Application) -> list[Application]:
        """The applications that `after` connects it with, directly or through others."""
        found, todo = {app.spec.name}, [app.spec.name]
        while todo:
            name = todo.pop()
            near = [*self.all[name].spec.after, *(n for n, other in self.all.items() if name in other.spec.after)]
            todo += [other for other in near if other not in found]
            found.update(near)
        return [self.all[name] for name in found if name != app.spec.name]

    # ---- judging -----------------------------------------------------------------------------------------------------

    def collect(self) -> list[summary.App]:
        """Fetch the logs into the run folder and judge each application."""
        return [self._judge(app) for app in self.all.values()]

    def _judge(self, app: Application) -> summary.App:
        texts, logs = self._fetch_logs(app)
        wrong = output.wrong_data(list(app.spec.argv), texts["stdout"]) if app.spec.check == "data" else None
        if wrong is not None:
            self._note(app, f"its data check failed: {wrong}")
        if app.ended is not None and not app.as_expected and app.killed is None:
            expected = f" instead of {app.spec.expect}" if app.code is not None and app.spec.expect else ""
            last = [line for line in (texts["stderr"] + "\n" + texts["stdout"]).splitlines() if line.strip()]
            hint = f"its last line of output: {last[-1][:200]}" if last else None
            self._note(app, f"{app.end_in_words()}{expected}", hint)
        return summary.App(
            name=app.spec.name,
            host=app.spec.host,
            final_host=app.host,
            command=list(app.spec.argv),
            exit_code=app.code,
            signal=app.signal,
            ok=app.as_expected and wrong is None,
            checked=app.spec.check == "data",
            duration_s=None if app.started is None or app.ended is None else app.ended - app.started,
            longest_gap_ms=None if app.longest_gap is None else app.longest_gap * 1000,
            logs=logs,
            tail=(texts["stdout"] + texts["stderr"]).splitlines()[-self._tail :] if self._tail else [],
            measured=output.measured(list(app.spec.argv), texts["stdout"]),
        )

    def _fetch_logs(self, app: Application) -> tuple[dict[str, str], dict[str, str]]:
        """Copy what the application has printed into the run folder: stream → text, and stream → path of its log."""
        name, texts, logs = app.spec.name, {"stdout": "", "stderr": ""}, {}
        for stream in texts if app.started is not None else ():
            try:
                texts[stream] = self._hosts[app.host].call("read_log", name=name, stream=stream, limit=LONGEST_LOG)[
                    "text"
                ]
            except TestbedError as error:
                self._folder.event("note", text=f"cannot read {stream} of {name}: {error.message}")
                continue
            path = self._folder.log(f"{name}.{stream}")
            path.write_text(texts[stream])
            logs[stream] = self._folder.relative(path)
        return texts, logs

    @staticmethod
    def _note(app: Application, error: str, hint: str | None = None) -> None:
        app.problems.append(summary.Problem(where=f"apps.{app.spec.name}", error=error, hint=hint))
