"""The plan of a network: names that fit, numbers that never meet, a fabric that the controller accepts.

Invariants, for any topology: interface names are at most 15 characters and unique in their namespace; MACs and ports
are unique; two runs on one machine share no name in the root namespace and no management address.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.base import ip6
from testbed.network import plan as planning
from testbed.network.plan import Plan, plan
from testbed.topology import ResolvedTopology, Topology, resolve

PAIR = {
    "name": "pair",
    "hosts": {"h1": {"ip": "10.0.0.1"}, "h2": {}},
    "switches": ["s1"],
    "links": [{"ends": ["s1", "h1"], "bw": 10000, "mtu": 9000}, ["h2", "s1"]],
    "apps": {"server": {"host": "h2", "command": "true", "address": "10.0.0.50"}},
}


def resolved(data: Mapping[str, object]) -> ResolvedTopology:
    return resolve(Topology.model_validate(data))


@st.composite
def topologies(draw: st.DrawFn) -> ResolvedTopology:
    """Trees of switches with long names, and hosts on them."""
    switches = [f"switch{k:03d}" for k in range(draw(st.integers(1, 12)))]
    hosts = [f"h{k}" for k in range(draw(st.integers(1, 30)))]
    links: list[object] = [[name, draw(st.sampled_from(switches))] for name in hosts]
    links += [[name, draw(st.sampled_from(switches[:k]))] for k, name in enumerate(switches) if k]
    return resolved({"name": "t", "hosts": {name: {} for name in hosts}, "switches": switches, "links": links})


def root_names(one: Plan) -> list[str]:
    """Every interface and bridge that the plan puts into the root namespace."""
    ends = [end.interface for wire in one.wires for end in (wire.a, wire.b) if end.port]
    return [*ends, *one.bridges.values(), *(link.outside for link in one.management.values())]


@given(topologies())
@settings(max_examples=50, deadline=None)
def test_names_fit_and_nothing_meets(topology: ResolvedTopology) -> None:
    first, second = plan(topology, "m0001", 0), plan(topology, "m0002", 1)
    names = root_names(first) + root_names(second)
    assert max(map(len, names)) <= 15
    assert len(set(names)) == len(names)
    macs = [end.mac for wire in first.wires for end in (wire.a, wire.b)]
    assert len(set(macs)) == len(macs)
    assert not any(int(mac[:2], 16) & 1 for mac in macs), "no group addresses"
    ports = [(end.node, end.port) for wire in first.wires for end in (wire.a, wire.b) if end.port]
    assert len(set(ports)) == len(ports)
    addresses = [link.inside_ip for one in (first, second) for link in one.management.values()]
    addresses += [next(iter(one.management.values())).outside_ip for one in (first, second)]
    assert len(set(addresses)) == len(addresses)


@given(topologies(), st.integers(0, planning.SLOTS - 1))
@settings(max_examples=50, deadline=None)
def test_management_addresses_stay_in_their_slot(topology: ResolvedTopology, slot: int) -> None:
    network = planning.slot_network(slot)
    assert network.subnet_of(ipaddress.IPv4Network("100.65.0.0/16"))
    for link in plan(topology, "m0001", slot).management.values():
        assert ipaddress.IPv4Address(link.inside_ip) in network
        assert ipaddress.IPv4Address(link.outside_ip) in network


def test_the_first_slot_is_the_resolved_topology_s_own() -> None:
    topology = resolved(PAIR)
    assert {name: link.inside_ip for name, link in plan(topology, "m1", 0).management.items()} == {
        name: host.mgmt_ip for name, host in topology.hosts.items()
    }


def test_the_host_s_end_comes_first_and_keeps_its_link_s_properties() -> None:
    one, two = plan(resolved(PAIR), "mabcd").wires
    assert (one.a.node, one.a.interface, one.a.port, one.b.interface, one.b.port) == (
        "h1",
        "h1-eth0",
        0,
        "mabcd-s1p1",
        1,
    )
    assert (one.bw, one.mtu, two.bw) == (10000, 9000, None)


def test_the_fabric_knows_every_address() -> None:
    """Host and node addresses, and an app's own where its app starts."""
    topology = resolved(PAIR)
    fabric = plan(topology, "mabcd").fabric
    assert fabric.addresses == {
        "10.0.0.1": "h1",
        "100.64.0.1": "h1",
        topology.hosts["h2"].ip: "h2",
        "100.64.0.2": "h2",
        "10.0.0.50": "h2",
        "fd4d::a00:1": "h1",
        ip6.companion(topology.hosts["h2"].ip): "h2",
        "fd4d::a00:32": "h2",
    }
    assert fabric.expected_ports("s1") == {1: "mabcd-s1p1", 2: "mabcd-s1p2"}


@pytest.mark.parametrize("slot", [-1, planning.SLOTS])
def test_there_are_only_so_many_slots(slot: int) -> None:
    with pytest.raises(ValueError, match="slot"):
        plan(resolved(PAIR), "m1", slot)
