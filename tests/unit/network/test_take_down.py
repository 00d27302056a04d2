"""Taking a run down: whatever fails or interrupts it, each thing is removed or stays named in the state file.

Nothing here makes a network: the steps are stand-ins, the processes are the test's own.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from testbed.base.errors import RunFailed
from testbed.cleanup import state
from testbed.cleanup.child import Child
from testbed.cleanup.state import RUN_VARIABLE, RunState
from testbed.controller.process import ControllerProcess
from testbed.network import Network, machine, ssh
from testbed.run import interrupts, runner


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunState:
    """A run of this process, with all that the runner knows of others kept away from this machine's."""
    monkeypatch.setenv(RUN_VARIABLE, "")  # put back afterwards: `create` changes it
    base = tmp_path / "runs"
    monkeypatch.setattr(runner, "runs", lambda: state.runs(base))
    monkeypatch.setattr(runner.fixtures, "clean", lambda: None)
    return RunState.create("run", base)


def empty_network(run: RunState, *steps: tuple[str, Callable[[], None]]) -> Network:
    """One that has nothing but these steps to undo, the last one first."""
    unused: Any = None
    network = Network(unused, run.directory.parent, run)
    network._undo += steps
    return network


class OnceInterrupted:
    """A step that Ctrl-C hits in its midst, the first time."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> None:
        self.calls += 1
        if self.calls == 1:
            raise KeyboardInterrupt


class Interrupting(RunState):
    """A state whose first `forget` is interrupted before it has written anything."""

    interrupted = False

    def forget(self, token: str) -> None:
        if not self.interrupted:
            self.interrupted = True
            raise KeyboardInterrupt
        super().forget(token)


# ---- what stays is known -------------------------------------------------------------------------------------------


def take_down(run: RunState, network: Network) -> None:
    """As the runner does."""
    with contextlib.ExitStack() as stack:
        stack.callback(runner._forget, run)
        stack.callback(network.stop)


def test_what_could_not_be_removed_stays_known(run: RunState) -> None:
    """Invariant: RunFailed says `testbed clean`, so the state file that it reads is there, with just the rest in it."""
    gone, stays = (run.record("file", path=run.directory.parent / name) for name in ("gone", "stays"))

    def no_answer() -> None:
        raise machine.CommandFailed(["ovs-vsctl", "del-br", "x"], "no answer within 60 s")

    network = empty_network(run, ("the first", lambda: run.forget(gone)), ("bridge s1", no_answer))
    with pytest.raises(RunFailed, match=r"bridge s1: .*no answer"):
        take_down(run, network)
    assert [entry["token"] for entry in state.read(run.directory).entries] == [stays]


def test_a_run_that_removed_everything_leaves_no_state(run: RunState) -> None:
    token = run.record("file", path=run.directory.parent / "gone")
    take_down(run, empty_network(run, ("it", lambda: run.forget(token))))
    assert state.runs(run.directory.parent) == []


# ---- interrupts ----------------------------------------------------------------------------------------------------


def test_an_interrupted_step_is_carried_out_again(run: RunState) -> None:
    """Invariant: however `stop` is left, the steps that have not ended are still to be done."""
    interrupted, before, after = OnceInterrupted(), [], []
    network = empty_network(run, ("a", lambda: after.append(1)), ("b", interrupted), ("c", lambda: before.append(1)))
    with pytest.raises(KeyboardInterrupt):
        network.stop()
    assert (before, after) == ([1], [])
    network.stop()
    assert (before, interrupted.calls, after) == ([1], 2, [1])


def test_a_failed_step_is_not_tried_again(run: RunState) -> None:
    calls = []

    def fail() -> None:
        calls.append(1)
        raise OSError("busy")

    network = empty_network(run, ("it", fail))
    with pytest.raises(RunFailed, match="it: busy"):
        network.stop()
    network.stop()
    assert calls == [1]


class FakeNode:
    """A Mininet node without namespaces; `terminate` is interrupted where Mininet's waits for the shell.

    It closes a descriptor before that, so it must not be called twice.
    """

    inNamespace = False

    def __init__(self) -> None:
        self.shell: subprocess.Popen[bytes] | None = subprocess.Popen(["sleep", "600"])
        self.terminated = False

    def terminate(self) -> None:
        if self.terminated:
            raise OSError(errno.EBADF, "Bad file descriptor")
        self.terminated = True
        raise KeyboardInterrupt


def test_a_node_can_be_ended_again(run: RunState) -> None:
    node = FakeNode()
    assert node.shell is not None
    pid = node.shell.pid
    network = empty_network(run)
    network._undo.append(("host h1", network._node_remover(node, run.record("host", pid=pid, name="h1"))))
    with pytest.raises(KeyboardInterrupt):
        network.stop()
    network.stop()
    assert node.shell is None and state.start_time(pid) is None
    assert state.read(run.directory).entries == []


@pytest.mark.parametrize("kind", ["sshd", "controller"])
def test_a_server_can_be_stopped_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Invariant: a stop that was interrupted before it told the state file does so when it is called again."""
    monkeypatch.setenv(RUN_VARIABLE, "")
    run = Interrupting.create("run", tmp_path)
    server: Any = (
        ssh.Server("h1", 1, "100.65.0.1", tmp_path, run, tmp_path / "log")
        if kind == "sshd"
        else ControllerProcess(Any, run, tmp_path / "log")  # type: ignore[arg-type]
    )
    server._child = Child(run, ["sleep", "600"], popen={}, role=kind)
    with pytest.raises(KeyboardInterrupt):
        server.stop()
    server.stop()
    server.stop()
    assert state.read(run.directory).entries == []


def test_a_command_is_out_of_reach_of_the_terminal_s_interrupts() -> None:
    """A terminal sends SIGINT to its foreground process group, which is this process's: the command is in another."""
    group = machine.command("sh", "-c", "read -r stat < /proc/$$/stat; set -- $stat; echo $5")
    assert int(group) != os.getpgrp()


def test_an_interrupt_during_the_clean_up_waits_for_no_lock() -> None:
    """Invariant: the handler returns at once, also if the interrupted thread holds the lock that `tell` takes."""
    lock = threading.Lock()
    told = []

    def tell() -> None:
        told.append(lock.acquire(timeout=20))

    with interrupts.postponed(tell), lock:
        signal.raise_signal(signal.SIGINT)
    assert told == [True]


def test_every_interrupt_is_answered_and_none_cuts_the_clean_up_short() -> None:
    told = []

    def tell() -> None:
        told.append(threading.current_thread())
        raise OSError(errno.ENOSPC, "No space left on device")

    before = signal.getsignal(signal.SIGINT)
    with interrupts.postponed(tell):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.raise_signal(number)
    assert len(told) == 3 and threading.main_thread() not in told
    assert signal.getsignal(signal.SIGINT) is before
