"""The resolved form: automatic values, placeholders, chains of moves; and the files that are shipped."""

from __future__ import annotations

import ipaddress
import json
from pathlib import Path

import pytest

from testbed.topology import load, parse, resolve
from testbed.topology.resolved import checks_data, fill
from testbed.topology.schema import SCHEMA_FILE, topology_schema

TOPOLOGIES = sorted((Path(__file__).parents[3] / "topologies").glob("*.yaml"))

THREE = """
name: three
hosts: {h1: {ip: 10.0.0.2}, h2:, h3: {nic: {mtu: 1024, impair: {loss: 1%, delay: 2ms}, capture: true, trace: true}}}
switches: [s1, s2]
links: [[s1, h1], {ends: [h2, s1], bw: 25000, mtu: 1500, delay: 500us, loss: 0.5%}, [h3, s2], [s1, s2]]
"""


@pytest.mark.parametrize("file", TOPOLOGIES, ids=lambda path: path.stem)
def test_shipped_topologies_are_fine(file: Path) -> None:
    resolved = resolve(load(file))
    assert resolved.name == file.stem
    plain = json.loads(json.dumps(resolved.to_plain()))
    assert list(plain["hosts"]) == list(resolved.hosts) and len(plain["links"]) == len(resolved.links)


def test_all_that_the_issue_names_is_shipped() -> None:
    assert {"pair", "migrate_pair", "migrate_client", "migrate_write_bw", "migrate_send_bw", "fabric"} <= {
        path.stem for path in TOPOLOGIES
    }


def test_fabric_has_redundant_paths() -> None:
    """Invariant: with any one link between switches gone, every switch still reaches every other."""
    resolved = resolve(load("fabric"))
    trunks = [link for link in resolved.links if link.a in resolved.switches]
    for gone in trunks:
        seen, todo = {"s1"}, ["s1"]
        while todo:
            here = todo.pop()
            for link in trunks:
                if link is not gone and here in (link.a, link.b):
                    other = link.b if link.a == here else link.a
                    if other not in seen:
                        seen.add(other)
                        todo.append(other)
        assert seen == set(resolved.switches)
    assert len(resolved.hosts) == 6 and len(resolved.migrations) == 2


def test_automatic_values() -> None:
    resolved = resolve(parse(THREE))
    h1, h2, h3 = resolved.hosts.values()
    assert [host.ip for host in (h1, h2, h3)] == ["10.0.0.2", "10.0.0.1", "10.0.0.3"]  # 10.0.0.2 is taken
    assert [host.index for host in (h1, h2, h3)] == [1, 2, 3] == [host.number_base for host in (h1, h2, h3)]
    assert (h2.node_ip, h2.mgmt_ip, h2.mac, h2.interface) == (
        "100.64.0.2",
        "100.65.0.2",
        "02:00:00:00:00:02",
        "h2-eth0",
    )
    assert [host.switch for host in (h1, h2, h3)] == ["s1", "s1", "s2"]
    assert {host.prefix for host in (h1, h2, h3)} == {16}
    assert [switch.dpid for switch in resolved.switches.values()] == [1, 2]


def test_payload_fits_the_tightest_link() -> None:
    resolved = resolve(parse(THREE))
    assert resolved.hosts["h1"].nic.mtu == 1024  # 1500 − 80 carries 1024, not 2048
    assert resolve(parse(THREE.replace("mtu: 1500", "mtu: 4176"))).hosts["h1"].nic.mtu == 4096
    assert resolve(parse(THREE.replace("mtu: 1500", "mtu: 4175"))).hosts["h1"].nic.mtu == 2048


def test_nic_options_and_links() -> None:
    resolved = resolve(parse(THREE))
    nic = resolved.hosts["h3"].nic
    assert nic.impair == pytest.approx({"loss": 0.01, "delay": 0.002}) and nic.capture and nic.migros
    assert nic.trace and not resolved.hosts["h1"].nic.trace
    assert resolved.hosts["h1"].nic.impair == {} and not resolved.hosts["h1"].nic.capture
    first, second = resolved.links[:2]
    assert (first.a, first.b, first.bw, first.mtu) == ("h1", "s1", None, 9000)  # the host is always `a`
    assert (second.bw, second.mtu) == (25000, 1500)
    assert (second.delay, second.loss) == pytest.approx((0.0005, 0.005))


def test_numbers_are_the_same_every_time() -> None:
    assert resolve(parse(THREE)) == resolve(parse(THREE))


APPS = """
apps:
  server: {host: h2, command: "ibv_rc_pingpong -g 1 -c", after: []}
  client: {host: h1, command: "ibv_rc_pingpong -g 1 '{server.ip}' {{x}} {h3.ip}", after: server, timeout: 2min}
  own: {host: h2, command: "sleep 9", address: 10.0.0.77, expect: 3}
migrations:
  - {app: server, to: h3, at: 500ms, address: change}
  - {app: own, to: h3, at: 64MiB}
  - {app: own, to: h1, at: 1GiB, address: change}
"""


def test_apps() -> None:
    resolved = resolve(parse(THREE + APPS))
    server, client, own = resolved.apps.values()
    assert client.argv == ("ibv_rc_pingpong", "-g", "1", "10.0.0.1", "{x}", "10.0.0.3")
    assert (client.after, client.timeout, client.check) == (("server",), 120.0, "exit")
    assert (server.check, server.address, server.own_address) == ("data", "10.0.0.1", False)
    assert (own.address, own.own_address, own.expect) == ("10.0.0.77", True, 3)


def test_migrations_know_where_the_app_is_by_then() -> None:
    first, second, third = resolve(parse(THREE + APPS)).migrations
    assert (first.source, first.to, first.at_seconds, first.at_bytes) == ("h2", "h3", 0.5, None)
    assert (first.ip_before, first.ip_after) == ("10.0.0.1", "10.0.0.3")
    assert (second.source, second.at_seconds, second.at_bytes) == ("h2", None, 64 << 20)
    assert (second.ip_before, second.ip_after) == ("10.0.0.77", "10.0.0.77")
    assert (third.source, third.to, third.ip_before, third.ip_after) == ("h3", "h1", "10.0.0.77", "10.0.0.2")


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("ibv_rc_pingpong -c", True),
        ("/usr/bin/ibv_rc_pingpong -g 1 -ec", True),
        ("ibv_uc_pingpong --chk", True),
        ("ibv_rc_pingpong -g 1", False),
        ("ib_write_bw -c RC", False),
    ],
)
def test_programs_that_check_their_data(command: str, expected: bool) -> None:
    assert checks_data(command.split()) is expected


def test_placeholders_and_braces() -> None:
    assert fill("a {x.ip} {{y}} {x.ip}", {"x": "1.2.3.4"}) == "a 1.2.3.4 {y} 1.2.3.4"
    assert fill("{x.ip6}", {"x": "10.0.0.2"}) == "fd4d::a00:2"


def test_own_networks_do_not_meet() -> None:
    from testbed.topology.resolved import MANAGEMENT_NETWORK, MANAGEMENT_ROOT, NODE_NETWORK

    assert not MANAGEMENT_NETWORK.overlaps(NODE_NETWORK)
    assert ipaddress.IPv4Address(MANAGEMENT_ROOT) in MANAGEMENT_NETWORK


def test_published_schema_is_the_models() -> None:
    """If this fails: `python -m testbed schema topology --publish`."""
    assert json.loads(SCHEMA_FILE.read_text()) == topology_schema()
