"""A host and its agent: each request gets exactly one answer, errors arrive by blame, a dead agent blocks no caller."""

from __future__ import annotations

import base64
import concurrent.futures
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from testbed.base.errors import BadInput, EnvironmentProblem, RunFailed
from testbed.lab.hosts import Host
from testbed.lab.transport import Address
from tests.unit.agent.local_agent import LocalTransport, agent_argv

Fixture = tuple[Host, LocalTransport, list[dict[str, Any]]]


def test_hello_names_the_agent(agent: Fixture) -> None:
    host, transport, _ = agent
    assert host.about["pid"] == transport.process.pid
    assert host.about["python"] == ".".join(map(str, sys.version_info[:3]))


def test_many_requests_at_once_each_get_their_own_answer(agent: Fixture, tmp_path: Path) -> None:
    host, _, _ = agent
    for i in range(40):
        (tmp_path / str(i)).write_text(str(i) * 10)
    futures = [host.begin("read_file", path=str(tmp_path / str(i))) for i in range(40)]
    assert [host.result(f, "read_file")["size"] for f in futures] == [len(str(i)) * 10 for i in range(40)]


def test_a_file_is_read_in_several_chunks(agent: Fixture, tmp_path: Path) -> None:
    host, _, _ = agent
    data = os.urandom(9 << 20)
    (tmp_path / "source").write_bytes(data)
    copy = b""
    while len(copy) < len(data):
        answer = host.call("read_file", path=str(tmp_path / "source"), offset=len(copy))
        assert answer["size"] == len(data)
        copy += base64.b64decode(answer["base64"])
    assert copy == data


@pytest.mark.parametrize(
    ("op", "arguments", "kind", "text"),
    [
        ("no_such_operation", {}, RunFailed, "unknown operation 'no_such_operation'; known: .*start_app"),
        ("app_status", {"name": "x"}, RunFailed, "no application 'x' on host h1"),
        ("start_app", {"name": "x", "argv": ["no-such-program"]}, BadInput, "'no-such-program' is not on this host"),
        ("nic", {"command": "status"}, RunFailed, "no NIC was started"),
        ("read_log", {"name": "x", "stream": "stdin"}, BadInput, "no stream 'stdin'"),
        ("read_file", {"path": "/nonexistent"}, RunFailed, "/nonexistent: No such file"),
        ("address_add", {"ip": "10.0.0.300"}, EnvironmentProblem, "10.0.0.300"),
        ("app_status", {}, RunFailed, "TypeError"),
    ],
)
def test_errors_arrive_by_blame(
    agent: Fixture, op: str, arguments: dict[str, Any], kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind, match=text):
        agent[0].call(op, **arguments)
    assert agent[0].call("addresses")["addresses"][0] == "127.0.0.1", "and the agent continues"


def test_timeout_is_the_callers(agent: Fixture) -> None:
    with pytest.raises(RunFailed, match=r"nothing: no answer within 0\.05 s"):
        agent[0].result(concurrent.futures.Future(), "nothing", 0.05)


def test_killed_agent_fails_all_who_wait_and_all_who_come_later(tmp_path: Path) -> None:
    transport = LocalTransport(agent_argv(tmp_path))
    events: list[Any] = []
    host = Host("h1", transport, lambda _name, event: events.append((event["event"], event.get("expected"))))
    host.ready(10)
    os.kill(transport.process.pid, signal.SIGSTOP)
    waiting = host.begin("addresses")
    os.kill(transport.process.pid, signal.SIGKILL)
    with pytest.raises(RunFailed, match="the agent has gone"):
        host.result(waiting, "addresses", 5)
    with pytest.raises(RunFailed, match="the agent has gone"):
        host.call("addresses")
    assert not host.alive
    assert events[-1] == ("agent_gone", False)
    host.close()


def test_agent_that_does_not_start_says_why() -> None:
    transport = LocalTransport([sys.executable, "-c", "import sys; sys.exit('no module named testbed')"])
    host = Host("h1", transport)
    with pytest.raises(EnvironmentProblem, match="did not start") as caught:
        host.ready(10)
    assert caught.value.hint == "no module named testbed"
    host.close()


def test_close_ends_the_agent(tmp_path: Path) -> None:
    transport = LocalTransport(agent_argv(tmp_path))
    events: list[Any] = []
    host = Host("h1", transport, lambda _name, event: events.append((event["event"], event.get("expected"))))
    host.ready(10)
    host.close()
    host.close()
    assert transport.process.returncode == 0
    assert events[-1] == ("agent_gone", True)


def test_agent_imports_nothing_that_must_be_installed(tmp_path: Path) -> None:
    """Invariant: -S (no site-packages) and the source folder are enough for an agent."""
    source = str(Path(__file__).resolve().parents[3])
    code = "from testbed.agent.table import OPS; print(len(OPS))"
    environment = {**os.environ, "PYTHONPATH": source}
    result = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd="/", env=environment
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) >= 10


def test_command_line_quotes_what_the_shell_would_eat() -> None:
    address = Address(
        "h1", "100.65.0.1", "h1-eth0", Path("/k"), python="/opt/my python", environment={"A": "x y"}, source="/a b"
    )
    words = subprocess.run(
        ["sh", "-c", address.command().replace("exec env", "printf '%s\\n'")], capture_output=True, text=True
    ).stdout.splitlines()
    assert words[:3] == ["A=x y", "PYTHONPATH=/a b", "/opt/my python"]
    assert words[-2:] == ["--interface", "h1-eth0"]


def test_nic_that_does_not_start_says_why(tmp_path: Path) -> None:
    argv = [*agent_argv(tmp_path)[:-1], "nosuchif0"]
    host = Host("h1", LocalTransport(argv))
    host.ready(10)
    with pytest.raises(EnvironmentProblem, match="the NIC ended with") as caught:
        host.call("start_nic", addresses=["10.0.0.1"], number_base=1)
    assert "nosuchif0" in str(caught.value.hint)
    with pytest.raises(RunFailed, match="the NIC has ended"):
        host.call("nic", command="status")
    host.close()
