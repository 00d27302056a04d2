"""Applications: unmodified programs, each under `app_init` in a pid namespace of its own.

An application's folder `apps/<name>/` holds stdout, stderr and, once it has ended, `exit`; by default it is its working
directory. A running application is identified by its init: pid 1 of its namespace and root of the tree that CRIU dumps.
A migration gives it another init (`adopt` at the destination, `forget` at the source) and keeps its folder's path.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from softroce_ext.native import build
from testbed.agent.operations import OperationError
from testbed.agent.processes import command_name, inner_pid, namespace_members, send_signal, wait_ended
from testbed.agent.records import App
from testbed.agent.service import Agent


def app_directory(agent: Agent, name: str) -> Path:
    """The folder of application `name`, which has the same path on every host."""
    return agent.apps_directory / name


def find_app(agent: Agent, name: str) -> App:
    """Return the application `name`. Raises OperationError if this host has none."""
    try:
        return agent.apps[name]
    except KeyError:
        raise OperationError(f"no application {name!r} on host {agent.host}") from None


def start_app(
    agent: Agent,
    *,
    name: str,
    argv: list[str],
    env: dict[str, str] | None = None,
    cwd: str | None = None,
    rdma: bool = True,
    policy: str = "idle",
) -> dict[str, Any]:
    """Start `argv` as application `name`. Returns {"init": pid}.

    `env` is added to the agent's environment, `rdma` adds the variables by which stock rdma-core finds this host's NIC,
    and `policy` is app_init's option. The event `app_exited` {app, code or signal, at} reports the end.
    """
    running = agent.apps.get(name)
    if running is not None and running.ended is None:
        raise OperationError(f"application {name!r} is already running", blame="input")
    if shutil.which(argv[0]) is None:
        raise OperationError(
            f"application {name!r}: {argv[0]!r} is not on this host",
            blame="input",
            hint="name a program in PATH, or the absolute path of an executable file",
        )
    directory = app_directory(agent, name)
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    variables = (_rdma_environment(agent) if rdma else {}) | (env or {})
    try:
        command = [str(build.path("app_init")), "--dir", str(directory), "--policy", policy]
    except build.BuildError as error:
        raise OperationError(str(error), blame="environment") from error
    if cwd is not None:
        command += ["--cwd", cwd]
    for variable, value in variables.items():
        command += ["--env", f"{variable}={value}"]
    launcher = subprocess.Popen(
        [*command, "--", *argv],
        stdin=subprocess.PIPE,  # held open and never written: app_init ends the program when it closes
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert launcher.stdout is not None and launcher.stderr is not None
    with launcher.stdout as stdout, launcher.stderr as stderr:
        line = stdout.readline()
        if not line.startswith(b"init "):
            reason = stderr.read().decode(errors="replace").strip()
            raise OperationError(f"application {name!r} cannot be started: {reason or launcher.wait()}")
    app = App(name, directory, list(argv), variables, int(line.split()[1]), launcher)
    _take(agent, app)
    return {"init": app.init}


def _rdma_environment(agent: Agent) -> dict[str, str]:
    """The variables by which stock rdma-core finds this host's NIC."""
    try:
        bridge = str(build.path("bridge"))
    except build.BuildError as error:
        raise OperationError(str(error), blame="environment") from error
    preload = os.environ.get("LD_PRELOAD")
    return {
        "LD_PRELOAD": f"{bridge}:{preload}" if preload else bridge,
        "SYSFS_PATH": str(agent.nic_directory / "sys"),
        "SOFTROCE_RUN": str(agent.nic_directory),
    }


def _take(agent: Agent, app: App) -> None:
    """Enter `app` among the agent's applications, watch its init, and end it with the agent."""
    agent.apps[app.name] = app
    agent.at_end(lambda: _kill(agent, app))
    try:
        agent.watch.watch(app.init, lambda: _note_end(agent, app))
    except ProcessLookupError:
        _note_end(agent, app)


def _kill(agent: Agent, app: App) -> None:
    if app.ended is None and agent.apps.get(app.name) is app:
        agent.watch.unwatch(app.init)
        send_signal(app.init, signal.SIGKILL)
        wait_ended(app.init, 2.0)
    if app.launcher is not None:
        try:
            app.launcher.wait(2.0)
        except subprocess.TimeoutExpired:
            app.launcher.kill()


def _note_end(agent: Agent, app: App) -> None:
    if app.launcher is not None:
        app.launcher.wait()
    app.ended = read_exit(app.directory)
    agent.event("app_exited", app=app.name, longest_gap=app.longest_gap, **app.ended)


def read_exit(directory: Path) -> dict[str, Any]:
    """Read how the program ended from app_init's file; {"signal": 9} if app_init was killed before it wrote one."""
    try:
        lines = (directory / "exit").read_text().splitlines()
        kind, number = lines[0].split()
        return {kind: int(number), "at": float(lines[1].split()[1])}
    except (OSError, ValueError, IndexError):
        return {"signal": int(signal.SIGKILL), "at": time.time()}


def adopt(
    agent: Agent,
    *,
    name: str,
    init: int,
    argv: list[str],
    env: dict[str, str],
    uses_nic: bool = False,
    longest_gap: float | None = None,
) -> App:
    """Take over an application that was restored on this host; `init` is its pid 1 as this host sees it."""
    app = App(name, app_directory(agent, name), list(argv), dict(env), init, uses_nic=uses_nic, longest_gap=longest_gap)
    _take(agent, app)
    return app


def forget(agent: Agent, name: str) -> App:
    """Forget an application that has moved away, so that the end of the original is not reported. Its folder stays."""
    app = find_app(agent, name)
    agent.watch.unwatch(app.init)
    del agent.apps[name]
    return app


def app_status(agent: Agent, *, name: str) -> dict[str, Any]:
    """Return the state of one application: init, ended, processes [{pid, inner, name}], listening TCP ports."""
    app = find_app(agent, name)
    members = list(namespace_members(app.init)) if app.ended is None else []
    return {
        "init": app.init,
        "ended": app.ended,
        "processes": [{"pid": pid, "inner": inner_pid(pid), "name": command_name(pid)} for pid in members],
        "listening": sorted(_listening(members)),
    }


def wait_app_ready(agent: Agent, *, name: str, patience: float) -> dict[str, Any]:
    """Wait until the application listens on a TCP port, as every server of perftest and rdma-core does, or has ended.

    Returns {"listening": [ports], "ended": …}; if neither is the case, `patience` seconds have passed.
    """
    app = find_app(agent, name)
    deadline = time.monotonic() + patience
    while True:
        ports = sorted(_listening(list(namespace_members(app.init)))) if app.ended is None else []
        if ports or app.ended is not None or time.monotonic() > deadline:
            return {"listening": ports, "ended": app.ended}
        time.sleep(0.02)


def _listening(pids: list[int]) -> set[int]:
    """The TCP ports on which one of `pids` listens in this network namespace (proc(5): /proc/net/tcp, state 0A)."""
    inodes: dict[str, int] = {}
    for table in ("/proc/self/net/tcp", "/proc/self/net/tcp6"):
        try:
            with open(table) as file:
                rows = [line.split() for line in file][1:]
        except OSError:
            continue
        inodes |= {f"socket:[{row[9]}]": int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == "0A"}
    if not inodes:
        return set()
    found = set()
    for pid in pids:
        folder = f"/proc/{pid}/fd"
        try:
            names = os.listdir(folder)
        except OSError:
            continue
        for name in names:
            try:
                port = inodes.get(os.readlink(f"{folder}/{name}"))
            except OSError:
                continue
            if port is not None:
                found.add(port)
    return found


def signal_app(agent: Agent, *, name: str, signal: int | str) -> dict[str, Any]:
    """Send a signal, by number or name ("SIGTERM"); app_init forwards SIGTERM and SIGINT to the command.

    SIGKILL ends the whole namespace. Returns {"sent": bool}.
    """
    app = find_app(agent, name)
    return {"sent": app.ended is None and send_signal(app.init, _signal_number(signal))}


def _signal_number(value: int | str) -> int:
    try:
        return int(signal.Signals[value]) if isinstance(value, str) else int(signal.Signals(value))
    except (KeyError, ValueError):
        raise OperationError(f"unknown signal {value!r}", blame="input") from None
