"""The fabric as the controller knows it: switches, numbered ports, attached hosts. Plain data, exchanged as JSON."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import networkx as nx


class FabricError(ValueError):
    """The description contradicts itself, or names something that does not exist."""


@dataclass(frozen=True, slots=True)
class Attachment:
    """The port of a switch that a host is attached to."""

    host: str
    switch: str
    port: int
    """OpenFlow port number on `switch`."""
    mac: str
    """MAC address of the host's data interface."""
    interface: str = ""
    """Name of the switch's port, as the switch announces it; not checked if it is empty."""


@dataclass(frozen=True, slots=True)
class Trunk:
    """A link between two switches."""

    a: str
    a_port: int
    b: str
    b_port: int
    a_interface: str = ""
    b_interface: str = ""


@dataclass(frozen=True, slots=True)
class Fabric:
    """The whole fabric. `addresses` are the initial ones; they may move later (see `routes`)."""

    switches: Mapping[str, int]
    """Name → datapath id."""
    hosts: Mapping[str, Attachment]
    """Name → the host's attachment."""
    trunks: tuple[Trunk, ...]
    addresses: Mapping[str, str]
    """IPv4 or IPv6 address → name of the host that has it."""
    graph: nx.Graph = field(init=False, compare=False, repr=False)
    """Graph of the switches, derived from the other fields."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "graph", self._checked_graph())

    def _checked_graph(self) -> nx.Graph:
        """The graph of the switches. Raises FabricError for unknown names, ports used twice, bad addresses, islands."""
        graph = nx.Graph()
        graph.add_nodes_from(sorted(self.switches))
        used: dict[tuple[str, int], str] = {}
        ends = [(h.switch, h.port, f"host {h.host}") for h in self.hosts.values()]
        for t in self.trunks:
            ends += [(t.a, t.a_port, f"trunk {t.a}–{t.b}"), (t.b, t.b_port, f"trunk {t.a}–{t.b}")]
            graph.add_edge(t.a, t.b)
        for switch, port, what in ends:
            if switch not in self.switches:
                raise FabricError(f"{what}: no switch {switch!r}")
            if (switch, port) in used:
                raise FabricError(f"port {port} of {switch} is used by {used[switch, port]} and by {what}")
            used[switch, port] = what
        if len(set(self.switches.values())) != len(self.switches):
            raise FabricError("two switches have the same datapath id")
        for address, host in self.addresses.items():
            ipaddress.ip_address(address)
            if host not in self.hosts:
                raise FabricError(f"address {address}: no host {host!r}")
        if self.switches and not nx.is_connected(graph):
            raise FabricError("the switches are not all connected with each other")
        return graph

    def port_towards(self, switch: str, neighbour: str) -> int:
        """The lowest-numbered port of `switch` that leads to `neighbour`. Raises FabricError if none does."""
        ports = [t.a_port for t in self.trunks if (t.a, t.b) == (switch, neighbour)]
        ports += [t.b_port for t in self.trunks if (t.b, t.a) == (switch, neighbour)]
        if not ports:
            raise FabricError(f"no link from {switch} to {neighbour}")
        return min(ports)

    def expected_ports(self, switch: str) -> dict[int, str]:
        """Port number → interface name, for every port of `switch` that is in use."""
        ports = {h.port: h.interface for h in self.hosts.values() if h.switch == switch}
        ports |= {t.a_port: t.a_interface for t in self.trunks if t.a == switch}
        ports |= {t.b_port: t.b_interface for t in self.trunks if t.b == switch}
        return ports

    def to_plain(self) -> dict[str, Any]:
        """The fabric as data that JSON can represent."""
        return {
            "switches": dict(self.switches),
            "hosts": {name: asdict(host) for name, host in self.hosts.items()},
            "trunks": [asdict(trunk) for trunk in self.trunks],
            "addresses": dict(self.addresses),
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Fabric:
        """The inverse of `to_plain`. Raises FabricError."""
        try:
            return cls(
                switches={str(name): int(dpid) for name, dpid in plain["switches"].items()},
                hosts={name: Attachment(**host) for name, host in plain["hosts"].items()},
                trunks=tuple(Trunk(**trunk) for trunk in plain["trunks"]),
                addresses=dict(plain["addresses"]),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise FabricError(f"not a fabric: {error!r}") from error
