"""What is going to be built, decided before anything exists: every name, number and address of one run. Pure.

Names of interfaces in the machine's root namespace carry the run's tag, `m3f2a`: two runs never meet, and nothing of
anybody else's can have such a name by accident (creation is refused if it has). All are at most 15 characters long.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Final

from testbed.base import ip6
from testbed.controller.fabric import Attachment, Fabric, Trunk
from testbed.topology import ResolvedHost, ResolvedTopology
from testbed.topology.resolved import MANAGEMENT_NETWORK

SLOTS: Final = 127
"""Runs that can be on one machine at a time, by their management addresses."""
MANAGEMENT_INTERFACE: Final = "mgmt"
"""Inside every host."""


@dataclass(frozen=True, slots=True)
class End:
    """One end of a link."""

    node: str
    """Host or switch, as in the topology."""
    interface: str
    """Name of the interface: inside the host, or in the root namespace for a switch."""
    port: int
    """OpenFlow port number; 0 at a host."""
    mac: str


@dataclass(frozen=True, slots=True)
class Wire:
    """One cable of the data network, with what it shall be like each way."""

    a: End
    """The host's end where there is a host."""
    b: End
    mtu: int
    bw: float | None
    """Mbit/s."""
    delay: float
    """Seconds, one way."""
    loss: float
    """Share of packets."""

    @property
    def name(self) -> str:
        return f"{self.a.node}–{self.b.node}"


@dataclass(frozen=True, slots=True)
class Management:
    """The point-to-point link between the machine and one host, for SSH only."""

    host: str
    outside: str
    """Interface in the root namespace."""
    outside_ip: str
    inside_ip: str


@dataclass(frozen=True, slots=True)
class Plan:
    """All of it."""

    tag: str
    bridges: dict[str, str]
    """Switch → name of its Open vSwitch bridge."""
    datapath_ids: dict[str, int]
    wires: tuple[Wire, ...]
    management: dict[str, Management]
    hosts: dict[str, ResolvedHost]
    fabric: Fabric


def switch_mac(switch: int, port: int) -> str:
    """Of a switch's end of a cable: locally administered, apart from the hosts' 02:00:00:…"""
    return f"02:01:00:{switch & 0xFF:02x}:{port >> 8 & 0xFF:02x}:{port & 0xFF:02x}"


def plan(resolved: ResolvedTopology, tag: str, slot: int = 0) -> Plan:
    """Decide everything. `tag`: up to 5 characters. `slot` 0 … SLOTS-1 picks the block of management addresses.

    Slot 0 gives the addresses of the resolved topology; slot k those 512·k further up, so that a second run on the same
    machine has its own. Port numbers of a switch count from 1 in the order of the links.
    """
    if not 0 <= slot < SLOTS:
        raise ValueError(f"slot {slot}: there are {SLOTS}")
    number = {name: index for index, name in enumerate(resolved.switches, start=1)}
    bridges = {name: f"{tag}-s{index}" for name, index in number.items()}
    next_port = dict.fromkeys(resolved.switches, 1)

    def end(node: str) -> End:
        if node in resolved.hosts:
            host = resolved.hosts[node]
            return End(node, host.interface, 0, host.mac)
        port, next_port[node] = next_port[node], next_port[node] + 1
        return End(node, f"{bridges[node]}p{port}", port, switch_mac(number[node], port))

    wires = tuple(Wire(end(link.a), end(link.b), link.mtu, link.bw, link.delay, link.loss) for link in resolved.links)
    for wire in wires:
        for one in (wire.a, wire.b):
            if len(one.interface) > 15:
                raise ValueError(f"interface name {one.interface} is longer than 15 characters")
    return Plan(
        tag=tag,
        bridges=bridges,
        datapath_ids={name: switch.dpid for name, switch in resolved.switches.items()},
        wires=wires,
        management=_management(resolved, tag, slot),
        hosts=dict(resolved.hosts),
        fabric=_fabric(resolved, wires),
    )


def _management(resolved: ResolvedTopology, tag: str, slot: int) -> dict[str, Management]:
    block = slot * 512
    outside = str(MANAGEMENT_NETWORK[block + 256 + 254])
    return {
        name: Management(name, f"{tag}-m{host.index}", outside, str(ipaddress.IPv4Address(host.mgmt_ip) + block))
        for name, host in resolved.hosts.items()
    }


def slot_network(slot: int) -> ipaddress.IPv4Network:
    """All management addresses of one slot."""
    return ipaddress.IPv4Network((int(MANAGEMENT_NETWORK[slot * 512]), 23))


def _fabric(resolved: ResolvedTopology, wires: tuple[Wire, ...]) -> Fabric:
    """The controller's picture. An app's own address is where its app starts."""
    addresses: dict[str, str] = {}
    for host in resolved.hosts.values():
        addresses |= dict.fromkeys(ip6.both(host.ip), host.name)
        addresses[host.node_ip] = host.name
    for app in resolved.apps.values():
        for address in ip6.both(app.address):
            addresses.setdefault(address, app.host)
    return Fabric(
        switches={name: switch.dpid for name, switch in resolved.switches.items()},
        hosts={
            wire.a.node: Attachment(wire.a.node, wire.b.node, wire.b.port, wire.a.mac, wire.b.interface)
            for wire in wires
            if wire.a.node in resolved.hosts
        },
        trunks=tuple(
            Trunk(wire.a.node, wire.a.port, wire.b.node, wire.b.port, wire.a.interface, wire.b.interface)
            for wire in wires
            if wire.a.node not in resolved.hosts
        ),
        addresses=addresses,
    )
