"""Beginnings and ends: programs that die, NICs that die, frozen programs, bad input.

Invariants: a program that is gone has nothing left in the NIC or its run directory; a NIC that is gone is an error for
its programs and no hang; a checkpoint that is rolled back loses nothing; bad input is an error that says where.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from softroce_ext.control import ControlClient, ControlError
from tests.system import programs
from tests.system.nic_pair import PORT, RUN, Host, finish, hosts, nics, pair, until

PINGPONG = ["ibv_rc_pingpong", "-g", "1", "-c"]


@pytest.fixture(scope="module")
def joined() -> Iterator[tuple[Host, Host]]:
    """Two hosts with NICs."""
    with nics() as both:
        yield both


def started(
    server: Host, client: Host, iterations: int, *options: str
) -> tuple[subprocess.Popen[str], subprocess.Popen[str]]:
    """A pingpong under way."""
    words = [*PINGPONG, *options, "-n", str(iterations)]
    listening = server.start(*words)
    server.wait_for_listener(PORT, listening)
    before = server.received()
    calling = client.start(*words, server.ip)
    until(lambda: server.received() > before + 20, "traffic")
    return listening, calling


def only_context(control: ControlClient) -> dict[str, object]:
    """The one context that a NIC has."""
    (context,) = control.call("status")["contexts"]
    return dict(context)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_program_leaves_nothing(joined: tuple[Host, Host], number: signal.Signals) -> None:
    """Its objects are freed at once; its partner learns by its retries, as on hardware."""
    server, client = joined
    listening, calling = started(server, client, 100_000)
    with server.control() as control:
        os.kill(int(str(only_context(control)["pid"])), number)
        listening.wait(timeout=10)
        until(lambda: control.call("status")["contexts"] == [], "freed")
    assert os.listdir(server.path(f"{RUN}/ctx")) == []
    os.kill(calling.pid, signal.SIGKILL)
    finish(calling)
    finish(listening)
    with client.control() as control:
        until(lambda: control.call("status")["contexts"] == [], "freed")


def test_a_frozen_program_goes_on_after_a_rollback(joined: tuple[Host, Host]) -> None:
    """hold, dump, unhold, three times in mid-traffic: the partner gets RESUME, no data are lost."""
    server, client = joined
    listening, calling = started(server, client, 3000, "-e", "-s", "20000")
    with server.control() as here, client.control() as there:
        resumed = there.call("counters")["counters"].get("rcvd_resume", 0)
        for attempt in range(3):
            pid = int(str(only_context(here)["pid"]))
            os.kill(pid, signal.SIGSTOP)
            (held,) = here.call("hold", pids=[pid])["contexts"]
            assert all(qp["stopped"] for qp in held["qps"])
            image = server.path(f"/run/migros/image{attempt}")
            assert here.call("dump", contexts=[held["id"]], file=str(image))["bytes"] == image.stat().st_size
            with pytest.raises(ControlError, match="held already"):
                here.call("hold", pids=[pid])
            time.sleep(0.1)
            os.kill(pid, signal.SIGCONT)
            answer = here.call("unhold", contexts=[held["id"]])
            assert answer["settled"] - answer["started"] < 5
            assert answer["qps"][0]["acked_at"] is not None
        assert there.call("counters")["counters"]["rcvd_resume"] >= resumed + 3
        # Noted by the first completion after it, which need not have come yet.
        until(lambda: here.call("gaps")["contexts"][0]["longest"] > 0.1, "the longest gap is the freeze")
    for process in (listening, calling):
        code, output = finish(process, 120)
        assert code == 0, output
        assert "invalid data" not in output


def test_a_program_that_dies_while_held_is_freed_by_the_rollback(joined: tuple[Host, Host]) -> None:
    """Its death means nothing while it is held, and is noticed afterwards."""
    server, client = joined
    listening, calling = started(server, client, 100_000)
    with server.control() as control:
        context = only_context(control)
        control.call("hold", pids=[context["pid"]])
        os.kill(int(str(context["pid"])), signal.SIGKILL)
        finish(listening)
        time.sleep(0.2)
        assert only_context(control)["id"] == context["id"]
        control.call("unhold", contexts=[context["id"]], wait=False)
        until(lambda: control.call("status")["contexts"] == [], "freed")
    calling.kill()
    finish(calling)


def test_a_dumped_context_comes_back_as_it_was(joined: tuple[Host, Host]) -> None:
    """dump, discard, restore, dump: the second image is the first, and the files of the channel are there again."""
    server, client = joined
    listening, calling = started(server, client, 100_000, "-e", "-s", "20000")
    with server.control() as control:
        context = only_context(control)
        pid = int(str(context["pid"]))
        os.kill(pid, signal.SIGSTOP)
        control.call("hold", pids=[pid])
        first, second = (server.path(f"/run/migros/{name}.image") for name in ("first", "second"))
        control.call("dump", contexts=[context["id"]], file=str(first))
        with pytest.raises(ControlError, match="exists here already"):
            control.call("restore", file=str(first))
        control.call("discard", contexts=[context["id"]])
        assert os.listdir(server.path(f"{RUN}/ctx")) == []
        (restored,) = control.call("restore", file=str(first))["contexts"]
        assert restored["id"] == context["id"]
        assert restored["pid"] is None
        assert {"queues", "doorbell", "reply", "async", "comp-0"} == set(
            os.listdir(server.path(f"{RUN}/ctx/{restored['id']}"))
        )
        control.call("dump", contexts=[restored["id"]], file=str(second))
        assert first.read_bytes() == second.read_bytes()
        with pytest.raises(ControlError, match="attach first"):
            control.call("resume", contexts=[restored["id"]])
        with pytest.raises(ControlError, match=r"is \d+ inside"):
            control.call("attach", contexts=[restored["id"]], pids={str(restored["inner_pid"]): os.getpid()})
        control.call("discard", contexts=[restored["id"]])
        os.kill(pid, signal.SIGKILL)
    calling.kill()
    finish(listening)
    finish(calling)


def test_images_that_cannot_be_restored(joined: tuple[Host, Host], tmp_path: Path) -> None:
    """Each error says what is wrong, and nothing is left behind."""
    host = joined[0]
    cases = {"empty": (b"", "not a NIC image"), "foreign": (b"MIGROS NIC IMAGE 2\n" + bytes(40), "not a NIC image")}
    cases["short"] = (b"MIGROS NIC IMAGE 1\n", "cut off")
    with host.control() as control:
        for name, (data, message) in cases.items():
            path = tmp_path / name
            path.write_bytes(data)
            with pytest.raises(ControlError, match=message):
                control.call("restore", file=str(path))
        with pytest.raises(ControlError, match="No such file"):
            control.call("restore", file=str(tmp_path / "absent"))
        assert control.call("status")["contexts"] == []


def test_threads_signals_and_exec(joined: tuple[Host, Host]) -> None:
    """Commands of many threads of one program, interrupted by signals; then the same after an exec."""
    run = joined[0].run(*programs.module("verbs_threads", "again"), program=True)
    assert (run.returncode, run.stdout) == (0, "ok\n"), run.stdout + run.stderr
    with joined[0].control() as control:
        assert control.call("status")["contexts"] == []


def test_a_program_of_another_user(joined: tuple[Host, Host]) -> None:
    """No root is needed to use the device."""
    environment = joined[0].environment()
    words = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    words += ["env", f"LD_PRELOAD={environment['LD_PRELOAD']}", *PINGPONG, "-n", "50", "-e"]
    for code, output in pair(*joined, words):
        assert code == 0, output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"command": "dance"}, "unknown command 'dance'"),
        ({"command": "dump", "file": "x"}, "argument 'contexts' is missing"),
        ({"command": "dump", "file": 3, "contexts": []}, "argument 'file' is 3, expected str"),
        ({"command": "discard", "contexts": ["9-9"]}, "no context 9-9"),
        ({"command": "address_add", "ip": "10.0.0"}, "expected an IP address"),
        ({"command": "address_remove", "ip": "10.0.0.1"}, "is not an address of this device"),
        ({"command": "capture", "file": "/nonexistent/x.pcap"}, "No such file"),
    ],
)
def test_wrong_management_commands(joined: tuple[Host, Host], arguments: dict[str, object], message: str) -> None:
    """A wrong command is answered with what is wrong, and the NIC continues."""
    with joined[0].control() as control:
        with pytest.raises(ControlError, match=re.escape(message)):
            control.call(str(arguments["command"]), **{k: v for k, v in arguments.items() if k != "command"})
        assert control.call("status")["device"] == "rxe0"


def test_a_nic_that_dies_is_an_error_and_the_next_one_starts_clean() -> None:
    """kill -9 of a NIC: its program's next command is EIO, not a hang; a new NIC on the same directory works."""
    with nics() as (server, client):
        listening, calling = started(server, client, 100_000, "-e")
        assert server.stop_nic(kill=True) == -signal.SIGKILL
        assert server.path(f"{RUN}/control.sock").exists(), "kill -9 leaves files: the point of this test"
        code, output = finish(listening, 10)
        assert code > 0, f"the program went on without a NIC: {output}"
        calling.kill()
        finish(calling)
        server.start_nic()
        assert os.listdir(server.path(f"{RUN}/ctx")) == []
        listening, calling = started(server, client, 200)
        assert finish(listening)[0] == 0
        assert finish(calling)[0] == 0


def test_a_nic_that_is_told_to_end_removes_its_files() -> None:
    """SIGTERM: exit code 0, an empty run directory."""
    with hosts() as (host, _):
        host.start_nic()
        assert host.path(f"{RUN}/uverbs.sock").exists()
        assert host.stop_nic() == 0
        assert os.listdir(host.path(RUN)) == []


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--interface", "nosuch0"], 3, "cannot start on nosuch0"),
        (["--interface", "lo", "--address", "10.0.0.300"], 2, "'10.0.0.300' is not an IP address"),
        (["--interface", "lo", "--number-base", "256"], 2, "not a number from 0 to 255"),
        (["--interface", "lo", "--impair", "loss=2"], 2, "must be a probability from 0 to 1"),
        (["--interface", "lo", "--impair", "lose=1"], 2, "unknown name, allowed are loss, duplicate"),
        (["--interface", "lo", "--mtu", "100"], 2, "not an interface MTU"),
    ],
)
def test_bad_command_lines(tmp_path: Path, options: list[str], code: int, message: str) -> None:
    """Exit code and message by blame, no traceback."""
    words = [sys.executable, "-m", "softroce_ext", "--run-dir", str(tmp_path), *options]
    run = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    assert run.returncode == code
    assert message in run.stderr
    assert "Traceback" not in run.stderr
