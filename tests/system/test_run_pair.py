"""Whole runs without a migration, as a user starts them: real Mininet, real switches, Debian's own RDMA programs.

Invariants: the exit code tells the verdict; the summary on standard output is the one in the folder; whatever way a run
ends, nothing of it is left (after a SIGKILL: nothing after `testbed clean`).
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from testbed.base.errors import Exit
from tests.system.testbed_runs import Run, shipped, testbed

pytestmark = pytest.mark.system

TWO_HOSTS = """
name: two
hosts: {h1: {}, h2: {}}
switches: [s1]
links: [[h1, s1], [h2, s1]]
"""
WAITING = (
    TWO_HOSTS
    + """
apps:
  server: {host: h2, command: "ibv_rc_pingpong -g 1"}
  other: {host: h1, command: "sleep 300"}
"""
)


def test_pair_ends_well_and_is_reported(tmp_path: Path) -> None:
    run = Run(tmp_path, re.sub(r"-n \d+", "-n 500", shipped("pair")))
    run.wait_for(lambda e: e["event"] == "stage" and e["name"] == "running")
    made = run.made()
    assert run.finish() == Exit.OK, run.stderr
    summary = run.summary
    assert summary["ok"] and not summary["problems"] and not summary["interrupted"]
    folder = Path(summary["folder"])
    assert json.loads((folder / "summary.json").read_text()) == summary
    for app in summary["apps"]:
        assert app["ok"] and app["exit_code"] == 0 and app["checked"]
        assert app["measured"][0]["iterations"] == 500
        assert "500 iters" in (folder / app["logs"]["stdout"]).read_text()
    # 500 messages each way of 4096 bytes, one packet each, and at least a header's worth around each
    for host in summary["hosts"]:
        assert host["nic"]["tx_packets"] >= 500 and host["nic"]["tx_bytes"] > 500 * 4096
        assert host["nic"]["rx_packets"] >= 500 and host["nic"]["rx_bytes"] > 500 * 4096
    names = [event["event"] for event in run.events()]
    assert names[0] == "run_started" and names[-1] == "run_finished"
    assert {"host_ready", "nic_ready", "app_started", "app_exited"} <= set(names)
    assert (folder / "topology.yaml").exists() and (folder / "versions.json").exists()
    assert made.left() == []


def test_failed_program_fails_the_run_and_its_words_are_shown(tmp_path: Path) -> None:
    apps = """
apps:
  good: {host: h1, command: "true"}
  expected: {host: h1, command: "sh -c 'exit 4'", expect: 4}
  bad: {host: h2, command: "sh -c 'echo the reason >&2; exit 3'"}
"""
    run = Run(tmp_path, TWO_HOSTS + apps)
    assert run.finish() == Exit.CHECK_FAILED
    (problem,) = run.summary["problems"]
    assert problem["where"] == "apps.bad" and problem["error"] == "ended with code 3"
    assert "the reason" in problem["hint"]
    assert {app["name"]: app["ok"] for app in run.summary["apps"]} == {"good": True, "expected": True, "bad": False}


def test_program_that_is_not_there(tmp_path: Path) -> None:
    run = Run(tmp_path, TWO_HOSTS + 'apps: {app: {host: h1, command: "no-such-program -x"}}')
    assert run.finish() == Exit.CHECK_FAILED
    assert "'no-such-program' is not on this host" in run.summary["problems"][0]["error"]


def test_server_that_dies_early_is_to_blame_not_its_client(tmp_path: Path) -> None:
    apps = """
apps:
  server: {host: h2, command: "ibv_rc_pingpong -d no_such_device"}
  client: {host: h1, command: "ibv_rc_pingpong -g 1 {server.ip}", after: server}
"""
    run = Run(tmp_path, TWO_HOSTS + apps)
    assert run.finish() == Exit.CHECK_FAILED
    first = run.summary["problems"][0]
    assert first["where"] == "apps.server" and "before it listened" in first["error"]
    assert "no_such_device" in first["hint"]


def test_timeout_ends_a_program(tmp_path: Path) -> None:
    run = Run(tmp_path, TWO_HOSTS + 'apps: {app: {host: h1, command: "sleep 300", timeout: 1s}}')
    assert run.finish() == Exit.CHECK_FAILED
    assert "did not end within its timeout of 1 s" in run.summary["problems"][0]["error"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    run = Run(tmp_path, WAITING)
    run.wait_for(lambda e: e["event"] == "app_started" and e["app"] == "server")
    made = run.made()
    assert len(made.processes) > 8  # two shells, sshds, agents, NICs; controller; programs
    run.process.send_signal(number)
    assert run.finish(60) == Exit.INTERRUPTED
    assert run.summary["interrupted"] and not run.summary["ok"]
    assert made.left() == []


def test_interrupt_during_the_building_leaves_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path, WAITING)
    run.wait_for(lambda e: e["event"] == "stage" and e["name"] == "network")
    time.sleep(0.5)
    made = run.made()
    run.process.send_signal(signal.SIGINT)
    assert run.finish(60) == Exit.INTERRUPTED
    assert made.left() == []


def test_killed_run_is_cleaned_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    survivor = Run(tmp_path / "other", WAITING)
    run = Run(tmp_path, WAITING)
    try:
        for each in (survivor, run):  # until nothing starts any more: what an agent forks looks like one for a moment
            each.wait_for(lambda e: e["event"] == "stage" and e["name"] == "running")
        made, alive = run.made(), survivor.made()
        agents = [pid for pid in made.processes if b"testbed.agent" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert len(agents) == 2
        os.kill(run.process.pid, signal.SIGKILL)
        run.process.wait()
        # Agents, and all that they started, end by themselves: their channels have closed.
        deadline = time.monotonic() + 20
        while any(os.path.exists(f"/proc/{pid}") for pid in agents) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(os.path.exists(f"/proc/{pid}") for pid in agents)
        assert made.left() != [], "bridge, links and shells stay: else this test shows nothing"
        cleaned = testbed("clean")
        assert cleaned.returncode == 0, cleaned.stderr
        assert made.left() == []
        still = set(alive.left())
        assert {f"process {pid}" for pid in alive.processes} <= still
    finally:
        survivor.process.send_signal(signal.SIGINT)
        survivor.finish(60)
    assert alive.left() == []


def test_full_disk_is_the_environments_fault_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=28k", "tmpfs", tmp_path / "r"], check=True)
    try:
        run = Run(tmp_path, WAITING)
        run.wait_for(lambda e: e["event"] == "stage" and e["name"] == "network")
        made = run.made()
        assert run.finish() == Exit.ENVIRONMENT
        assert "cannot write the results" in run.stderr and "Traceback" not in run.stderr
        assert made.left() == []
    finally:
        subprocess.run(["umount", tmp_path / "r"], check=True)
