"""A run that is killed or interrupted leaves nothing on the machine, and `testbed clean` touches nothing else.

Invariants: after `clean`, nothing that the state file names and no process of the run exists; everything that was there
before and is not the run's still does; a live run is left alone.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed.cleanup import clean as cleanup
from testbed.cleanup import state

ROOT = Path(__file__).parents[2]
TOPOLOGY = """
name: clean
hosts: {h1: {}, h2: {}}
switches: [s1]
links: [[h1, s1], [h2, s1]]
apps:
  orphan: {host: h1, command: "sh -c 'sleep 300 & sleep 300'", timeout: 200s}
"""
PATIENCE = 90.0
"""Seconds for a run to come up on a busy machine."""


class Running:
    """A `testbed run` of TOPOLOGY in a process of its own, up to the point where its application runs."""

    def __init__(self, folder: Path) -> None:
        file = folder / "clean.yaml"
        file.write_text(TOPOLOGY)
        self.log = folder / "log"
        with self.log.open("w") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "testbed", "run", str(file), "--no-live", "--results", str(folder / "results")],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
        deadline = time.monotonic() + PATIENCE
        while "applications run" not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)
        self.run = next(run for run in state.runs() if run.owner_pid == self.process.pid)

    def left(self) -> list[str]:
        """What exists of all that the run has recorded, and of its processes."""
        things = [
            f"{entry['kind']} {entry[state.FACT[entry['kind']]]}"
            for entry in self.run.entries
            if entry["kind"] not in ("process", "host")
            and not entry.get("existed")
            and state.exists(entry["kind"], str(entry[state.FACT[entry["kind"]]]))
        ]
        return things + [f"process {pid}" for pid in cleanup.processes(self.run)]


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    """A live run; whatever the test does, nothing of it stays."""
    live = Running(tmp_path)
    try:
        yield live
    finally:
        if live.process.poll() is None:
            live.process.kill()
            live.process.wait()
        if live.run.directory.exists():
            cleanup.clean(state.read(live.run.directory))


@pytest.fixture
def decoys() -> Iterator[list[str]]:
    """Things like ours that are not ours: a veth pair named as Mininet does, a bridge, a process."""
    sleeper = subprocess.Popen(["sleep", "300"], env={"PATH": os.environ["PATH"]})
    name = f"d{secrets.randbelow(1 << 24)}"  # another session of these tests may run beside this one
    try:
        subprocess.run(["ip", "link", "add", f"{name}-eth1", "type", "veth", "peer", f"{name}-eth2"], check=True)
        subprocess.run(["ovs-vsctl", "add-br", name, "--", "set", "bridge", name, "datapath_type=netdev"], check=True)
        yield [f"link {name}-eth1", f"link {name}-eth2", f"ovs_bridge {name}", f"process {sleeper.pid}"]
    finally:
        subprocess.run(["ovs-vsctl", "--if-exists", "del-br", name], check=True)
        subprocess.run(["ip", "link", "delete", f"{name}-eth1"], check=False)
        sleeper.kill()
        sleeper.wait()


def there(thing: str) -> bool:
    """`link d9-eth1`, `process 77`: whether it exists."""
    kind, what = thing.split(" ")
    return state.start_time(int(what)) is not None if kind == "process" else state.exists(kind, what)


def testbed(*words: str) -> subprocess.CompletedProcess[str]:
    """Run one verb."""
    return subprocess.run([sys.executable, "-m", "testbed", *words], cwd=ROOT, capture_output=True, text=True)


testbed.__test__ = False  # type: ignore[attr-defined]


def test_clean_after_sigkill(running: Running, decoys: list[str]) -> None:
    before = running.left()
    assert {thing.split(" ")[0] for thing in before} >= {"process", "link", "ovs_bridge"}

    spared = testbed("clean", running.run.run_id)
    assert "left alone" in spared.stdout and running.process.poll() is None
    assert set(before) <= set(running.left())

    running.process.kill()
    running.process.wait()
    assert running.left() != []  # the application's second sleep, at least, is not ended by anything

    cleaned = testbed("clean", running.run.run_id)
    assert cleaned.returncode == 0, cleaned.stdout + cleaned.stderr
    assert running.left() == []
    assert not running.run.directory.exists()
    assert [thing for thing in decoys if not there(thing)] == []
    assert testbed("clean", running.run.run_id).returncode == 2  # nothing is known of it any more


def test_interrupted_run_removes_everything_itself(running: Running) -> None:
    running.process.send_signal(signal.SIGINT)
    assert running.process.wait(60) == 130, running.log.read_text()
    assert running.left() == []
    assert not running.run.directory.exists()
    assert "Traceback" not in running.log.read_text()
