"""Invariant: the switch's scheduling is what it was once no run is left, and no other process is ever touched."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed.network import scheduling


@pytest.fixture
def switch(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process of the switch's name."""
    program = tmp_path / scheduling.SWITCH
    shutil.copy(shutil.which("sleep") or "/bin/sleep", program)
    process = subprocess.Popen([program, "60"])
    (tmp_path / "pid").write_text(f"{process.pid}\n")
    yield process
    process.kill()
    process.wait()


def policy(process: subprocess.Popen[bytes]) -> int:
    return os.sched_getscheduler(process.pid) & ~os.SCHED_RESET_ON_FORK


@pytest.mark.skipif(os.geteuid() != 0, reason="another's scheduling needs root")
def test_first_and_back(switch: subprocess.Popen[bytes], tmp_path: Path) -> None:
    assert scheduling.raise_priority(tmp_path, tmp_path / "pid")
    assert policy(switch) == os.SCHED_RR
    assert scheduling.raise_priority(tmp_path, tmp_path / "pid"), "a second run beside the first"
    scheduling.restore_priority(tmp_path)
    assert policy(switch) == os.SCHED_OTHER
    scheduling.restore_priority(tmp_path)


def test_another_process_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "pid").write_text(str(os.getpid()))
    before = os.sched_getscheduler(0)
    assert not scheduling.raise_priority(tmp_path, tmp_path / "pid")
    assert os.sched_getscheduler(0) == before
    assert not scheduling.raise_priority(tmp_path, tmp_path / "missing")
    scheduling.restore_priority(tmp_path)


def test_a_damaged_file_is_only_removed(tmp_path: Path) -> None:
    (tmp_path / "switch-scheduling").write_text("{")
    scheduling.restore_priority(tmp_path)
    assert not (tmp_path / "switch-scheduling").exists()
