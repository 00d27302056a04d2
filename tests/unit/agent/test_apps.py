"""Applications under app_init: their end is always known, nothing outlives the agent, CRIU could dump them."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from testbed.agent.processes import command_name, namespace_members
from testbed.base.errors import BadInput
from testbed.cleanup.state import start_time
from testbed.lab.hosts import Host
from tests.unit.agent.local_agent import LocalTransport, agent_argv

pytestmark = pytest.mark.system  # a pid namespace needs CAP_SYS_ADMIN

Fixture = tuple[Host, LocalTransport, list[dict[str, Any]]]


def eventually(condition: Callable[[], Any], what: str, timeout: float = 60.0) -> Any:
    """The first true value of `condition()`. Applications have idle priority: on a busy machine they die slowly."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.01)
    raise AssertionError(f"never: {what}")


def start(host: Host, *argv: str, name: str = "app", **arguments: Any) -> int:
    return int(host.call("start_app", name=name, argv=list(argv), rdma=False, **arguments)["init"])


def end_of(events: list[dict[str, Any]], name: str = "app") -> dict[str, Any]:
    return eventually(
        lambda: next((e for e in events if e["event"] == "app_exited" and e["app"] == name), None), f"end of {name}"
    )


@pytest.mark.parametrize("code", [0, 1, 42, 255])
def test_exit_code_is_the_commands(agent: Fixture, tmp_path: Path, code: int) -> None:
    host, _, events = agent
    start(host, "sh", "-c", f"echo out; echo err >&2; exit {code}")
    event = end_of(events)
    assert event["code"] == code and "signal" not in event
    assert abs(event["at"] - time.time()) < 60
    assert host.call("read_log", name="app")["text"] == "out\n"
    assert host.call("read_log", name="app", stream="stderr")["text"] == "err\n"
    assert (tmp_path / "apps/app/exit").read_text().startswith(f"code {code}\nat ")


def test_death_by_signal_is_told_apart_from_an_exit_code(agent: Fixture) -> None:
    host, _, events = agent
    start(host, "sh", "-c", "kill -SEGV $$")
    event = end_of(events)
    assert event["signal"] == signal.SIGSEGV and "code" not in event


def test_kill_of_the_whole_namespace(agent: Fixture) -> None:
    host, _, events = agent
    init = start(host, "sleep", "1000")
    members = eventually(lambda: m if len(m := list(namespace_members(init))) == 2 else None, "command runs")
    assert host.call("signal_app", name="app", signal="SIGKILL") == {"sent": True}
    assert end_of(events)["signal"] == signal.SIGKILL
    eventually(lambda: all(start_time(pid) is None for pid in members), "all gone")
    assert host.call("signal_app", name="app", signal="SIGKILL") == {"sent": False}


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_signal_is_forwarded_and_the_command_decides(agent: Fixture, name: str) -> None:
    host, _, events = agent
    start(host, "sh", "-c", f"trap 'exit 7' {name[3:]}; echo set; while :; do sleep 0.05; done")
    eventually(lambda: host.call("read_log", name="app")["text"], "trap set")
    host.call("signal_app", name="app", signal=name)
    assert end_of(events)["code"] == 7


def test_orphans_are_reaped_and_end_with_the_command(agent: Fixture) -> None:
    host, _, events = agent
    # a subshell dies at once and leaves its short and its endless child to init
    start(host, "sh", "-c", "(sleep 0.05 & sleep 1000 &) ; sleep 0.5; cat /proc/1/task/1/children >/dev/null; exit 5")
    init = host.call("app_status", name="app")["init"]
    time.sleep(0.3)
    states = [Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] for pid in namespace_members(init)]
    assert "Z" not in states
    assert end_of(events)["code"] == 5
    assert list(namespace_members(init)) == []


def descriptors(pid: int) -> dict[int, str]:
    """What a process has open; one that is closed meanwhile is left out."""
    found = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found[int(entry.name)] = os.readlink(entry)
    return found


def test_init_can_be_dumped(agent: Fixture, tmp_path: Path) -> None:
    """Invariant: own session, no terminal, exactly the descriptors 0-2 on plain files, in init and command."""
    host, _, _ = agent
    init = start(host, "sleep", "1000", env={"MARK": "x y"}, cwd="/")
    eventually(lambda: "sleep" in [command_name(pid) for pid in namespace_members(init)], "command runs")
    members = list(namespace_members(init))
    folder = tmp_path / "apps/app"
    links = {0: "/dev/null", 1: str(folder / "stdout"), 2: str(folder / "stderr")}
    # A command that has just started opens its libraries and its locale.
    eventually(lambda: all(descriptors(pid) == links for pid in members), f"{links} are all that is open")
    for pid in members:
        flags = Path(f"/proc/{pid}/fdinfo/1").read_text().split("flags:")[1].split()[0]
        assert int(flags, 8) & os.O_APPEND
        stat = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        assert stat[4] == "0", "no terminal"
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert os.getsid(init) == init
    (command,) = set(members) - {init}
    assert b"MARK=x y" in Path(f"/proc/{command}/environ").read_bytes().split(b"\0")
    assert b"MARK=x y" not in Path(f"/proc/{init}/environ").read_bytes().split(b"\0")
    status = host.call("app_status", name="app")
    assert {p["inner"]: p["name"] for p in status["processes"]} == {1: "app_init", 2: "sleep"}


def test_ready_means_listening(agent: Fixture) -> None:
    host, _, _ = agent
    code = (
        "import socket, time; time.sleep(.3); s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen();"
        "print(s.getsockname()[1], flush=True); time.sleep(99)"
    )
    start(host, sys.executable, "-c", code)
    answer = host.call("wait_app_ready", name="app", patience=20)
    assert answer["listening"] == [int(host.call("read_log", name="app")["text"])] and answer["ended"] is None


def test_ready_also_ends_with_the_app_or_the_patience(agent: Fixture) -> None:
    host, _, _ = agent
    start(host, "sleep", "1000", name="quiet")
    assert host.call("wait_app_ready", name="quiet", patience=0.1) == {"listening": [], "ended": None}
    start(host, "false", name="short")
    assert host.call("wait_app_ready", name="short", patience=20)["ended"]["code"] == 1


def test_what_cannot_start_says_so(agent: Fixture, tmp_path: Path) -> None:
    host, _, events = agent
    (tmp_path / "script").write_text("#!/no/such/interpreter\n")
    (tmp_path / "script").chmod(0o755)
    start(host, str(tmp_path / "script"))
    assert end_of(events)["code"] == 127
    assert "cannot execute" in host.call("read_log", name="app", stream="stderr")["text"]
    start(host, "sleep", "1000", name="twice")
    with pytest.raises(BadInput, match="already running"):
        start(host, "sleep", "1000", name="twice")


@pytest.mark.parametrize("way", ["close", "channel", "SIGTERM", "SIGKILL"])
def test_nothing_outlives_the_agent(tmp_path: Path, way: str) -> None:
    transport = LocalTransport(agent_argv(tmp_path))
    host = Host("h1", transport)
    host.ready(60)
    inits = [start(host, "sh", "-c", "sleep 1000 & sleep 1000", name=name) for name in ("one", "two")]

    def whole(init: int) -> dict[int, int | None]:
        """The namespace's processes and when each was started, once both sleep."""
        pids = list(namespace_members(init))
        complete = [command_name(pid) for pid in pids].count("sleep") == 2
        return {pid: start_time(pid) for pid in pids} if complete else {}

    there = {pid: since for init in inits for pid, since in eventually(lambda i=init: whole(i), "running").items()}
    if way == "close":
        host.close()
    elif way == "channel":
        transport.close()
    else:
        os.kill(transport.process.pid, signal.Signals[way])
    # Gone is also who waits for its parent to notice, and whose number somebody else has got since.
    eventually(lambda: all(start_time(pid) != since for pid, since in there.items()), f"all gone after {way}")
    assert not any(list(namespace_members(init)) for init in inits)
    host.close()
