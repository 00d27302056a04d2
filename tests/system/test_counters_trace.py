"""Counters, status and traces of a running pair of NICs, each against another witness.

Invariants: what a program reads in sysfs is what the NIC counted, at most 0.2 s old, and an idle NIC writes nothing; a
trace has exactly the frames of the capture; `testbed status` and `testbed trace` find a running NIC by its run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from softroce_ext.uverbs.hw_counters import FRESHNESS, RXE_NAMES
from softroce_ext.wire.opcodes import name_of
from testbed.cleanup.state import RunState
from testbed.diagram.trace import connection, flights, read
from tests.system.captures import frames
from tests.system.nic_pair import RUN, Host, finish, nics, pair, until

PORT_FOLDER = "/sys/class/infiniband/rxe0/ports/1"
"""Where a program reads it, on a machine with Linux rxe as here."""
READ_ALL = f"cd {RUN}/sys/class/infiniband/rxe0/ports/1 && for f in hw_counters/* migros/*; do echo $f $(cat $f); done"


@pytest.fixture
def joined() -> Iterator[tuple[Host, Host]]:
    """Two hosts with NICs that lose some frames, seeded."""
    with nics("--impair", "loss=0.01", "--seed", "5") as both:
        yield both


def counters(host: Host) -> dict[str, int]:
    """All counters' files, by name, as they are when they have had time to come to rest."""
    time.sleep(2 * FRESHNESS)
    lines = host.run("sh", "-c", READ_ALL).stdout.splitlines()
    return {name.split("/")[1]: int(value) for name, value in (line.split() for line in lines)}


def test_hw_counters_before_and_after_write_bw(joined: tuple[Host, Host]) -> None:
    server, client = joined
    before = counters(client)
    assert set(RXE_NAMES) < set(before)
    assert all(before[name] == 0 for name in RXE_NAMES)
    results = pair(server, client, ["ib_write_bw", "-x", "1", "-F", "-n", "500", "-s", "8192"])
    assert [code for code, _ in results] == [0, 0], results
    for host in joined:
        after = counters(host)
        counted = host.control().call("counters")
        assert {name: after[name] for name in RXE_NAMES} == counted["hw_counters"]
        assert after["refused_icrc" if "refused_icrc" in after else "tx_errors"] == 0
    assert after["sent_pkts"] >= 1000  # the client's: 500 writes of two packets
    assert after["rdma_sends"] == 0  # WRITEs are no SENDs
    assert after["retransmits"] > 0 and after["completer_retry_err"] > 0
    assert after["sent_pkts"] == after["tx_packets"]


def test_a_program_reads_them_below_sys(joined: tuple[Host, Host]) -> None:
    host = joined[0]
    run = host.run("cat", f"{PORT_FOLDER}/hw_counters/sent_pkts", f"{PORT_FOLDER}/hw_counters/lifespan", program=True)
    assert (run.returncode, run.stdout) == (0, "0\n200\n")


def test_an_idle_nic_writes_nothing() -> None:
    with nics() as (server, client):
        assert [code for code, _ in pair(server, client, ["ibv_rc_pingpong", "-g", "1", "-n", "50"])] == [0, 0]
        folder = client.path(f"{RUN}{PORT_FOLDER}") / "hw_counters"
        until(lambda: int((folder / "rdma_sends").read_text()) == 50, "the count of sends")
        time.sleep(2 * FRESHNESS)
        before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
        time.sleep(1.5)
        assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_trace_has_the_frames_of_the_capture(joined: tuple[Host, Host], tmp_path: Path) -> None:
    files = {host: (tmp_path / f"h{host.number}.jsonl", tmp_path / f"h{host.number}.pcap") for host in joined}
    for host, (trace, pcap) in files.items():
        host.control().call("trace_qp", file=str(trace))
        host.control().call("capture", file=str(pcap))
    # Its ends wait for each other: if one left at once, its last acknowledgement could not be repeated if it is lost.
    results = pair(*joined, ["ib_send_lat", "-x", "1", "-F", "-m", "1024", "-n", "100", "-s", "20000"])
    assert [code for code, _ in results] == [0, 0], results
    told = {}
    for host, (path, pcap) in files.items():
        lines = host.control().call("trace_qp", file=None)["lines"]
        host.control().call("capture", file=None)
        trace = read(path)
        assert lines == len(trace.lines) + 1
        for direction, mine in (("sent", True), ("received", False)):
            traced = [(line["opcode"], line["psn"], line["ip_id"]) for line in trace.packets(direction)]
            captured = [
                (name_of(frame.opcode), frame.psn, int.from_bytes(frame.data[18:20]))
                for frame in frames(pcap)
                if (frame.source == host.ip) == mine
            ]
            assert traced == captured and len(traced) >= 600
        again = sum(line.get("retransmit", False) for line in trace.packets("sent"))
        assert again == host.control().call("counters")["counters"]["retransmits"]
        completions = [line for line in trace.lines if line["event"] == "completion"]
        assert len(completions) == 200 and {line["status"] for line in completions} == {"SUCCESS"}
        told[host] = trace
    traces = list(told.values())
    lost = sum(flight.receiver is None for flight in flights(traces, connection(traces)))
    impaired = sum(host.control().call("counters")["counters"]["impairment_lost"] for host in joined)
    assert lost == impaired > 0


def verb(*words: str) -> subprocess.CompletedProcess[str]:
    """One verb of the testbed, as a user calls it."""
    return subprocess.run(
        [sys.executable, "-m", "testbed", *words], capture_output=True, text=True, timeout=60,
        env={**os.environ, "COLUMNS": "140"}, check=False,
    )  # fmt: skip


def test_status_and_trace_of_a_running_pair(
    joined: tuple[Host, Host], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIGROS_TESTBED_RUN", "")
    run_id = f"test-status-{os.getpid()}"
    state = RunState.create(run_id)
    programs = []
    try:
        for host in joined:
            state.record("host", pid=host.pid, name=f"node{host.number}")
        server, client = joined
        programs.append(server.start("ibv_rc_pingpong", "-g", "1", "-n", "1000000"))
        server.wait_for_listener(18515, programs[0])
        programs.append(client.start("ibv_rc_pingpong", "-g", "1", "-n", "1000000", server.ip))
        shown = wait_for_traffic(run_id)
        assert [nic["host"] for nic in shown] == ["node1", "node2"]
        for nic, other in (shown, shown[::-1]):
            (context,) = nic["contexts"]
            (qp,) = context["qps"]
            assert context["program"] == "ibv_rc_pingpong"
            assert (nic["device"], nic["active_mtu"]) == ("rxe0", 4096)
            assert (qp["remote_ip"], qp["remote_qpn"]) == (
                other["addresses"][0], other["contexts"][0]["qps"][0]["qpn"],
            )  # fmt: skip
            assert nic["hw_counters"]["rdma_sends"] >= qp["completed_sends"] > 0
        table = verb("status")
        assert table.returncode == 0
        for word in ("node1 · rxe0", "ibv_rc_pingpong · pid", "RTS", f"QPN {shown[1]['contexts'][0]['qps'][0]['qpn']}"):
            assert word in table.stdout
        file = tmp_path / "node1.jsonl"
        traced = verb("trace", "node1", "--run", run_id, "--seconds", "2", "-o", str(file))
        assert (traced.returncode, traced.stderr) == (0, "")
        assert len(read(file).packets("sent")) > 10
        assert "no running NIC at host node9" in verb("trace", "node9").stderr
    finally:
        for program in programs:
            program.kill()
            finish(program)
        state.close()


def wait_for_traffic(run_id: str) -> list[dict[str, Any]]:
    """The NICs of the run as `testbed status --json` shows them, when both sides have completed something."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        result = verb("status", "--json")
        assert result.returncode == 0, result.stderr
        shown: list[dict[str, Any]] = next(run["nics"] for run in json.loads(result.stdout) if run["run_id"] == run_id)
        qps = [qp for nic in shown for context in nic["contexts"] for qp in context["qps"]]
        if len(qps) == 2 and all(qp["completed_sends"] for qp in qps):
            return shown
        time.sleep(0.2)
    raise AssertionError("no traffic")
