"""`testbed clean`: what it prints and its exit code are about what is really gone."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed.base.errors import Exit
from testbed.cleanup import clean as cleanup
from testbed.cleanup import state
from testbed.cli.clean import clean
from testbed.network import fixtures

LEFT_BY_A_DEAD_PROCESS = """
import os, signal, sys
from pathlib import Path
from testbed.cleanup.state import RunState
state = RunState.create("run-a", Path(sys.argv[1]))
state.record("file", path=Path(sys.argv[2]))
Path(sys.argv[2]).touch()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that a killed run has left; the machine's shared fixtures are left alone."""
    base, file = tmp_path / "runs", tmp_path / "file"
    monkeypatch.setenv(state.RUN_VARIABLE, "")
    subprocess.run([sys.executable, "-c", LEFT_BY_A_DEAD_PROCESS, base, file], cwd=Path(__file__).parents[3])
    runs = state.runs
    monkeypatch.setattr(state, "runs", lambda: runs(base))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(fixtures, "clean", lambda *_: None)
    yield file


def test_what_is_removed_is_listed(left: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert clean(None, False) == Exit.OK
    assert capsys.readouterr().out == f"run-a: removed file {left}\n"
    assert not left.exists() and state.runs() == []


def test_a_process_that_survives_is_a_failure(
    left: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was killed and does not die (state D, or no processor time): the exit code says so, and nothing `removed`."""
    survivor = subprocess.Popen(["sleep", "60"])
    start = state.start_time(survivor.pid)
    while not Path(f"/proc/{survivor.pid}/cmdline").read_bytes().startswith(b"sleep"):
        time.sleep(0.01)  # it has been forked and has not executed the program yet
    try:
        with monkeypatch.context() as patch:
            patch.setattr(cleanup, "processes", lambda run: {survivor.pid: start})
            patch.setattr(os, "kill", lambda pid, number: None)
            patch.setattr("testbed.cleanup.clean.time.sleep", lambda seconds: None)
            patch.setattr("testbed.cleanup.clean.time.monotonic", iter(range(0, 1000, 15)).__next__)
            assert clean(None, False) == Exit.ENVIRONMENT
    finally:
        survivor.kill()
        survivor.wait()
    process, file = capsys.readouterr().out.splitlines()
    assert process == f"run-a: process {survivor.pid} (sleep 60): NOT ended: it was killed and is still there"
    assert file == f"run-a: removed file {left}"


def test_a_file_that_stays_is_a_failure(
    left: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: str) -> None:
        raise PermissionError(1, "Operation not permitted", path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse)
        assert clean(None, False) == Exit.ENVIRONMENT
    assert capsys.readouterr().out.startswith(f"run-a: file {left}: NOT removed: ")
    assert [run.run_id for run in state.runs()] == ["run-a"], "a second clean must be able to find it"
