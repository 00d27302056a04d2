"""Which flows forward an address, and in which order they may change. Pure: no controller, no clock, no network.

Forwarding is by destination: for each address every switch has one effective flow, which sends `ipv4_dst=address` (or
`ipv6_dst`) one step along a shortest path towards the host that has it. The last switch also sets `eth_dst` to that
host's MAC, so that partners which still have the old MAC in their neighbour table need no change.

Moving an address is make-before-break in two halves:

* *prepare* adds, at every switch whose step changes, the new flow **below** the old one. It carries no
  traffic yet, so this may happen at any time before the move; a switch that refuses is known before anything freezes.
* *move* removes the old flows, the switches nearest to the new host first, a barrier after each distance. A packet that
  meets a switch that is already moved therefore finds only moved switches from there on: it reaches the new host. A
  packet that meets none of them follows the old path, which is whole: it reaches the old host. At no instant is there
  neither path, nor a loop, in whatever order the switches of one stage act (`tests/unit/controller` walks all of it).

A packet that is between two switches when they change may have to go back where it came from. OpenFlow drops what would
leave by the port that it entered, unless the action says so; hence the companion entry of each flow: `in_port` is the
flow's own port, send it back there. In a settled network only a packet to its sender's own address meets it.

So an address goes two priorities lower with each move: 16383 moves of one address in one run.
"""

from __future__ import annotations

import ipaddress
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import networkx as nx

from testbed.controller.fabric import Fabric, FabricError

TOP_PRIORITY: Final = 0x8000
"""Of an address's first flows."""
GENERATION: Final = 2
"""Priorities between an address's flows before and after a move: the companion entry is one above its flow."""


class RouteError(ValueError):
    """A request that cannot be met: an unknown address or host, nothing to undo. The text is for the user."""


@dataclass(frozen=True, slots=True)
class Flow:
    """Match packets to `address` at `priority`, set `eth_dst` if there is one, send to `out_port`.

    A companion entry at `priority + 1` does the same with what came in by `out_port`.
    """

    switch: str
    address: str
    priority: int
    out_port: int
    eth_dst: str | None = None

    @property
    def step(self) -> tuple[int, str | None]:
        """What it does, without where it stands."""
        return self.out_port, self.eth_dst

    @property
    def match(self) -> tuple[str, str]:
        """OpenFlow's field for the destination, and its value."""
        return f"ipv{ipaddress.ip_address(self.address).version}_dst", self.address

    def to_plain(self) -> dict[str, Any]:
        """In the words of the report."""
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
    """One flow-mod."""

    action: Literal["added", "removed"]
    flow: Flow


Stage = tuple[Change, ...]
"""Changes that may happen in any order among themselves; a barrier on each switch concerned follows."""


def shortest_steps(fabric: Fabric, address: str, host: str) -> dict[str, Flow]:
    """Switch → its flow for `address` at `host`, by number of hops. Among equals the neighbour first by name."""
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
    """Switch → hops to the switch that `host` hangs on."""
    return dict(nx.single_source_shortest_path_length(fabric.graph, fabric.hosts[host].switch))


class RouteTable:
    """What is installed where, and what to change next. The caller sends the changes and confirms each one.

    Nothing here assumes that a change took place before `confirm` was called for it, so a controller that lost a switch
    half way can ask again and gets what is still missing.
    """

    def __init__(self, fabric: Fabric) -> None:
        self.fabric = fabric
        self.owner: dict[str, str] = dict(fabric.addresses)
        """Address → host that traffic for it goes to (once all moves asked for are confirmed)."""
        self.previous: dict[str, str] = {}
        """Address → host that had it before its last move, for as long as that can be undone."""
        self.prepared: dict[str, str] = {}
        """Address → host that its next move has been prepared for."""
        self.installed: dict[tuple[str, str], dict[int, Flow]] = {}
        """(switch, address) → priority → flow, as confirmed."""

    # -- reading

    def effective(self, switch: str, address: str) -> Flow | None:
        """The flow that a packet for `address` meets at `switch`."""
        flows = self.installed.get((switch, address))
        return flows[max(flows)] if flows else None

    def flows_of(self, switch: str) -> list[Flow]:
        """Everything installed at one switch."""
        return [flow for (at, _), flows in self.installed.items() if at == switch for flow in flows.values()]

    def mac_of(self, address: str) -> str | None:
        """For ARP and neighbour discovery: the MAC of the host that has `address`; None if nobody has."""
        host = self.owner.get(address)
        return self.fabric.hosts[host].mac if host else None

    def path(self, source: str, address: str) -> list[str]:
        """Names from host `source` to the host where a packet for `address` comes out. Raises RouteError."""
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

    # -- what to change

    def install(self) -> Stage:
        """The first flows of every address, everywhere. Also completes what `confirm` has not seen yet."""
        return tuple(
            Change("added", flow)
            for address, host in sorted(self.owner.items())
            for switch, flow in shortest_steps(self.fabric, address, host).items()
            if (switch, address) not in self.installed
        )

    def announce(self, address: str, host: str) -> list[Stage]:
        """A new address appears at `host`; the switches nearest to it first. Raises RouteError."""
        try:
            ipaddress.ip_address(address)
        except ValueError as error:
            raise RouteError(f"{address!r} is not an IP address") from error
        self._known_host(host)
        if self.owner.get(address, host) != host:
            raise RouteError(f"{address} is at {self.owner[address]} already; move it instead")
        self.owner[address] = host
        flows = shortest_steps(self.fabric, address, host)
        missing = [flow for switch, flow in flows.items() if (switch, address) not in self.installed]
        return self._by_distance(host, (Change("added", flow) for flow in missing))

    def prepare(self, address: str, host: str) -> list[Stage]:
        """Put the new flows beneath the old ones. Up to two stages: withdraw another preparation, add this one."""
        self._known(address)
        self._known_host(host)
        stages = self.withdraw(address)
        additions = []
        gone = {change.flow for stage in stages for change in stage}
        for switch, wanted in shortest_steps(self.fabric, address, host).items():
            now = self.effective(switch, address)
            if now is None:
                raise RouteError(f"{switch} has no flow for {address} yet; has it connected?")
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
        """Let the prepared flows take over: what is above them goes, nearest to the new host first. Raises RouteError.

        The flows for `host` must have been prepared and confirmed.
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
        """Every stage of `move` has been confirmed."""
        if self.owner[address] != host:
            self.previous[address] = self.owner[address]
        self.owner[address] = host
        self.prepared.pop(address, None)

    def begin(self, address: str) -> None:
        """A new move of `address` begins: the one before it is settled, and an undo concerns the new one only."""
        self.previous.pop(address, None)

    def undo_target(self, address: str) -> str | None:
        """The host that `address` has to go to if its last move is undone; None if there is nothing to undo.

        A move that stopped half way, or was only prepared, goes back to where it began. Raises RouteError.
        """
        self._known(address)
        return self.owner[address] if address in self.prepared else self.previous.get(address)

    def withdraw(self, address: str) -> list[Stage]:
        """Take back what has been prepared and does not carry traffic. Empty if there is nothing."""
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
        """The switches have confirmed these (barrier reply)."""
        for change in changes:
            key = change.flow.switch, change.flow.address
            if change.action == "added":
                self.installed.setdefault(key, {})[change.flow.priority] = change.flow
            else:
                flows = self.installed.get(key, {})
                flows.pop(change.flow.priority, None)
                if not flows:
                    self.installed.pop(key, None)

    # -- inside

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
    """The stages of several addresses' changes at once: the first of each, then the second of each, …"""
    return [
        tuple(change for stage in stages for change in stage) for stages in itertools.zip_longest(*moves, fillvalue=())
    ]


def carry_out(table: RouteTable, stages: Sequence[Stage], send: Callable[[Stage], None]) -> None:
    """The contract between table and sender, in its simplest form: one stage, then its confirmation, then the next."""
    for stage in stages:
        send(stage)
        table.confirm(stage)


__all__ = [
    "Change",
    "FabricError",
    "Flow",
    "RouteError",
    "RouteTable",
    "Stage",
    "carry_out",
    "shortest_steps",
    "side_by_side",
]
