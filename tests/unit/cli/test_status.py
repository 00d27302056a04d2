"""`testbed status`: finding NICs through the runs' state, and what is printed of one."""

from __future__ import annotations

import io
import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from testbed.base.errors import BadInput, EnvironmentProblem
from testbed.cleanup import state
from testbed.cleanup.state import RunState
from testbed.lab import nics
from testbed.view import nic_tables

QP = {
    "qpn": 65552, "handle": 5, "state": 3, "type": 2, "remote_qpn": 131088, "local_ip": "10.0.0.1",
    "remote_ip": "10.0.0.2", "path_mtu": 4096, "send_psn": 77, "una_psn": 70, "expected_psn": 99, "migros": True,
    "stopped": False, "paused": True, "resume_pending": False, "inflight": 1, "completed_sends": 1234,
    "completed_receives": 5, "retransmits": 6,
}  # fmt: skip
STATUS: dict[str, Any] = {
    "device": "rxe0", "interface": "h1-eth0", "mac": "02:00:00:00:00:01", "number_base": 1, "addresses": ["10.0.0.1"],
    "active_mtu": 4096, "migros": True,
    "contexts": [
        {"id": "1-0", "pid": os.getpid(), "inner_pid": 1, "held": False, "pds": 1, "mrs": 2, "mws": 0, "cqs": 1,
         "srqs": 0, "qps": [QP]}
    ],
    "rdma_cm": [
        {"id": "1-1", "pid": os.getpid(), "inner_pid": 1, "held": True, "events": 0, "ids": [
            {"handle": 1048576, "state": "LISTEN", "source": "0.0.0.0:7174", "destination": None, "connection": None,
             "groups": []}]}
    ],
    "counters": {"sent_pkts": 5, "refused_icrc": 3, "sent_nak_stopped": 1, "tx_bytes": 9000},
    "hw_counters": {"sent_pkts": 5, "rcvd_pkts": 0},
}  # fmt: skip


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of runs: run-a with host h1, whose NIC answers `status`."""
    monkeypatch.setenv(state.RUN_VARIABLE, "")
    monkeypatch.setattr(state, "BASE", tmp_path / "runs")
    monkeypatch.setattr(nics, "SOCKET", str(tmp_path / "control.sock").lstrip("/"))
    run = RunState.create("run-a", tmp_path / "runs")
    run.record("host", pid=os.getpid(), name="h1")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "control.sock"))
    listener.listen()

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, connection.makefile("rb") as requests:
                for request in requests:
                    good = json.loads(request)["command"] == "status"
                    answer = {"ok": True, **STATUS} if good else {"ok": False, "error": "no", "hint": "so"}
                    connection.sendall(json.dumps(answer).encode() + b"\n")

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield tmp_path / "runs"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(5)


def test_running_nics_are_found_by_their_run(base: Path) -> None:
    (nic,) = nics.running(base)
    assert (nic.run_id, nic.host) == ("run-a", "h1")
    report = nics.report(nic)
    assert report["refused"] == {"icrc": 3}
    assert report["contexts"][0]["program"]  # this very process
    assert nics.one("h1", base=base) == nic
    with pytest.raises(BadInput, match="no running NIC at host h2") as wrong:
        nics.one("h2", base=base)
    assert wrong.value.hint == "running NICs: h1 (run-a)"
    with pytest.raises(BadInput, match="no"):
        nic.call("trace_qp")


def test_a_host_in_two_runs_must_be_chosen(base: Path) -> None:
    RunState.create("run-b", base).record("host", pid=os.getpid(), name="h1")
    with pytest.raises(BadInput, match="in several runs"):
        nics.one("h1", base=base)
    assert nics.one("h1", "run-b", base).run_id == "run-b"


def test_a_nic_that_has_gone(tmp_path: Path) -> None:
    nic = nics.RunningNic("run-a", "h1", tmp_path / "nothing.sock")
    with pytest.raises(EnvironmentProblem, match="no NIC answers"):
        nic.call("status")
    assert nics.program(None) is None and nics.program(2**22 + 1) is None


def test_what_is_printed(base: Path) -> None:
    report = nics.report(nics.running(base)[0])
    stream = io.StringIO()
    Console(file=stream, width=140).print(nic_tables.render(report))
    text = stream.getvalue()
    for words in (
        "h1 · rxe0 · h1-eth0 · 10.0.0.1 · active MTU 4096 · MigrOS · run run-a",
        f"pid {os.getpid()} · context 1-0 · 1 PD, 2 MR, 0 MW, 1 CQ, 0 SRQ",
        "10.0.0.2 QPN 131088",
        "1,234",
        "Paused",
        "sent_pkts 5",
        "icrc 3",
        "sent_nak_stopped 1",
        "tx_bytes 9,000",
    ):
        assert words in text
    assert "rcvd_pkts" not in text  # it is 0


def test_the_verb(base: Path) -> None:
    from testbed.cli.main import _app

    (run,) = json.loads(CliRunner().invoke(_app, ["status", "--json"]).stdout)
    assert (run["run_id"], run["alive"], [nic["host"] for nic in run["nics"]]) == ("run-a", True, ["h1"])
    printed = CliRunner().invoke(_app, ["status"]).stdout
    assert f"run-a: live (pid {os.getpid()}); 1 host" in printed and "h1 · rxe0" in printed


def test_nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from testbed.cli.main import _app

    monkeypatch.setattr(state, "BASE", tmp_path / "none")
    assert CliRunner().invoke(_app, ["status"]).stdout == "no runs on this machine\n"
    assert json.loads(CliRunner().invoke(_app, ["status", "--json"]).stdout) == []
