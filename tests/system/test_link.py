"""A port and its interface: what stock programs see of a link that goes down, comes back, or changes its MTU.

Invariant: the port's state, files and events are those of its interface, whether or not the NIC follows addresses, and
a reliable connection outlives an interruption.
"""

from __future__ import annotations

import re
import subprocess
import threading
import time
from collections.abc import Iterator

import pytest

from tests.system.nic_pair import PORT, Host, finish, hosts
from tests.system.nic_pair import until as wait_until

PORT_FILES = "/run/migros/nic/sys/class/infiniband/rxe0/ports/1"


@pytest.fixture(params=["fixed", "follow"])
def joined(request: pytest.FixtureRequest) -> Iterator[tuple[Host, Host]]:
    """Two hosts whose NICs have fixed addresses, or follow the interface's too."""
    with hosts() as (first, second):
        for host in (first, second):
            host.start_nic(*(["--follow"] if request.param == "follow" else []))
        yield first, second


def said(host: Host) -> dict[str, str]:
    """What ibv_devinfo says of the port."""
    run = host.run("ibv_devinfo", "-v", program=True)
    assert run.returncode == 0, run.stderr
    pairs = (line.split(":", 1) for line in run.stdout.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def until(host: Host, name: str, value: str) -> dict[str, str]:
    """Wait for a value of ibv_devinfo."""
    deadline = time.monotonic() + 10
    while (port := said(host))[name] != value:
        assert time.monotonic() < deadline, f"{name} is {port[name]}, not {value}"
        time.sleep(0.02)
    return port


def files(host: Host) -> list[str]:
    """state, phys_state and rate as sysfs has them."""
    return [host.path(f"{PORT_FILES}/{name}").read_text().strip() for name in ("state", "phys_state", "rate")]


def link(host: Host, *words: str) -> None:
    """Change an interface."""
    assert host.run("ip", "link", "set", "eth0", *words).returncode == 0


def events(watcher: subprocess.Popen[str], count: int) -> list[str]:
    """The next `count` events of the port that ibv_asyncwatch tells, and those of the GID table between them."""
    assert watcher.stdout is not None
    found: list[str] = []
    ending = threading.Timer(30, watcher.kill)  # else a lost event would be waited for without end
    ending.start()
    while sum("PORT" in name for name in found) < count:
        line = watcher.stdout.readline()
        assert line, f"ibv_asyncwatch has ended, or nothing came for long, after {found}"
        found += re.findall(r"IBV_EVENT_(\w+)", line)
    ending.cancel()
    return found


def test_a_port_is_what_its_interface_is(joined: tuple[Host, Host], request: pytest.FixtureRequest) -> None:
    """Down by its own hand and by its partner's, up again, other MTUs; a veth has 10 Gb/s."""
    host, partner = joined
    follows = "follow" in request.node.name
    watcher = host.start("stdbuf", "-oL", "ibv_asyncwatch")
    try:
        assert watcher.stdout is not None
        assert "async event FD" in watcher.stdout.readline()
        port = said(host)
        assert (port["state"], port["phys_state"]) == ("PORT_ACTIVE (4)", "LINK_UP (5)")
        assert (port["active_width"], port["active_speed"]) == ("1X (1)", "10.0 Gbps (8)")
        assert files(host) == ["4: ACTIVE", "5: LinkUp", "10 Gb/sec (1X FDR10)"]
        for mtu, active in (("1500", "1024 (3)"), ("4176", "4096 (5)"), ("4175", "2048 (4)"), ("9000", "4096 (5)")):
            link(host, "mtu", mtu)
            until(host, "active_mtu", active)
        for who, phys_state in ((partner, "POLLING (2)"), (host, "DISABLED (3)")):
            link(who, "down")
            assert until(host, "state", "PORT_DOWN (1)")["phys_state"] == phys_state
            number = phys_state[-2]
            assert files(host)[:2] == ["1: DOWN", f"{number}: {'Polling' if who is partner else 'Disabled'}"]
            link(who, "up")
            until(host, "state", "PORT_ACTIVE (4)")
        seen = events(watcher, 4)
        assert [name for name in seen if name != "GID_CHANGE"] == ["PORT_ERR", "PORT_ACTIVE"] * 2
        # Linux takes the IPv6 addresses of an interface away when it goes down.
        assert ("GID_CHANGE" in seen) == follows
    finally:
        watcher.kill()
        finish(watcher)
    with host.control() as control:
        assert control.call("counters")["hw_counters"]["link_downed"] == 2
    shown = host.path(f"{PORT_FILES}/hw_counters/link_downed")
    wait_until(lambda: shown.read_text() == "2\n", "the count in its file, of a NIC that carries nothing")


def test_a_connection_outlives_an_interruption(joined: tuple[Host, Host]) -> None:
    """The link is down for a moment in mid-traffic: nothing is lost, the programs' own check passes."""
    server, client = joined
    words = ["ibv_rc_pingpong", "-g", "1", "-c", "-e", "-n", "1500", "-s", "20000"]
    listening = server.start(*words)
    server.wait_for_listener(PORT, listening)
    calling = client.start(*words, server.ip)
    for host in (client, server):
        # The programs' retries last half a second: both interruptions in a row would be too much of them.
        before = server.received()
        wait_until(lambda before=before: server.received() > before + 100, "traffic")
        interruption = "ip link set eth0 down && sleep 0.2 && ip link set eth0 up"
        assert host.run("sh", "-c", interruption).returncode == 0
    for process in (listening, calling):
        code, output = finish(process, 60)
        assert code == 0, output
        assert "invalid data" not in output
    again = 0  # which end repeats depends on whose turn it was
    for host in (client, server):
        with host.control() as control:
            again += control.call("counters")["counters"].get("retransmits", 0)
    assert again > 0, "nothing was interrupted"


def test_an_interface_that_is_down_when_the_nic_starts() -> None:
    """The port says so, and becomes active with it."""
    with hosts() as (host, _):
        link(host, "down")
        host.start_nic()
        assert said(host)["state"] == "PORT_DOWN (1)"
        link(host, "up")
        until(host, "state", "PORT_ACTIVE (4)")
