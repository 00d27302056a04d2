"""Stock librdmacm programs between two NICs: both address families, what fails as it should, and what ends early."""

from __future__ import annotations

import time

import pytest

from softroce_ext.uverbs.hw_counters import FRESHNESS
from tests.system.nic_pair import RUN, TOO_EARLY, Host, finish, nics, until

DATA = "rdma-ping-{}: "


def settled(*hosts: Host) -> None:
    """Until the links' own IPv6 addresses may be used: before that the kernel asks no neighbour for its MAC."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if not any(host.run("ip", "-6", "address", "show", "tentative").stdout for host in hosts):
            return
        time.sleep(0.1)


def both(server: list[str], client: list[str], timeout: float = 60) -> tuple[tuple[int, str], tuple[int, str]]:
    """Run a server on the first host and a client on the second; (exit code, output) of each."""
    with nics() as (first, second):
        settled(first, second)
        for _ in range(5):
            listening = first.start(*server)
            first.wait_for_cm_listener(listening)
            calling = second.start(*client)
            result = finish(calling, timeout)
            ends = finish(listening, timeout if result[0] == 0 else 3), result
            if TOO_EARLY not in result[1]:
                break
    return ends


IPV4 = ("10.9.0.1", "10.9.0.2")
IPV6 = ("fd09::1", "fd09::2")
FAMILIES = pytest.mark.parametrize("ends", [IPV4, IPV6], ids=["ipv4", "ipv6"])


@FAMILIES
def test_rping_checks_its_data(ends: tuple[str, str]) -> None:
    server, client = both(
        ["rping", "-s", "-v", "-V", "-C", "5", "-S", "3000", "-a", ends[0]],
        ["rping", "-c", "-v", "-V", "-C", "5", "-S", "3000", "-a", ends[0]],
    )
    assert (server[0], client[0]) == (0, 0), server[1] + client[1]
    for number in range(5):
        assert f"server ping data: {DATA.format(number)}" in server[1]
        assert f"ping data: {DATA.format(number)}" in client[1]
    assert "DISCONNECT EVENT" in server[1]


@FAMILIES
def test_ucmatose(ends: tuple[str, str]) -> None:
    server, client = both(
        ["ucmatose", "-c", "5", "-C", "20", "-b", ends[0]], ["ucmatose", "-c", "5", "-C", "20", "-s", ends[0]]
    )
    for code, output in (server, client):
        assert code == 0, output
        assert "return status 0" in output


@FAMILIES
def test_udaddy(ends: tuple[str, str]) -> None:
    server, client = both(["udaddy", "-c", "3", "-b", ends[0]], ["udaddy", "-c", "3", "-s", ends[0]])
    for code, output in (server, client):
        assert code == 0, output
        assert "data transfers complete" in output
        assert "return status 0" in output


@pytest.mark.parametrize("ends", [("239.77.0.1", *IPV4), ("ff05::77", *IPV6)], ids=["ipv4", "ipv6"])
def test_mckey(ends: tuple[str, str, str]) -> None:
    group, here, there = ends
    with nics("--trace", "/run/migros/trace") as (first, second):
        member = first.start("mckey", "-m", group, "-b", here)
        deadline = time.monotonic() + 20
        while "ATTACH_MCAST" not in first.path("/run/migros/trace").read_text() and time.monotonic() < deadline:
            time.sleep(0.02)
        sender = finish(second.start("mckey", "-m", group, "-s", "-b", there))
        receiver = finish(member, 10)
    assert "return status 0" in sender[1], sender[1]
    assert receiver[0] == 0, receiver[1]
    assert "data transfers complete" in receiver[1]


@pytest.mark.parametrize(
    ("server", "client"),
    [
        (["rdma_server"], ["rdma_client", "-s"]),
        (["rdma_xserver"], ["rdma_xclient", "-s"]),
        (["rstream", "-S", "4096"], ["rstream", "-S", "4096", "-s"]),
        (["riostream", "-S", "4096"], ["riostream", "-S", "4096", "-s"]),
    ],
    ids=["rdma_client", "rdma_xclient", "rstream", "riostream"],
)
def test_synchronous_programs(server: list[str], client: list[str]) -> None:
    results = both(server, [*client, IPV4[0]])
    assert [code for code, _ in results] == [0, 0], results


PERFTEST = ["ib_send_lat", "ib_write_bw", "ib_read_bw", "ib_atomic_lat"]


@pytest.mark.parametrize("program", PERFTEST)
def test_perftest_over_rdma_cm(program: str) -> None:
    words = [program, "-R", "-n", "100", *(["-s", "65536"] if program.endswith("bw") else [])]
    server, client = both(words, [*words, IPV4[0]])
    assert (server[0], client[0]) == (0, 0), server[1] + client[1]
    assert "rdma_cm QPs\t : ON" in client[1]


def test_qperf() -> None:
    """Its server tells the client the port and listens 2 ms later, so a client may come too early: tried again then."""
    with nics() as (first, second):
        server = first.start("qperf")
        first.wait_for_listener(19765, server)
        for test in ("rc_lat", "rc_bw", "rc_rdma_read_bw"):
            for _ in range(5):
                code, output = finish(second.start("qperf", first.ip, "-t", "1", "-cm1", test))
                if "Event rejected" not in output:
                    break
            assert code == 0, output
            assert output.count("latency  =" if test == "rc_lat" else "bw  =") == 1
        server.terminate()
        finish(server)


# -- what goes wrong ---------------------------------------------------------------------------------------------------


@FAMILIES
def test_no_listener_is_a_reject(ends: tuple[str, str]) -> None:
    with nics() as (first, second):
        settled(first, second)
        started = time.monotonic()
        code, output = finish(second.start("rping", "-c", "-v", "-a", ends[0]))
    assert code != 0
    assert "REJECTED, error 8" in output, output
    assert time.monotonic() - started < 10


def test_no_such_host() -> None:
    with nics() as (_, second):
        code, output = finish(second.start("rping", "-c", "-v", "-a", "10.9.0.77"))
    assert code != 0
    assert "ADDR_ERROR" in output, output


def test_port_in_use_and_foreign_address() -> None:
    with nics() as (first, _):
        holder = first.start("rping", "-s", "-a", first.ip)
        first.wait_for_cm_listener(holder)
        code, output = finish(first.start("rping", "-s", "-a", first.ip))
        assert code != 0
        assert "Address already in use" in output
        code, output = finish(first.start("rping", "-s", "-a", "10.9.0.99"))
        assert code != 0
        assert "Cannot assign requested address" in output
        holder.kill()
        finish(holder)
        again = first.start("rping", "-s", "-a", first.ip)  # the port is free again
        first.wait_for_cm_listener(again)
        assert again.poll() is None, finish(again)


def test_both_ends_on_one_nic() -> None:
    with nics() as (first, _):
        server = first.start("rping", "-s", "-v", "-V", "-C", "3", "-a", first.ip)
        first.wait_for_cm_listener(server)
        client = finish(first.start("rping", "-c", "-v", "-V", "-C", "3", "-a", first.ip))
        assert client[0] == 0, client[1]
        assert finish(server)[0] == 0


@pytest.mark.parametrize("victim", ["client", "server"])
def test_killed_peer(victim: str) -> None:
    """A program that is killed disconnects: its peer hears it at once and not by a timeout."""
    with nics() as (first, second):
        server = first.start("rping", "-s", "-a", first.ip)
        first.wait_for_cm_listener(server)
        client = second.start("rping", "-c", "-C", "1000000", "-a", first.ip)
        until(lambda: first.received() > 300, "traffic")
        assert server.poll() is None
        assert client.poll() is None
        killed, survivor = (client, server) if victim == "client" else (server, client)
        killed.kill()
        finish(killed)
        started = time.monotonic()
        _, output = finish(survivor, 20)
        assert time.monotonic() - started < 5
        assert "DISCONNECT EVENT" in output
        assert first.control().call("status")["contexts"] == []


def test_request_is_repeated_until_the_peer_is_there() -> None:
    """The peer's NIC is gone when the REQ is sent; the repeat after about 6 s finds it and its program."""
    with nics() as (first, second):
        first.stop_nic(kill=True)
        client = second.start("rping", "-c", "-v", "-V", "-C", "2", "-a", first.ip)
        with second.control() as control:
            until(lambda: control.call("counters")["counters"].get("cm_tx_msgs/req"), "a REQ")
        started = time.monotonic()
        first.start_nic()
        server = first.start("rping", "-s", "-v", "-V", "-C", "2", "-a", first.ip)
        code, output = finish(client, 40)
        assert code == 0, output
        assert 5.5 < time.monotonic() - started < 12
        assert finish(server)[0] == 0


def test_messages_are_counted_as_the_kernel_counts_them() -> None:
    """One connection and its end, without loss: each message once at each end, in the files below ports/1."""
    with nics() as (first, second):
        server = first.start("rping", "-s", "-a", first.ip)
        first.wait_for_cm_listener(server)
        client = second.start("rping", "-c", "-v", "-V", "-C", "3", "-a", first.ip)
        assert finish(client)[0] == 0
        finish(server)
        time.sleep(2 * FRESHNESS)
        sent = {"req": (0, 1), "rep": (1, 0), "rtu": (0, 1), "mra": (0, 0), "sidr_req": (0, 0)}
        wanted = {f"cm_tx_msgs/{name}": ends for name, ends in sent.items()}
        wanted |= {f"cm_rx_msgs/{name}": ends[::-1] for name, ends in sent.items()}
        wanted |= {f"cm_tx_retries/{name}": (0, 0) for name in sent}

        def shown() -> dict[str, tuple[int, ...]]:
            files = {name: f"{RUN}/sys/class/infiniband/rxe0/ports/1/{name}" for name in wanted}
            return {
                name: tuple(int(host.path(file).read_text()) for host in (first, second))
                for name, file in files.items()
            }

        deadline = time.monotonic() + 5  # a NIC that has no processor writes later
        while shown() != wanted and time.monotonic() < deadline:
            time.sleep(FRESHNESS)
        assert shown() == wanted
