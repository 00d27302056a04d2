"""The plan of one run's network: every name, number and address, decided before anything is created. Pure.

Names of interfaces in the machine's root namespace contain the run's tag, such as `m3f2a`, so that runs do not collide
with each other, and hardly with anything else (creation fails if they do). All are at most 15 characters long.
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
"""Number of runs that can be on one machine at a time, limited by the management addresses."""
MANAGEMENT_INTERFACE: Final = "mgmt"
"""Name of the management interface inside every host."""


@dataclass(frozen=True, slots=True)
class End:
    """One end of a link."""

    node: str
    """Name of the host or switch, as in the topology."""
    interface: str
    """Name of the interface, inside the host or (for a switch) in the root namespace."""
    port: int
    """OpenFlow port number; 0 at a host."""
    mac: str


@dataclass(frozen=True, slots=True)
class Wire:
    """One cable of the data network, with its properties in each direction."""

    a: End
    """The host's end, if the cable has one."""
    b: End
    mtu: int
    bw: float | None
    """Bandwidth in Mbit/s; None if it is not limited."""
    delay: float
    """One-way delay in seconds."""
    loss: float
    """Fraction of packets lost."""

    @property
    def name(self) -> str:
        """The names of both nodes, for messages."""
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
    """Everything that is decided about a run's network."""

    tag: str
    bridges: dict[str, str]
    """Switch → name of its Open vSwitch bridge."""
    datapath_ids: dict[str, int]
    wires: tuple[Wire, ...]
    management: dict[str, Management]
    hosts: dict[str, ResolvedHost]
    fabric: Fabric


def switch_mac(switch: int, port: int) -> str:
    """MAC address of a switch's end of a cable: locally administered, and distinct from the hosts' 02:00:00:…"""
    return f"02:01:00:{switch & 0xFF:02x}:{port >> 8 & 0xFF:02x}:{port & 0xFF:02x}"


def plan(resolved: ResolvedTopology, tag: str, slot: int = 0) -> Plan:
    """Make the plan. `tag` has up to 5 characters; `slot` (0 to SLOTS - 1) selects the block of management addresses.

    Slot 0 uses the addresses of the resolved topology, slot k those 512·k further up, so that runs on the same machine
    have different ones. The ports of a switch are numbered from 1 in the order of the links. Raises ValueError.
    """
    if not 0 <= slot < SLOTS:
        raise ValueError(f"slot {slot}; allowed: 0 to {SLOTS - 1}")
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
                raise ValueError(f"interface name {one.interface} is too long; allowed: up to 15 characters")
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
    """The network of all management addresses of one slot."""
    return ipaddress.IPv4Network((int(MANAGEMENT_NETWORK[slot * 512]), 23))


def _fabric(resolved: ResolvedTopology, wires: tuple[Wire, ...]) -> Fabric:
    """The fabric for the controller. The address of an app is at the host that the app starts on."""
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
