"""The state file: written before each creation, survives being cut off, never leads to other people's things."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed.base.errors import EnvironmentProblem
from testbed.cleanup import clean as cleanup
from testbed.cleanup import state
from testbed.cleanup.clean import Removal
from testbed.cleanup.state import RUN_VARIABLE, RunState

R1, R2 = (f"r{number}-{uuid.uuid4().hex[:8]}" for number in (1, 2))
"""Names of runs. New each time, else a second pytest on this machine finds, and ends, the first one's processes."""


@pytest.fixture(autouse=True)
def unmarked(monkeypatch: pytest.MonkeyPatch) -> None:
    """`create` marks the environment of its process: undone after each test."""
    monkeypatch.setenv(RUN_VARIABLE, "")


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that is no run's."""
    process = subprocess.Popen(["sleep", "60"], env={"PATH": os.environ["PATH"]})
    yield process
    process.kill()
    process.wait()


def written_by_a_dead_process(base: Path, run_id: str, body: str) -> state.Run:
    """The run that `body` (with `state` at hand) leaves when its process is killed by SIGKILL."""
    code = f"""
import os, signal, subprocess, sys
from pathlib import Path
from testbed.cleanup.state import RunState
state = RunState.create({run_id!r}, Path({str(base)!r}))
{body}
os.kill(os.getpid(), signal.SIGKILL)
"""
    # Not a pipe: what the killed process has started would hold it open.
    complaints = base.parent / f"{run_id}.stderr"
    with complaints.open("w") as stream:
        result = subprocess.run(
            [sys.executable, "-c", code], cwd=Path(__file__).parents[3], stdout=stream, stderr=stream
        )
    assert result.returncode == -signal.SIGKILL, complaints.read_text()
    return state.read(base / run_id)


def test_recorded_is_read_back_and_forgotten_is_not(tmp_path: Path) -> None:
    run_state = RunState.create(R1, tmp_path)
    run_state.record("file", path=tmp_path / "a", purpose="test")
    token = run_state.record("directory", path=tmp_path / "b")
    run_state.forget(token)
    run = state.read(tmp_path / R1)
    assert [(entry["kind"], entry["path"], entry["purpose"]) for entry in run.entries] == [
        ("file", str(tmp_path / "a"), "test")
    ]
    assert run.alive
    run_state.close()
    assert state.runs(tmp_path) == []


def test_record_comes_before_the_thing() -> None:
    """Invariant: what a kill between record and creation leaves can be cleaned: nothing is there, nothing is done."""
    with pytest.raises(ValueError, match="unknown kind"):
        RunState("x").record("volume", path="/")


def test_line_cut_off_by_a_kill_is_passed_over(tmp_path: Path) -> None:
    run_state = RunState.create(R1, tmp_path)
    run_state.record("file", path=tmp_path / "a")
    with run_state.file.open("a") as file:
        file.write('{"kind":"file","tok')
    assert len(state.read(tmp_path / R1).entries) == 1


def test_run_without_a_first_line_is_given_time_to_write_it(tmp_path: Path) -> None:
    folder = tmp_path / R1
    folder.mkdir()
    assert state.read(folder).alive
    os.utime(folder, (0, 0))
    assert not state.read(folder).alive


def test_a_run_marks_its_environment(tmp_path: Path) -> None:
    RunState.create(R1, tmp_path)
    assert os.environ[RUN_VARIABLE] == R1
    RunState(R1, tmp_path).record("file", path=tmp_path / "b")
    assert len(state.read(tmp_path / R1).entries) == 1, "every object of this name appends to the same file"


def test_two_runs_cannot_have_one_name(tmp_path: Path) -> None:
    RunState.create(R1, tmp_path)
    with pytest.raises(FileExistsError):
        RunState.create(R1, tmp_path)


def test_taken_link_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="link lo already exists"):
        RunState.create(R1, tmp_path).record("link", name="lo")


def test_start_time_tells_a_recycled_pid() -> None:
    assert state.start_time(os.getpid()) == state.start_time(os.getpid())
    process = subprocess.Popen(["true"])
    process.wait()
    assert state.start_time(process.pid) is None


def test_clean_removes_what_was_made_and_nothing_else(tmp_path: Path) -> None:
    mine, theirs, base = tmp_path / "mine", tmp_path / "theirs", tmp_path / "runs"
    theirs.mkdir()
    (theirs / "file").write_text("precious")
    run = written_by_a_dead_process(
        base,
        R1,
        f"""
mine, theirs = Path({str(mine)!r}), Path({str(theirs)!r})
state.record("directory", path=mine); mine.mkdir(); (mine / "x").write_text("x")
state.record("directory", path=theirs)
state.record("file", path=theirs / "file")
state.record("file", path=theirs / "new"); (theirs / "new").write_text("x")
state.record("file", path=theirs / "never made")
""",
    )
    assert not run.alive
    assert sorted(map(str, cleanup.clean(run))) == sorted([f"directory {mine}", f"file {theirs}/new"])
    assert [path.name for path in theirs.iterdir()] == ["file"]
    assert not mine.exists() and state.runs(base) == []


def test_clean_ends_recorded_marked_and_descended_processes(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    """Recorded: known by pid and start. Marked: forked, but killed before it was recorded. Descended: children."""
    pids = tmp_path / "pids"
    run = written_by_a_dead_process(
        tmp_path / "runs",
        R1,
        f"""
bare = {{"PATH": os.environ["PATH"]}}
recorded = subprocess.Popen(["sh", "-c", "sleep 61 & sleep 62"], env=bare, start_new_session=True)
state.record("process", pid=recorded.pid)
marked = subprocess.Popen(["sleep", "63"], start_new_session=True)
Path({str(pids)!r}).write_text(f"{{recorded.pid}} {{marked.pid}}")
""",
    )
    recorded, marked = map(int, pids.read_text().split())
    # The shell was started, which does not mean that it has come to start its own.
    deadline = time.monotonic() + 60
    while len(cleanup.processes(run)) < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    children = set(cleanup.processes(run)) - {recorded, marked}
    assert len(children) == 2 and {recorded, marked} < set(cleanup.processes(run))
    cleanup.clean(run)
    assert all(state.start_time(pid) is None for pid in (recorded, marked, *children))
    assert sleeper.poll() is None


def test_what_cannot_be_killed_is_told_and_stays_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process that gets no processor time: a second clean must be able to find it."""
    run = written_by_a_dead_process(tmp_path / "runs", R1, "")
    monkeypatch.setattr(cleanup, "_end_processes", lambda run: [Removal("process", "1 (init)", cleanup.SURVIVED)])
    (line,) = map(str, cleanup.clean(run))
    assert line.startswith("process 1 (") and "NOT ended" in line
    assert state.runs(tmp_path / "runs") != []


def test_recycled_pid_is_spared(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    """Invariant: a pid whose start time differs from the recorded one is never signalled."""
    run = written_by_a_dead_process(
        tmp_path, R1, f"state.record('process', pid={sleeper.pid}, start={(state.start_time(sleeper.pid) or 0) - 1})"
    )
    assert cleanup.processes(run) == {}
    assert cleanup.clean(run) == []
    time.sleep(0.05)
    assert sleeper.poll() is None


def test_what_goes_by_itself_meanwhile_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The links of a dead host's namespace vanish some time after its last process."""
    run = written_by_a_dead_process(tmp_path, R1, "state.record('link', name='gone-eth0')")
    answers = iter([True, False])
    monkeypatch.setattr(cleanup, "exists", lambda kind, what: next(answers))
    assert cleanup.clean(run) == []
    assert state.runs(tmp_path) == []


def test_folder_with_something_mounted_below_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = written_by_a_dead_process(
        tmp_path / "runs",
        R1,
        f"d = Path({str(tmp_path / 'd')!r}); state.record('directory', path=d); (d / 'sub').mkdir(parents=True)",
    )
    monkeypatch.setattr(cleanup, "mounts", lambda: {str(tmp_path / "d/sub")})
    assert "NOT removed" in str(cleanup.clean(run)[0])
    assert (tmp_path / "d/sub").exists()
    assert state.runs(tmp_path / "runs") != []  # still known, so that a second clean can finish it
    monkeypatch.undo()
    assert list(map(str, cleanup.clean(state.read(tmp_path / "runs" / R1)))) == [f"directory {tmp_path}/d"]


@pytest.mark.parametrize(
    ("end", "message"),
    [
        ("exit 0", "ovs bridge b already exists"),
        ("exit 1", "does not say whether there is a bridge b"),
        ("kill -ALRM $$", "does not say whether there is a bridge b"),  # its --timeout
        ("exit 2", None),
    ],
)
def test_only_a_bridge_that_is_there_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, message: str | None
) -> None:
    """Invariant: a server that does not answer is not taken for a bridge; for `clean` there may be one all the same."""
    tool = tmp_path / "bin" / "ovs-vsctl"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\n{end}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=os.pathsep)
    run_state = RunState.create(R1, tmp_path / "runs")
    if message is None:
        run_state.record("ovs_bridge", name="b")
    else:
        with pytest.raises(EnvironmentProblem, match=message):
            run_state.record("ovs_bridge", name="b")
    assert state.exists("ovs_bridge", "b") is (message is not None)
    assert len(state.read(run_state.directory).entries) == (message is None)


def test_a_removal_without_an_answer_is_told_and_the_rest_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    run = written_by_a_dead_process(
        tmp_path / "runs",
        R1,
        f"state.record('link', name='m-eth0'); f = Path({str(file)!r}); state.record('file', path=f); f.touch()",
    )

    def hang(*argv: str) -> str | None:
        raise subprocess.TimeoutExpired(argv, 30)

    monkeypatch.setattr(cleanup, "call", hang)
    monkeypatch.setattr(cleanup, "exists", lambda kind, what: True)
    told, removed = map(str, cleanup.clean(run))
    assert told.startswith("link m-eth0: NOT removed: ") and "30 seconds" in told
    assert removed == f"file {file}" and not file.exists()
    assert [entry["kind"] for entry in state.read(run.directory).entries] == ["link", "file"]
