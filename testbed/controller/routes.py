"""Which flows forward an address, and in which order they may change. Pure: no controller, no clock, no network.

Forwarding is by destination: for each address every switch has one effective flow, which sends `ipv4_dst=address` (or
`ipv6_dst`) one step along a shortest path towards the host that has it. The last switch also sets `eth_dst` to that
host's MAC, so that peers with the old MAC in their neighbour table need no change.

Moving an address is make-before-break in two halves:

* *prepare* adds, at every switch whose step changes, the new flow **below** the old one. It carries no traffic yet, so
  this may happen at any time before the move, and a switch that refuses is known before any process is frozen.
* *move* removes the old flows, starting with the switches nearest to the new host, with a barrier after each distance.
  A packet that reaches a switch that has already changed therefore meets only changed switches from there on, and
  reaches the new host. A packet that meets none of them follows the old path, which is still complete, and reaches the
  old host. At no time is a path missing or is there a loop, in whatever order the switches of one stage act
  (`tests/unit/controller` checks all of these states).

A packet that is between two switches when they change may have to return to the switch that it came from. OpenFlow
drops a packet that would leave through its ingress port, unless the action is explicit. Hence each flow has a companion
entry that matches the flow's output port as `in_port` and sends the packet back. In a network at rest, only a packet
that a host sends to its own address matches it.

An address thus goes down by two priorities with each move, which allows 16383 moves of one address in one run.
"""

from __future__ import annotations

import ipaddress
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import networkx as nx

from testbed.controller.fabric import Fabric, FabricError

TOP_PRIORITY: Final = 0x8000
"""Priority of an address's first flows."""
GENERATION: Final = 2
"""Priorities by which an address's flows go down with a move: the companion entry is one above its flow."""


class RouteError(ValueError):
    """A request that cannot be met, such as one for an unknown address or host. The message is for the user."""


@dataclass(frozen=True, slots=True)
class Flow:
    """A flow entry: match packets for `address` at `priority`, set `eth_dst` if given, and send to `out_port`.

    A companion entry at `priority + 1` does the same for packets that came in through `out_port`.
    """

    switch: str
    address: str
    priority: int
    out_port: int
    eth_dst: str | None = None

    @property
    def step(self) -> tuple[int, str | None]:
        """The flow's actions, regardless of switch and priority."""
        return self.out_port, self.eth_dst

    @property
    def match(self) -> tuple[str, str]:
        """The OpenFlow field that matches the destination, and its value."""
        return f"ipv{ipaddress.ip_address(self.address).version}_dst", self.address

    def to_plain(self) -> dict[str, Any]:
        """The flow as the report and the northbound interface describe it."""
        rewrite = f", eth_dst={self.eth_dst}" if self.eth_dst else ""
        match = "=".join(self.match)
        return {
            "switch": self.switch,
            "match": match,
            "priority": self.priority,
            "out": f"port {self.out_port}{rewrite}",
        }


@dataclass(frozen=True, slots=True)
class Change:
    """A flow to add or to remove."""

    action: Literal["added", "removed"]
    flow: Flow


Stage = tuple[Change, ...]
"""Changes that may take effect in any order; each switch that is involved then gets a barrier."""


def shortest_steps(fabric: Fabric, address: str, host: str) -> dict[str, Flow]:
    """Switch → its flow on a path with the fewest hops to `address` at `host`; the first neighbour by name wins."""
    attachment = fabric.hosts[host]
    distance = distances(fabric, host)
    flows = {}
    for switch in fabric.switches:
        if switch == attachment.switch:
            flows[switch] = Flow(switch, address, TOP_PRIORITY, attachment.port, attachment.mac)
        else:
            nearer = min(n for n in fabric.graph[switch] if distance[n] == distance[switch] - 1)
            flows[switch] = Flow(switch, address, TOP_PRIORITY, fabric.port_towards(switch, nearer))
    return flows


def distances(fabric: Fabric, host: str) -> dict[str, int]:
    """Switch → number of hops to the switch that `host` is attached to."""
    return dict(nx.single_source_shortest_path_length(fabric.graph, fabric.hosts[host].switch))


class RouteTable:
    """The installed flows, and the changes to make next. The caller sends the changes and confirms each one.

    A change is not assumed to have taken place until `confirm` is called for it, so a controller that lost a switch
    half-way can ask again and gets the changes that are still missing.
    """

    def __init__(self, fabric: Fabric) -> None:
        self.fabric = fabric
        self.owner: dict[str, str] = dict(fabric.addresses)
        """Address → host that receives its traffic, once all requested moves are confirmed."""
        self.previous: dict[str, str] = {}
        """Address → host that had it before its last move, as long as that move can be undone."""
        self.prepared: dict[str, str] = {}
        """Address → host that its next move has been prepared for."""
        self.installed: dict[tuple[str, str], dict[int, Flow]] = {}
        """(switch, address) → priority → confirmed flow."""

    # -- reading

    def effective(self, switch: str, address: str) -> Flow | None:
        """The flow that a packet for `address` matches at `switch`; None if there is none."""
        flows = self.installed.get((switch, address))
        return flows[max(flows)] if flows else None

    def flows_of(self, switch: str) -> list[Flow]:
        """All flows installed at one switch."""
        return [flow for (at, _), flows in self.installed.items() if at == switch for flow in flows.values()]

    def mac_of(self, address: str) -> str | None:
        """MAC of the host that has `address`, for ARP and neighbour discovery; None if no host has it."""
        host = self.owner.get(address)
        return self.fabric.hosts[host].mac if host else None

    def path(self, source: str, address: str) -> list[str]:
        """Names of the nodes from host `source` to the host that receives a packet for `address`. Raises RouteError."""
        self._known(address)
        if source not in self.fabric.hosts:
            raise RouteError(f"no host {source!r}; there are {', '.join(self.fabric.hosts)}")
        at = {(h.switch, h.port): h.host for h in self.fabric.hosts.values()}
        trunk = {(t.a, t.a_port): t.b for t in self.fabric.trunks} | {(t.b, t.b_port): t.a for t in self.fabric.trunks}
        switch, trail = self.fabric.hosts[source].switch, [source]
        while True:
            if switch in trail:
                raise RouteError(f"loop: {' → '.join([*trail, switch])}")
            trail.append(switch)
            flow = self.effective(switch, address)
            if flow is None:
                raise RouteError(f"{switch} has no flow for {address} ({' → '.join(trail)})")
            end = switch, flow.out_port
            if end in at:
                return [*trail, at[end]]
            switch = trunk[end]

    # -- changes

    def install(self) -> Stage:
        """The first flows of every address at every switch, as far as they have not been confirmed yet."""
        return tuple(
            Change("added", flow)
            for address, host in sorted(self.owner.items())
            for switch, flow in shortest_steps(self.fabric, address, host).items()
            if (switch, address) not in self.installed
        )

    def announce(self, address: str, host: str) -> list[Stage]:
        """Add a new address at `host`, at the switches nearest to it first. Raises RouteError."""
        try:
            ipaddress.ip_address(address)
        except ValueError as error:
            raise RouteError(f"{address!r} is not an IP address") from error
        self._known_host(host)
        if self.owner.get(address, host) != host:
            raise RouteError(f"{address} is already at {self.owner[address]}; move it instead")
        self.owner[address] = host
        flows = shortest_steps(self.fabric, address, host)
        missing = [flow for switch, flow in flows.items() if (switch, address) not in self.installed]
        return self._by_distance(host, (Change("added", flow) for flow in missing))

    def prepare(self, address: str, host: str) -> list[Stage]:
        """Add the new flows below the old ones. Up to two stages: withdraw another preparation, then add this one.

        Raises RouteError.
        """
        self._known(address)
        self._known_host(host)
        stages = self.withdraw(address)
        additions = []
        gone = {change.flow for stage in stages for change in stage}
        for switch, wanted in shortest_steps(self.fabric, address, host).items():
            now = self.effective(switch, address)
            if now is None:
                raise RouteError(f"{switch} has no flow for {address} yet; is it connected?")
            if now.step != wanted.step:
                rest = [flow.priority for flow in self.installed[switch, address].values() if flow not in gone]
                below = min(rest) - GENERATION
                if below < 1:
                    raise RouteError(
                        f"{address} has been moved {TOP_PRIORITY // GENERATION - 1} times; restart the controller"
                    )
                additions.append(Change("added", Flow(switch, address, below, *wanted.step)))
        self.prepared[address] = host
        return [*stages, tuple(additions)] if additions else stages

    def move(self, address: str, host: str) -> list[Stage]:
        """Activate the prepared flows by removing those above them, at the switches nearest to the new host first.

        The flows for `host` must have been prepared and confirmed. Raises RouteError.
        """
        self._known(address)
        if self.prepared.get(address) != host:
            raise RouteError(f"the move of {address} to {host} has not been prepared")
        removals = []
        for switch, wanted in shortest_steps(self.fabric, address, host).items():
            flows = self.installed.get((switch, address), {})
            matching = [flow for flow in flows.values() if flow.step == wanted.step]
            if not matching:
                raise RouteError(f"{switch} has not confirmed its new flow for {address}")
            lowest = min(flow.priority for flow in matching)
            removals += [Change("removed", flow) for flow in flows.values() if flow.priority > lowest]
        return self._by_distance(host, removals)

    def moved(self, address: str, host: str) -> None:
        """Record that every stage of `move` has been confirmed."""
        if self.owner[address] != host:
            self.previous[address] = self.owner[address]
        self.owner[address] = host
        self.prepared.pop(address, None)

    def begin(self, address: str) -> None:
        """Begin a new move of `address`: its previous move becomes final, and an undo refers to the new one only."""
        self.previous.pop(address, None)

    def undo_target(self, address: str) -> str | None:
        """The host that `address` returns to if its last move is undone; None if there is nothing to undo.

        If a move was only prepared or stopped half-way, that is the host it started from. Raises RouteError.
        """
        self._known(address)
        return self.owner[address] if address in self.prepared else self.previous.get(address)

    def withdraw(self, address: str) -> list[Stage]:
        """Remove the flows that were prepared and carry no traffic; empty if there are none."""
        self._known(address)
        self.prepared.pop(address, None)
        idle = [
            Change("removed", flow)
            for (_, of), flows in self.installed.items()
            if of == address
            for flow in flows.values()
            if flow.priority != max(flows)
        ]
        return [tuple(idle)] if idle else []

    def confirm(self, changes: Iterable[Change]) -> None:
        """Record changes that the switches have confirmed (barrier reply)."""
        for change in changes:
            key = change.flow.switch, change.flow.address
            if change.action == "added":
                self.installed.setdefault(key, {})[change.flow.priority] = change.flow
            else:
                flows = self.installed.get(key, {})
                flows.pop(change.flow.priority, None)
                if not flows:
                    self.installed.pop(key, None)

    # -- helpers

    def _by_distance(self, host: str, changes: Iterable[Change]) -> list[Stage]:
        distance = distances(self.fabric, host)
        stages: dict[int, list[Change]] = {}
        for change in changes:
            stages.setdefault(distance[change.flow.switch], []).append(change)
        return [tuple(stages[hops]) for hops in sorted(stages)]

    def _known(self, address: str) -> None:
        if address not in self.owner:
            raise RouteError(f"no address {address!r}; there are {', '.join(sorted(self.owner))}")

    def _known_host(self, host: str) -> None:
        if host not in self.fabric.hosts:
            raise RouteError(f"no host {host!r}; there are {', '.join(self.fabric.hosts)}")


def side_by_side(*moves: Sequence[Stage]) -> list[Stage]:
    """Merge the stages of several addresses: the first stage of each, then the second of each, and so on."""
    return [
        tuple(change for stage in stages for change in stage) for stages in itertools.zip_longest(*moves, fillvalue=())
    ]


__all__ = [
    "Change",
    "FabricError",
    "Flow",
    "RouteError",
    "RouteTable",
    "Stage",
    "shortest_steps",
    "side_by_side",
]
