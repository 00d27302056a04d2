"""Real migrations: unmodified RDMA programs, the real NIC, network, controller, SSH and CRIU.

Invariants: both programs end with code 0 and their own data check passes, whichever end moves, at whatever moment, how
often it moves, and whatever fails before the resume; the record says what happened and how long it took.

A program moves after so many bytes rather than seconds: it is in mid-traffic then, on a quick machine and a slow one.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from testbed.base.errors import RunFailed
from testbed.controller.client import ControllerClient
from testbed.lab.session import Session
from testbed.record.summary import Summary
from tests.system.moves import ended_well, run_moves, succeeded, topology
from tests.system.testbed_runs import Run

pytestmark = pytest.mark.system

PINGPONG = "ibv_rc_pingpong -g 1 -n 6000 -c"
"""4 KiB there and back, every byte checked by the program: 48 MiB in all."""
IN_MID_TRAFFIC = 1000
"""Packets of a NIC by which the move is known to have come in mid-traffic: no handshake or RESUME takes so many."""
SERVER = "app: server, to: h3, at: 4MiB, address: keep"
CLIENT = "app: client, to: h3, at: 4MiB, address: change"


def pingpong(folder: Path, *migrations: str, options: str = "") -> Path:
    """The pingpong between two programs."""
    return topology(folder, PINGPONG + options, PINGPONG + options, *migrations)


def rolled_back(summary: Summary, why: str) -> None:
    """The programs ended well where they were; the record and the problems say why."""
    ended_well(summary)
    assert not summary.ok
    (record,) = summary.migrations
    assert record.rolled_back and not record.ok
    assert why in (record.error or ""), record.error
    assert any(why in problem.error for problem in summary.problems)
    assert summary.apps[0].final_host == summary.apps[0].host


def agent_pid(session: Session, host: str) -> int:
    return int(session.hosts[host].about["pid"])


def inside(session: Session, host: str, *argv: str) -> None:
    """Run a command in a host's mount namespace."""
    subprocess.run(["nsenter", "-t", str(agent_pid(session, host)), "-m", "--", *argv], check=True)


def in_mid_transfer(session: Session, agent: int, act: Callable[[], object]) -> None:
    """Call `act` when the images are on their way to the destination, whose `agent` does not take them before that.

    It is stopped as soon as it has promised to, so however late we come, the migration has not gone on meanwhile.
    """

    def listen(event: Any) -> None:
        if event["event"] == "phase_finished" and event["phase"] == "prepare":
            os.kill(agent, signal.SIGSTOP)
        elif event["event"] == "phase_started" and event["phase"] == "transfer":
            act()

    session.folder.subscribe(listen)


# ---- it works --------------------------------------------------------------------------------------------------------


def test_the_server_moves_with_its_address(tmp_path: Path) -> None:
    summary = run_moves(pingpong(tmp_path, SERVER), tmp_path)
    succeeded(summary)
    (record,) = summary.migrations
    assert record.blackout_from == "completions" and record.partner_gap_ms is not None
    flows = [change for change in summary.flow_changes if change.migration == 0]
    assert {change.action for change in flows} >= {"added", "removed"}


def test_the_client_moves_and_changes_its_address(tmp_path: Path) -> None:
    summary = run_moves(pingpong(tmp_path, CLIENT), tmp_path)
    succeeded(summary)
    assert not [change for change in summary.flow_changes if change.migration == 0]


def test_there_and_back(tmp_path: Path) -> None:
    succeeded(run_moves(pingpong(tmp_path, SERVER, "app: server, to: h2, at: 16MiB, address: keep"), tmp_path))


def test_both_ends_move_the_second_to_where_the_first_was(tmp_path: Path) -> None:
    """With event mode (-e): completion channels move too. The address that left must be forgotten by its old NIC."""
    moves = (SERVER, "app: client, to: h2, at: 16MiB, address: keep")
    succeeded(run_moves(pingpong(tmp_path, *moves, options=" -e"), tmp_path))


def test_to_the_partner_s_host_and_away_from_it(tmp_path: Path) -> None:
    """Frames between two programs of one host are never on the wire; before and after that they are."""
    command = "ib_send_bw -d rxe0 -x 1 -D 12 -s 65536"
    moves = ("app: server, to: h1, at: 2s, address: keep", "app: server, to: h3, at: 5s, address: keep")
    succeeded(run_moves(topology(tmp_path, command, command, *moves), tmp_path))


@pytest.mark.parametrize("app", ["server", "client"])
@pytest.mark.parametrize("program", ["ib_write_bw", "ib_send_bw", "ib_send_bw -R"])
def test_perftest_moves_in_mid_traffic(tmp_path: Path, program: str, app: str) -> None:
    """A queue pair that only receives (the server's) stays in RTR, and perftest keeps a connection for itself open.

    That is one of TCP, or (-R) a second queue pair.
    """
    command = f"{program} -d rxe0 -x 1 -D 6 -s 65536"
    path = topology(tmp_path, command, command, f"app: {app}, to: h3, at: 4MiB, address: keep")
    summary = run_moves(path, tmp_path)
    succeeded(summary)
    (record,) = summary.migrations
    (mover,) = (item for item in summary.apps if item.name == app)
    assert (record.app, record.from_host, record.to_host) == (app, mover.host, "h3") and mover.final_host == "h3"
    for host in (record.from_host, record.to_host):
        (nic,) = (item.nic for item in summary.hosts if item.name == host)
        assert nic["rx_packets"] + nic["tx_packets"] > IN_MID_TRAFFIC, f"hardly any traffic before or after: {host}"


@pytest.mark.parametrize(("move", "rerouted"), [(SERVER, True), (CLIENT, False)], ids=["server-keep", "client-change"])
def test_over_ipv6(tmp_path: Path, move: str, rerouted: bool) -> None:
    """GID index 2 is the host's IPv6 address; it moves, and is rerouted, with the IPv4 address that it belongs to."""
    command = PINGPONG.replace("-g 1", "-g 2")
    summary = run_moves(topology(tmp_path, command, command, move), tmp_path)
    succeeded(summary)
    assert all("GID fd4d::a00:" in " ".join(item.tail) for item in summary.apps)
    changed = {change.match for change in summary.flow_changes if change.migration == 0}
    assert changed == ({"ipv4_dst=10.0.0.2", "ipv6_dst=fd4d::a00:2"} if rerouted else set())


RPING = "rping {side} -a 10.0.0.2 -C {count} -S 1000 -V"
"""Connects by rdma_cm; every byte checked by the program, in both directions, and disconnected at the end."""


@pytest.mark.parametrize(("app", "address"), [("server", "keep"), ("client", "keep"), ("client", "change")])
def test_a_program_that_uses_rdma_cm_moves(tmp_path: Path, app: str, address: str) -> None:
    """Its connection outlives the move: the queue pair, and the connection manager's, which ends it by a DREQ."""
    server, client = (RPING.format(side=side, count=4000) for side in ("-s", "-c"))
    path = topology(tmp_path, server, client, f"app: {app}, to: h3, at: 1MiB, address: {address}")
    path.write_text(path.read_text().replace(" {server.ip}", ""))
    summary = run_moves(path, tmp_path)
    succeeded(summary)
    # The client may have ended before its own thread says so.
    output = " ".join(next(item for item in summary.apps if item.name == "server").tail)
    assert "server DISCONNECT EVENT" in output, output


# ---- it fails, and the program continues -----------------------------------------------------------------------------


def test_the_destination_has_no_usable_criu(tmp_path: Path) -> None:
    def spoil(session: Session) -> None:
        from testbed.checkpoint import criu_binary

        binary = criu_binary.find()[-1]
        inside(session, "h3", "mount", "--bind", "/bin/true", binary)

    path = pingpong(tmp_path, SERVER)
    rolled_back(run_moves(path, tmp_path, spoil), "no CRIU works here")


def test_the_destination_s_disk_is_full(tmp_path: Path) -> None:
    def fill(session: Session) -> None:
        inside(session, "h3", "mkdir", "-p", "/run/migros/migrate")
        inside(session, "h3", "mount", "-t", "tmpfs", "-o", "size=64k", "full", "/run/migros/migrate")

    path = pingpong(tmp_path, SERVER)
    rolled_back(run_moves(path, tmp_path, fill), "No space left on device")


def test_the_destination_s_nic_dies_while_the_program_is_frozen(tmp_path: Path) -> None:
    def arm(session: Session) -> None:
        agent = agent_pid(session, "h3")
        nic = int(subprocess.check_output(["pgrep", "-P", str(agent), "-f", "softroce_ext"]).split()[0])

        def kill() -> None:
            os.kill(nic, signal.SIGKILL)
            os.kill(agent, signal.SIGCONT)

        in_mid_transfer(session, agent, kill)

    path = pingpong(tmp_path, SERVER)
    rolled_back(run_moves(path, tmp_path, arm), "NIC")


def test_the_destination_s_agent_dies_in_mid_transfer(tmp_path: Path) -> None:
    def arm(session: Session) -> None:
        agent = agent_pid(session, "h3")
        in_mid_transfer(session, agent, lambda: os.kill(agent, signal.SIGKILL))

    path = pingpong(tmp_path, SERVER)
    rolled_back(run_moves(path, tmp_path, arm), "")


def test_the_controller_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_self: ControllerClient, ip: str, to_host: str) -> dict[str, Any]:
        raise RunFailed("switch s1 did not confirm", where="controller, move")

    monkeypatch.setattr(ControllerClient, "move", refuse)
    path = pingpong(tmp_path, SERVER)
    rolled_back(run_moves(path, tmp_path), "switch s1 did not confirm")


@pytest.mark.parametrize("phase", ["prepare", "dump_process", "restore_process"])
def test_ctrl_c_in_mid_migration_ends_cleanly(tmp_path: Path, phase: str) -> None:
    """Exit code 130, the folder tells it, and nothing of the run is left: no frozen program, no CRIU, no namespace."""
    text = pingpong(tmp_path, SERVER).read_text()
    stopped = Run(tmp_path, text)
    stopped.wait_for(lambda event: event["event"] == "phase_started" and event["phase"] == phase, timeout=90)
    made = stopped.made()
    stopped.process.send_signal(signal.SIGINT)
    assert stopped.finish() == 130, stopped.stderr
    assert stopped.summary["interrupted"]
    assert made.left() == []
