"""What is left of a network on real parts when it ends, by itself, by a failure or by SIGKILL.

Invariants: what a run made goes with it, also after a failure, and nothing of anybody else's; what a killed run left
can be removed from its state file alone.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from testbed.base.errors import EnvironmentProblem
from testbed.cleanup.clean import clean
from testbed.cleanup.state import BASE, read, start_time
from testbed.network import nodes
from testbed.network.machine import command
from tests.system.networks import PAIR, RING, running


def root_interfaces() -> set[str]:
    return set(os.listdir("/sys/class/net"))


def bridges() -> set[str]:
    return set(command("ovs-vsctl", "list-br").split())


def of_run(tag: str) -> set[str]:
    """Interfaces and bridges that carry a run's tag. Other runs of this machine come and go meanwhile."""
    return {name for name in root_interfaces() | bridges() if name.startswith(f"{tag}-")}


def test_nothing_is_left_and_nothing_else_is_gone(tmp_path: Path) -> None:
    """Beside somebody else's bridge and interface."""
    foreign = f"f{secrets.token_hex(3)}"
    command("ovs-vsctl", "add-br", foreign, "--", "set", "bridge", foreign, "datapath_type=netdev")
    try:
        with running(PAIR.replace("BW", "1000"), tmp_path) as network:
            tag, directory = network.plan.tag, network.state.directory
            assert len(of_run(tag)) == 5, "a bridge, two ports, two management links"
            pids = [host.pid for host in network.hosts.values()]
            assert len(json_lines(directory / "state")) > 10
        assert of_run(tag) == set()
        assert not directory.exists()
        assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
        assert foreign in bridges() and foreign in root_interfaces()
    finally:
        command("ovs-vsctl", "del-br", foreign)


def test_a_program_left_running_ends_with_its_host(tmp_path: Path) -> None:
    with running(PAIR.replace("BW", "1000"), tmp_path) as network:
        stubborn = network.hosts["h1"].popen(
            ["unshare", "--pid", "--fork", "sh", "-c", "trap '' TERM HUP; echo on; sleep 1000; sleep 1000"],
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert stubborn.stdout is not None and stubborn.stdout.readline() == b"on\n"
        space = os.readlink(f"/proc/{stubborn.pid}/ns/net")
    assert stubborn.wait(5) == -signal.SIGKILL
    assert space not in namespaces()


def namespaces() -> set[str]:
    """The network namespaces that any process lives in."""
    found = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            found.add(os.readlink(f"/proc/{pid}/ns/net"))
    return found


KILLED = """
import pathlib, sys, time
from testbed.network import Network
from testbed.cleanup.state import BASE, RunState, read, start_time
from testbed.topology import parse, resolve
state = RunState.create(sys.argv[1])
network = Network(resolve(parse(sys.argv[2])), pathlib.Path(sys.argv[3]), state)
network.start()
print(network.plan.tag, flush=True)
time.sleep(1000)
"""


def test_what_a_killed_run_left_can_be_removed(tmp_path: Path) -> None:
    """From the state file alone: interfaces, bridges, namespaces, controller and sshd."""
    run_id = f"test-{secrets.token_hex(4)}"
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, run_id, RING, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert process.stdout is not None
    tag = process.stdout.readline().strip()
    process.kill()
    process.wait()
    assert len(of_run(tag)) == 20, "four bridges, twelve ports, four management links"
    run = read(BASE / run_id)
    assert not run.alive
    children = {int(entry["pid"]) for entry in run.entries if entry["kind"] in ("process", "host")}
    assert len(children) == 13, "four hosts, four switch shells, four sshd, a controller"
    removed = clean(run)
    assert not [removal for removal in removed if removal.problem is not None], removed
    assert of_run(tag) == set()
    assert not [pid for pid in children if start_time(pid) is not None]
    assert not (BASE / run_id).exists()


def json_lines(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_failure_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second bridge cannot be made: hosts, links, controller and the first bridge exist by then."""
    made: list[str] = []
    start_at = nodes.Bridge.start_at

    def refuse_the_second(bridge: nodes.Bridge, port: int, mtu: int) -> None:
        if made:
            raise EnvironmentProblem("no more bridges", where="test")
        start_at(bridge, port, mtu)
        made.append(bridge.name)
        assert len(of_run(bridge.name.split("-")[0])) == 17, "a bridge, twelve ports, four management links"

    monkeypatch.setattr(nodes.Bridge, "start_at", refuse_the_second)
    with pytest.raises(EnvironmentProblem, match="no more bridges"), running(RING, tmp_path):
        pass
    assert of_run(made[0].split("-")[0]) == set()
