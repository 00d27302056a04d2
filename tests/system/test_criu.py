"""CRIU moves plain programs between two hosts: nothing of them is lost, whatever fails on the way.

Invariants: a counter prints every number once, in order, into one log; an established TCP connection carries every byte
once, in order, and its partner never sees a reset; after any failure before the resume the program runs on at the
source, and neither a process nor a firewall table nor an address of the attempt is left.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from testbed.base.errors import RunFailed
from testbed.checkpoint import criu_binary
from tests.system import programs
from tests.system.criu_lab import ADDRESS, NODES, Lab

pytestmark = pytest.mark.system
PYTHON = [programs.PYTHON, "-c"]
# A counter whose image does not fit into a socket's buffers.
HOLD_MEMORY = """
import time
kept, number = bytearray(64 << 20), 0
while True:
    print(number, flush=True)
    number += 1
    time.sleep(0.01)
"""


@pytest.fixture
def lab() -> Iterator[Lab]:
    made = Lab()
    yield made
    made.close()


def prepare(lab: Lab, app: str, source: str, target: str) -> tuple[str, dict[str, Any]]:
    """Both ends ready; (name of the migration, the destination's offer)."""
    name = f"{app}-{source}{target}-{time.monotonic():.3f}"
    about = lab.hosts[source].call("migrate_begin", app=app)
    offer = lab.hosts[target].call(
        "migrate_prepare",
        migration=name,
        app=app,
        argv=about["argv"],
        env=about["env"],
        policy=about["policy"],
        listen=NODES[target],
    )
    return name, offer


def arrive(lab: Lab, name: str, target: str, address: str | None) -> Any:
    """Begin `migrate_receive`."""
    return lab.hosts[target].begin(
        "migrate_receive", migration=name, addresses_moved={ADDRESS: ADDRESS}, add_address=address
    )


def send(lab: Lab, name: str, app: str, source: str, target: str, offer: dict[str, Any]) -> dict[str, Any]:
    return lab.hosts[source].call(
        "migrate_send",
        migration=name,
        app=app,
        address=NODES[target],
        port=offer["port"],
        token=offer["token"],
        source=NODES[source],
    )


def move(lab: Lab, app: str, source: str, target: str, address: str | None = None) -> dict[str, Any]:
    """A whole migration, in the order of `testbed.migration`. Returns what the source sent."""
    name, offer = prepare(lab, app, source, target)
    arriving = arrive(lab, name, target, address)
    sent = send(lab, name, app, source, target, offer)
    lab.hosts[target].result(arriving, "migrate_receive")
    if address is not None:
        lab.route(target)
    lab.hosts[target].call("migrate_resume", migration=name, source_ip=ADDRESS)
    answer = lab.hosts[source].call("migrate_commit", migration=name, remove_address=address)
    assert answer["problems"] == []
    return sent


def start_counter(lab: Lab, folder: Path) -> None:
    program = programs.compile_c(programs.COUNTER, folder, "counter")
    lab.hosts["a"].call("start_app", name="counter", argv=[program], rdma=False)
    wait_for(lambda: lab.read("a", "/run/migros/apps/counter/stdout").count("\n") > 20)


def start_echo(lab: Lab) -> None:
    """A server at the moving address, and a client that talks with it until `echo_ends_well`."""
    server = [*PYTHON, programs.ECHO_SERVER, ADDRESS]
    lab.hosts["a"].call("start_app", name="server", argv=server, rdma=False)
    assert lab.hosts["a"].call("wait_app_ready", name="server", patience=10)["listening"] == [7777]
    client = [*PYTHON, programs.ECHO_CLIENT, ADDRESS]
    lab.hosts["p"].call("start_app", name="client", argv=client, rdma=False)
    wait_for(lambda: "talking" in lab.read("p", "/run/migros/apps/client/stderr"), 30)


def wait_for(true: Callable[[], bool], timeout: float = 10.0) -> None:
    deadline = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < deadline, "it did not become true in time"
        time.sleep(0.02)


def echo_ends_well(lab: Lab) -> None:
    """The connection continues, and both ends exit cleanly when the client ends it."""
    time.sleep(0.3)
    lab.hosts["p"].call("signal_app", name="client", signal="SIGTERM")
    client = lab.wait_event("app_exited", app="client", timeout=60)
    assert client.get("code") == 0, lab.read("p", "/run/migros/apps/client/stderr")
    assert lab.wait_event("app_exited", app="server", timeout=20).get("code") == 0
    assert int(lab.read("p", "/run/migros/apps/client/stdout").split()[0]) > 100


def counter_goes_on(lab: Lab, host: str, app: str = "counter") -> None:
    """The program runs on `host`, and has lost nothing."""
    path = f"/run/migros/apps/{app}/stdout"
    before = programs.assert_consecutive(lab.read(host, path))
    wait_for(lambda: lab.read(host, path).count("\n") > before + 10)
    programs.assert_consecutive(lab.read(host, path))


def criu_processes(lab: Lab, host: str) -> list[str]:
    """Command lines of every CRIU in a host's mount namespace."""
    space = os.readlink(f"/proc/{lab.holders[host].pid}/ns/mnt")
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.readlink(f"/proc/{pid}/ns/mnt") == space:
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                found += [command] if "--images-dir" in command else []
        except OSError:
            continue  # ended meanwhile, or not ours to look at
    return found


def nothing_left(lab: Lab, host: str) -> None:
    """No CRIU, no firewall table of its own, no moving address, no image on `host`."""
    assert criu_processes(lab, host) == []
    assert "CRIU" not in lab.inside(host, "nft", "list", "tables")
    assert ADDRESS not in lab.inside(host, "ip", "address", "show", "dev", "eth0")
    assert ".img" not in lab.inside(host, "find", "/run/migros")


def test_a_counter_moves_there_and_back_and_there(lab: Lab, tmp_path: Path) -> None:
    start_counter(lab, tmp_path)
    for source, target in (("a", "b"), ("b", "a"), ("a", "b")):
        sent = move(lab, "counter", source, target)
        assert sent["image_bytes"] > 0
        counter_goes_on(lab, target)
        processes = lab.hosts[target].call("app_status", name="counter")["processes"]
        priorities = {(os.sched_getscheduler(p["pid"]), os.getpriority(os.PRIO_PROCESS, p["pid"])) for p in processes}
        assert priorities == {(os.SCHED_IDLE, 0)}, "what was lent for the move is taken back"
    assert lab.hosts["b"].call("app_status", name="counter")["ended"] is None
    lab.hosts["b"].call("signal_app", name="counter", signal="SIGTERM")
    assert lab.wait_event("app_exited", app="counter")["host"] == "b"


def test_an_established_connection_moves_in_mid_traffic(lab: Lab) -> None:
    start_echo(lab)
    move(lab, "server", "a", "b", ADDRESS)
    nothing_left(lab, "a")
    time.sleep(0.3)
    lab.hosts["a"].call("address_del", ip=ADDRESS)
    move(lab, "server", "b", "a", ADDRESS)
    nothing_left(lab, "b")
    echo_ends_well(lab)


def test_a_criu_that_cannot_restore(lab: Lab, tmp_path: Path) -> None:
    """`criu check` accepts it, and the restore fails: the connection continues at the source."""
    wrong = tmp_path / "criu"
    wrong.write_text(
        f'#!/bin/sh\n[ "$1" = restore ] && {{ echo wrong >&2; exit 1; }}\nexec {" ".join(criu_binary.find())} "$@"\n'
    )
    wrong.chmod(0o755)
    lab.hosts["b"].close()
    lab.start_agent("b", {"TESTBED_CRIU": str(wrong)})
    start_echo(lab)
    name, offer = prepare(lab, "server", "a", "b")
    arriving = arrive(lab, name, "b", ADDRESS)
    send(lab, name, "server", "a", "b", offer)
    with pytest.raises(RunFailed, match="criu restore"):
        lab.hosts["b"].result(arriving, "migrate_receive")
    assert lab.hosts["b"].call("migrate_abort", migration=name)["aborted"]
    assert lab.hosts["a"].call("migrate_rollback", migration=name)["rolled_back"]
    nothing_left(lab, "b")
    echo_ends_well(lab)
    assert "CRIU" not in lab.inside("a", "nft", "list", "tables")


def test_a_criu_that_is_none_is_refused_before_anything_is_frozen(lab: Lab, tmp_path: Path) -> None:
    lab.hosts["b"].close()
    lab.start_agent("b", {"TESTBED_CRIU": "/bin/false"})
    start_counter(lab, tmp_path)
    with pytest.raises(Exception, match=r"no CRIU works here.*is not CRIU"):
        prepare(lab, "counter", "a", "b")
    counter_goes_on(lab, "a")


def test_a_full_disk_at_the_destination(lab: Lab) -> None:
    lab.inside("b", "sh", "-c", "mkdir /run/migros/migrate && mount -t tmpfs -o size=2m full /run/migros/migrate")
    start_echo(lab)
    name, offer = prepare(lab, "server", "a", "b")
    arriving = arrive(lab, name, "b", ADDRESS)
    with pytest.raises(RunFailed, match="No space left on device"):
        send(lab, name, "server", "a", "b", offer)
    with pytest.raises(RunFailed, match="No space left on device"):
        lab.hosts["b"].result(arriving, "migrate_receive")
    lab.hosts["b"].call("migrate_abort", migration=name)
    nothing_left(lab, "b")
    echo_ends_well(lab)


def test_the_destination_dies_in_mid_transfer(lab: Lab) -> None:
    lab.hosts["a"].call("start_app", name="counter", argv=[*PYTHON, HOLD_MEMORY], rdma=False)
    wait_for(lambda: lab.read("a", "/run/migros/apps/counter/stdout").count("\n") > 5)
    name, offer = prepare(lab, "counter", "a", "b")
    arrive(lab, name, "b", None)
    os.kill(agent := int(lab.hosts["b"].about["pid"]), signal.SIGSTOP)  # the transfer cannot end before the agent does
    sending = lab.hosts["a"].begin(
        "migrate_send", migration=name, app="counter", address=NODES["b"], port=offer["port"], token=offer["token"]
    )
    began = lab.wait_event("migration_phase", phase="transfer", migration=name)
    assert "ended" not in began
    time.sleep(0.2)
    os.kill(agent, signal.SIGKILL)
    with pytest.raises(RunFailed, match="destination"):
        lab.hosts["a"].result(sending, "migrate_send")
    counter_goes_on(lab, "a")
    wait_for(lambda: criu_processes(lab, "b") == [])


def test_a_program_that_has_ended_cannot_move(lab: Lab) -> None:
    lab.hosts["a"].call("start_app", name="short", argv=["/bin/true"], rdma=False)
    lab.wait_event("app_exited", app="short")
    with pytest.raises(RunFailed, match="has ended already"):
        lab.hosts["a"].call("migrate_begin", app="short")
