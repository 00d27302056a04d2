"""`testbed run` as a user starts it, and what a run has made on the machine, for the tests of whole runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from testbed.cleanup import clean as cleanup
from testbed.cleanup import state

ROOT = Path(__file__).resolve().parents[2]


class Run:
    """One `python -m testbed run` in the background, its results below `folder`."""

    def __init__(self, folder: Path, topology: str, *options: str) -> None:
        file = folder / "topology.yaml"
        file.write_text(topology)
        self.folder = folder
        argv = [
            sys.executable,
            "-m",
            "testbed",
            "run",
            str(file),
            "--json",
            "--no-live",
            "--results",
            str(folder / "r"),
        ]
        # Started from elsewhere: nothing may depend on the current folder.
        self.process = subprocess.Popen(
            [*argv, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd="/",
            start_new_session=True,
        )
        self.stdout = self.stderr = ""

    def finish(self, timeout: float = 170.0) -> int:
        """Wait; the exit code. `stdout` and `stderr` are filled in."""
        try:
            self.stdout, self.stderr = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGINT)
            self.stdout, self.stderr = self.process.communicate(timeout=60)
            raise AssertionError(f"the run did not end within {timeout:g} s:\n{self.stderr}") from None
        return self.process.returncode

    @property
    def summary(self) -> dict[str, Any]:
        """What `--json` printed."""
        result: dict[str, Any] = json.loads(self.stdout)
        return result

    def events(self) -> list[dict[str, Any]]:
        """events.jsonl so far. Its last line may be half written: the run continues."""
        files = list((self.folder / "r").glob("*/*/events.jsonl"))
        return [json.loads(line) for line in files[0].read_text().split("\n")[:-1]] if files else []

    def wait_for(self, condition: Callable[[dict[str, Any]], bool], timeout: float = 60.0) -> dict[str, Any]:
        """The first event that fulfils `condition`."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            ended = self.process.poll() is not None  # before the look: its last events count too
            for event in self.events():
                if condition(event):
                    return event
            if ended:
                self.finish()
                raise AssertionError(f"the run ended with {self.process.returncode}:\n{self.stderr}")
            time.sleep(0.05)
        raise AssertionError(f"no such event; the last ones: {self.events()[-5:]}")

    def made(self) -> Made:
        """What the run has made until now, to be asked again after its end."""
        (directory,) = state.BASE.glob(f"{self.process.pid}-*")
        return Made(state.read(directory))


class Made:
    """Everything that a run had at one moment."""

    def __init__(self, run: state.Run) -> None:
        self.run = run
        self.processes = cleanup.processes(run)

    def left(self) -> list[str]:
        """What of it is still there, in words."""
        found = [f"process {pid}" for pid, start in self.processes.items() if state.start_time(pid) == start]
        found += [
            f"{entry['kind']} {entry[state.FACT[entry['kind']]]}"
            for entry in self.run.entries
            if entry["kind"] not in ("process", "host")
            and not entry.get("existed")
            and state.exists(entry["kind"], str(entry[state.FACT[entry["kind"]]]))
        ]
        if os.path.exists(self.run.directory):
            found.append(f"state {self.run.directory}")
        return found


def testbed(*words: str) -> subprocess.CompletedProcess[str]:
    """Another verb."""
    return subprocess.run(
        [sys.executable, "-m", "testbed", *words], capture_output=True, text=True, cwd="/", timeout=60
    )


testbed.__test__ = False  # type: ignore[attr-defined]


def shipped(name: str) -> str:
    """A topology of the repository."""
    return (ROOT / "topologies" / f"{name}.yaml").read_text()
