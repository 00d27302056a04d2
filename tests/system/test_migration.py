"""Real migrations: unmodified RDMA programs, the real NIC, network, controller, SSH and CRIU.

Invariants: both programs end with code 0 and their own data check passes, whichever end moves, at whatever moment, how
often it moves, and whatever fails before the resume; the record says what happened and how long it took.
"""

from __future__ import annotations

import functools
import os
import re
import signal
import subprocess
import tempfile
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import Run

from testbed.controller.client import ControllerClient
from testbed.errors import RunFailed
from testbed.runner import Options, run
from testbed.session import Session
from testbed.summary import PHASES, Summary
from testbed.topology import load

pytestmark = pytest.mark.system

PINGPONG = "ibv_rc_pingpong -g 1 -n {count} -c"
"""4 KiB there and back, every byte checked by the program."""


def topology(folder: Path, server: str, client: str, *migrations: str) -> Path:
    """A file with three hosts at one switch and two programs."""
    text = textwrap.dedent(
        f"""\
        name: moved
        hosts: {{h1: {{ip: 10.0.0.1}}, h2: {{ip: 10.0.0.2}}, h3: {{}}}}
        switches: [s1]
        links: [[h1, s1], [h2, s1], [h3, s1]]
        apps:
          server: {{host: h2, command: "{server}", timeout: 150s}}
          client: {{host: h1, command: "{client} {{server.ip}}", after: server, timeout: 150s}}
        """
    )
    if migrations:
        text += "migrations:\n" + "".join(f"  - {{{line}}}\n" for line in migrations)
    path = folder / "moved.yaml"
    path.write_text(text)
    return path


@functools.cache
def seconds_per_iteration() -> float:
    """How long a round of the pingpong takes on this machine now: 0.1 ms when it is quiet, 15 ms when it is not."""
    with tempfile.TemporaryDirectory() as folder:
        command = PINGPONG.format(count=300)
        summary = moved(topology(Path(folder), command, command), Path(folder))
    found = re.search(r"([\d.]+) usec/iter", " ".join(summary.apps[0].tail))
    assert found is not None, summary.to_json()
    # Other load may cease meanwhile: a migration must be due before the program ends all the same.
    return min(float(found[1]) / 1e6, 0.008)


def pingpong(folder: Path, seconds: float, *migrations: str) -> Path:
    """A pingpong that lasts about this long: it counts iterations, and has no option for a time."""
    command = PINGPONG.format(count=max(500, int(seconds / seconds_per_iteration())))
    return topology(folder, command, command, *migrations)


def moved(path: Path, folder: Path, meanwhile: Callable[[Session], Any] | None = None) -> Summary:
    """Run a topology with its results below `folder`."""
    return run(load(path).resolve(), Options(root=folder / "results", meanwhile=meanwhile))


def ended_well(summary: Summary) -> None:
    """Both programs did, and no data was damaged."""
    assert {app.name: app.exit_code for app in summary.apps} == {"server": 0, "client": 0}, summary.to_json()
    assert all(app.ok for app in summary.apps)


def succeeded(summary: Summary) -> None:
    ended_well(summary)
    assert summary.ok, summary.to_json()
    for record in summary.migrations:
        assert record.ok and not record.rolled_back and record.error is None
        assert list(record.phases_ms) == list(PHASES)
        assert record.app_exit_code == 0
        assert record.blackout_ms is not None and record.blackout_ms > 0
        assert record.image_bytes and record.nic_image_bytes and record.qps == 1
        assert record.resumes and record.resumes >= 1


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


def at_phase(session: Session, phase: str, act: Callable[[], object]) -> None:
    """Call `act` once, as soon as `phase` of a migration begins, in a thread of its own."""
    begun = threading.Event()

    def listen(event: Any) -> None:
        if event["event"] == "phase_started" and event["phase"] == phase and not begun.is_set():
            begun.set()
            threading.Thread(target=act, daemon=True).start()

    session.folder.subscribe(listen)


# ---- it works --------------------------------------------------------------------------------------------------------


def test_the_server_moves_with_its_address(tmp_path: Path) -> None:
    summary = moved(pingpong(tmp_path, 10, "app: server, to: h3, at: 1s, address: keep"), tmp_path)
    succeeded(summary)
    (record,) = summary.migrations
    assert record.blackout_from == "completions" and record.partner_gap_ms is not None
    flows = [change for change in summary.flow_changes if change.migration == 0]
    assert {change.action for change in flows} >= {"added", "removed"}


def test_the_client_moves_and_changes_its_address(tmp_path: Path) -> None:
    summary = moved(pingpong(tmp_path, 10, "app: client, to: h3, at: 1s, address: change"), tmp_path)
    succeeded(summary)
    assert not [change for change in summary.flow_changes if change.migration == 0]


def test_there_and_back(tmp_path: Path) -> None:
    moves = [f"app: server, to: {host}, at: {at}, address: keep" for host, at in (("h3", "1s"), ("h2", "3s"))]
    succeeded(moved(pingpong(tmp_path, 20, *moves), tmp_path))


def test_both_ends_move_the_second_to_where_the_first_was(tmp_path: Path) -> None:
    """With event mode (-e): completion channels move too. The address that left must be forgotten by its old NIC."""
    command = PINGPONG.format(count=max(500, int(20 / seconds_per_iteration()))) + " -e"
    moves = ("app: server, to: h3, at: 1s, address: keep", "app: client, to: h2, at: 3s, address: keep")
    succeeded(moved(topology(tmp_path, command, command, *moves), tmp_path))


def test_to_the_partner_s_host_and_away_from_it(tmp_path: Path) -> None:
    """Frames between two programs of one host are never on the wire; before and after that they are."""
    command = "ib_send_bw -d rxe0 -x 1 -D 8 -s 65536"
    moves = ("app: server, to: h1, at: 2s, address: keep", "app: server, to: h3, at: 5s, address: keep")
    succeeded(moved(topology(tmp_path, command, command, *moves), tmp_path))


@pytest.mark.parametrize("app", ["server", "client"])
@pytest.mark.parametrize("program", ["ib_write_bw", "ib_send_bw"])
def test_perftest_moves_in_mid_traffic(tmp_path: Path, program: str, app: str) -> None:
    """A queue pair that only receives (the server's) stays in RTR, and perftest keeps a TCP connection open."""
    command = f"{program} -d rxe0 -x 1 -D 6 -s 65536"
    path = topology(tmp_path, command, command, f"app: {app}, to: h3, at: 2s, address: keep")
    succeeded(moved(path, tmp_path))


# ---- it fails, and the program goes on -------------------------------------------------------------------------------


def test_the_destination_has_no_usable_criu(tmp_path: Path) -> None:
    def spoil(session: Session) -> None:
        from testbed.checkpoint import criu_binary

        binary = criu_binary.find()[-1]
        inside(session, "h3", "mount", "--bind", "/bin/true", binary)

    path = pingpong(tmp_path, 10, "app: server, to: h3, at: 1s, address: keep")
    rolled_back(moved(path, tmp_path, spoil), "no CRIU works here")


def test_the_destination_s_disk_is_full(tmp_path: Path) -> None:
    def fill(session: Session) -> None:
        inside(session, "h3", "mkdir", "-p", "/run/migros/migrate")
        inside(session, "h3", "mount", "-t", "tmpfs", "-o", "size=64k", "full", "/run/migros/migrate")

    path = pingpong(tmp_path, 10, "app: server, to: h3, at: 1s, address: keep")
    rolled_back(moved(path, tmp_path, fill), "No space left on device")


def test_the_destination_s_nic_dies_while_the_program_is_frozen(tmp_path: Path) -> None:
    def arm(session: Session) -> None:
        nic = int(
            subprocess.check_output(["pgrep", "-P", str(agent_pid(session, "h3")), "-f", "softroce_ext"]).split()[0]
        )
        at_phase(session, "dump_process", lambda: os.kill(nic, signal.SIGKILL))

    path = pingpong(tmp_path, 10, "app: server, to: h3, at: 1s, address: keep")
    rolled_back(moved(path, tmp_path, arm), "NIC")


def test_the_destination_s_agent_dies_in_mid_transfer(tmp_path: Path) -> None:
    def arm(session: Session) -> None:
        pid = agent_pid(session, "h3")
        at_phase(session, "dump_process", lambda: os.kill(pid, signal.SIGKILL))

    path = pingpong(tmp_path, 10, "app: server, to: h3, at: 1s, address: keep")
    rolled_back(moved(path, tmp_path, arm), "")


def test_the_controller_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_self: ControllerClient, ip: str, to_host: str) -> dict[str, Any]:
        raise RunFailed("switch s1 did not confirm", where="controller, move")

    monkeypatch.setattr(ControllerClient, "move", refuse)
    path = pingpong(tmp_path, 10, "app: server, to: h3, at: 1s, address: keep")
    rolled_back(moved(path, tmp_path), "switch s1 did not confirm")


@pytest.mark.parametrize("phase", ["prepare", "dump_process", "restore_process"])
def test_ctrl_c_in_mid_migration_ends_cleanly(tmp_path: Path, phase: str) -> None:
    """Exit code 130, the folder tells it, and nothing of the run is left: no frozen program, no CRIU, no namespace."""
    text = pingpong(tmp_path, 60, "app: server, to: h3, at: 1s, address: keep").read_text()
    begun = Run(tmp_path, text)
    begun.wait_for(lambda event: event["event"] == "phase_started" and event["phase"] == phase, timeout=90)
    made = begun.made()
    begun.process.send_signal(signal.SIGINT)
    assert begun.finish() == 130, begun.stderr
    assert begun.summary["interrupted"]
    assert made.left() == []
