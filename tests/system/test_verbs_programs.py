"""Stock Debian programs on the NIC: what they see, that they run, that their own checks pass.

Invariant: an unmodified program finds the device as on a machine with Linux rxe, ends with exit code 0, and its own
data check (`-c`) holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.nic_pair import Host, hosts, nics, pair

RXE = Path(__file__).parent.parent / "data" / "ibv_devinfo_rxe_mtu9000.txt"
"""`ibv_devinfo -v` on Linux rxe (kernel 6.1) with an interface MTU of 9000 and addresses of its own."""
OWN_LINES = re.compile(r"(node_guid|sys_image_guid|GID\[|active_speed)")
"""The speed is the interface's: virtio does not know it there, a veth has 10 Gb/s here."""


@pytest.fixture(scope="module")
def joined() -> Iterator[tuple[Host, Host]]:
    """Two hosts with NICs."""
    with nics() as both:
        yield both


def test_ibv_devices_lists_the_one_device(joined: tuple[Host, Host]) -> None:
    """Each host sees its own device, with its own GUID."""
    seen = []
    for host in joined:
        run = host.run("ibv_devices", program=True)
        devices = [line.split() for line in run.stdout.splitlines()[2:] if line.strip()]
        assert run.returncode == 0
        assert [name for name, _ in devices] == ["rxe0"], run.stdout
        seen.append(devices[0][1])
    assert seen[0] != seen[1]


def test_ibv_devinfo_is_that_of_rxe(joined: tuple[Host, Host]) -> None:
    """Every attribute as Linux rxe shows it; GUID and GIDs are the host's own."""
    run = joined[0].run("ibv_devinfo", "-v", program=True)
    assert run.returncode == 0, run.stderr
    ours = [line for line in run.stdout.splitlines() if not OWN_LINES.search(line)]
    theirs = [line for line in RXE.read_text().splitlines() if not OWN_LINES.search(line)]
    assert ours == theirs
    assert f"GID[  1]:\t\t::ffff:{joined[0].ip}, RoCE v2" in run.stdout


def test_a_changed_address_is_seen_in_place(joined: tuple[Host, Host]) -> None:
    """address_add and address_remove change the GID table; the device stays the same one."""
    host = joined[0]
    before = host.path("/run/migros/nic/sys/class/infiniband/rxe0").stat().st_mtime_ns
    with host.control() as control:
        assert control.call("address_add", ip="10.9.0.77") == {"index": 3}
        assert "::ffff:10.9.0.77" in host.run("ibv_devinfo", "-v", program=True).stdout
        control.call("address_remove", ip="10.9.0.77")
    assert "10.9.0.77" not in host.run("ibv_devinfo", "-v", program=True).stdout
    assert host.path("/run/migros/nic/sys/class/infiniband/rxe0").stat().st_mtime_ns == before


@pytest.mark.parametrize("mtu", [256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("events", [[], ["-e"]], ids=["polling", "events"])
def test_pingpong_checks_its_data(joined: tuple[Host, Host], mtu: int, events: list[str]) -> None:
    """ibv_rc_pingpong over every path MTU, with its data check."""
    words = ["ibv_rc_pingpong", "-g", "1", "-m", str(mtu), "-n", "100", "-s", "9000", "-c", *events]
    server, client = pair(*joined, words)
    for code, output in (server, client):
        assert code == 0, output
        assert "invalid data" not in output


@pytest.mark.parametrize("gid", ["0", "1", "2"], ids=["link-local", "IPv4", "IPv6"])
@pytest.mark.parametrize("program", ["ibv_rc_pingpong", "ibv_uc_pingpong", "ibv_ud_pingpong", "ibv_srq_pingpong"])
def test_pingpongs_of_every_service_and_family(joined: tuple[Host, Host], program: str, gid: str) -> None:
    """libibverbs' examples over each kind of GID, polling and with events; their data check where they have one."""
    for events in ([], ["-e"]):
        words = [program, "-g", gid, "-n", "60", *events]
        words += ["-s", "2000"] if program == "ibv_ud_pingpong" else ["-s", "9000", "-m", "1024"]
        words += ["-c"] if program != "ibv_srq_pingpong" else []
        server, client = pair(*joined, words)
        for code, output in (server, client):
            assert code == 0, output
            assert "invalid data" not in output


LATENCY = [f"ib_{kind}_lat -n 100" for kind in ("send", "write", "read")]
BANDWIDTH = [f"ib_{kind}_bw -n 100" for kind in ("send", "write", "read")]
MORE = [
    "ib_send_lat -n 100 -e",
    "ib_send_bw -n 100 -e",
    "ib_write_bw -n 50 -q 16",
    "ib_read_bw -n 20 -q 16",
    "ib_send_bw -n 50 -q 4 -b",
    "ib_write_bw -n 20 -s 1048576 -m 4096",
    "ib_send_lat -n 20 -s 64 -I 64",
    "ib_atomic_lat -n 50",
    "ib_atomic_bw -n 50",
    "ib_send_lat -n 50 --use-srq",
    *(f"ib_{kind}_{what} -n 50 -c UC" for kind in ("send", "write") for what in ("lat", "bw")),
    *(f"ib_send_{what} -n 50 -c UD" for what in ("lat", "bw")),
    "ib_send_lat -n 50 -c UD -e",
]
IPV6 = [f"ib_{kind}_{what} -n 30" for kind in ("send", "write", "read", "atomic") for what in ("lat", "bw")]
IPV6 += ["ib_send_lat -n 30 -c UD", "ib_write_bw -n 30 -c UC"]


@pytest.mark.parametrize(
    ("command", "gid"),
    [(command, "1") for command in LATENCY + BANDWIDTH + MORE] + [(command, "2") for command in IPV6],
)
def test_perftest(joined: tuple[Host, Host], command: str, gid: str) -> None:
    """perftest's programs end with exit code 0 and print a result; GID index 1 is IPv4, 2 IPv6."""
    words = [*command.split(), "-x", gid, "-F"]
    server, client = pair(*joined, words)
    assert server[0] == 0, server[1]
    assert client[0] == 0, client[1]
    assert re.search(r"^ ?\d+ +\d+ +[\d.]+", client[1], re.MULTILINE), client[1]


@pytest.mark.slow
@pytest.mark.parametrize("program", ["ib_send_bw", "ib_write_bw", "ib_read_bw", "ib_send_lat"])
def test_perftest_all_sizes(joined: tuple[Host, Host], program: str) -> None:
    """-a: every size from 2 bytes to 8 MiB."""
    words = [program, "-x", "1", "-F", "-a", "-n", "5"]
    server, client = pair(*joined, words, timeout=240)
    assert server[0] == 0, server[1]
    assert client[0] == 0, client[1]
    sizes = [int(line.split()[0]) for line in client[1].splitlines() if re.match(r"^ ?\d+ +5 ", line)]
    assert sizes == [1 << shift for shift in range(1, 24)], client[1]


def test_several_programs_at_once(joined: tuple[Host, Host]) -> None:
    """Two connections in opposite directions and one inside a host, at the same time."""
    first, second = joined
    words = ["ib_send_bw", "-x", "1", "-F", "-n", "100"]
    running = []
    for port, server, client in (("19001", first, second), ("19002", second, first), ("19003", first, first)):
        listening = server.start(*words, "-p", port)
        server.wait_for_listener(int(port), listening)
        running.append((listening, server, client, port))
    calling = []
    for _, server, client, port in running:
        calling.append(client.start(*words, "-p", port, server.ip))
    for process in [*calling, *(entry[0] for entry in running)]:
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output


def test_small_interface_mtu() -> None:
    """An interface MTU of 1500 gives an active MTU of 1024, as on rxe; a larger path MTU is refused with EINVAL."""
    with hosts(mtu=1500) as (first, second):
        first.start_nic()
        second.start_nic()
        assert "active_mtu:\t\t1024 (3)" in first.run("ibv_devinfo", "-v", program=True).stdout
        server, client = pair(first, second, ["ibv_rc_pingpong", "-g", "1", "-n", "50", "-c"])
        assert (server[0], client[0]) == (0, 0), client[1]
        words = ["ibv_rc_pingpong", "-g", "1", "-n", "5", "-m", "2048"]
        refused, _ = pair(first, second, words, timeout=10)  # the server is the first to try
        assert refused[0] == 1
        assert "Failed to modify QP to RTR" in refused[1]
