"""Real migrations of programs that use other things than RC's sends and writes.

Shared receive queues, atomics, memory windows, SENDs that take a key back, UC, UD.

Invariants: nothing that a reliable service promised is lost, duplicated or changed by the move, a counter that is added
to by atomics is exact; what the unreliable ones lose while the program is frozen is all that they lose. The programs
check it themselves (tests/system/verbs_traffic.py and verbs_windows.py, and -c of the stock one).
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.system import programs
from tests.system.moves import run_moves, succeeded, topology

MOVE = "app: {app}, to: h3, at: 64KiB, address: keep"
"""In mid-traffic: how long a program needs to begin is not the same on every machine."""


def traffic(mode: str, seconds: int) -> str:
    """The command of a program that checks numbered traffic; the client's gets the server's address besides."""
    return shlex.join(programs.module("verbs_traffic", mode, str(seconds)))


@pytest.mark.parametrize("app", ["server", "client"])
@pytest.mark.parametrize("mode", ["adder", "shared"])
def test_atomics_and_a_shared_receive_queue_move(tmp_path: Path, mode: str, app: str) -> None:
    """The counter's owner and who adds to it; who shares the queue and who sends to it."""
    command = traffic(mode, 9)
    summary = run_moves(topology(tmp_path, command, command, MOVE.format(app=app)), tmp_path)
    succeeded(summary)
    counts = {re.search(r"ok (\d+)", " ".join(program.tail))[1] for program in summary.apps}  # type: ignore[index]
    assert len(counts) == 1, "both ends count the same"


@pytest.mark.parametrize("address", ["keep", "change"])
@pytest.mark.parametrize("app", ["server", "client"])
def test_memory_windows_move(tmp_path: Path, app: str, address: str) -> None:
    """The windows' owner and who uses them. Bound, free, never bound; keys taken back before the move and after it."""
    command = shlex.join(programs.module("verbs_windows", "9"))
    move = f"app: {app}, to: h3, at: 512KiB, address: {address}"
    summary = run_moves(topology(tmp_path, command, command, move), tmp_path)
    succeeded(summary)
    counts = {re.search(r"ok (\d+)", " ".join(program.tail))[1] for program in summary.apps}  # type: ignore[index]
    assert len(counts) == 1, "both ends count the same"


@pytest.mark.parametrize("mode", ["uc", "ud"])
def test_unreliable_services_move(tmp_path: Path, mode: str) -> None:
    """What comes after the move is whole and in order, and it does come."""
    command = traffic(mode, 9)
    summary = run_moves(topology(tmp_path, command, command, MOVE.format(app="server")), tmp_path)
    succeeded(summary, reliable=False)


@pytest.mark.parametrize(
    ("program", "qps"), [("ibv_srq_pingpong -g 1 -c -q 16 -n 25000 -s 8192 -e", 16), ("ib_atomic_bw -x 1 -D 9 -q 2", 2)]
)
def test_stock_programs_move(tmp_path: Path, program: str, qps: int) -> None:
    """Sixteen queue pairs on one shared receive queue, with events; perftest's atomics on two."""
    summary = run_moves(topology(tmp_path, program, program, MOVE.format(app="server")), tmp_path)
    succeeded(summary, qps=qps)
