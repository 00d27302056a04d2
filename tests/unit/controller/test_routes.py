"""Routes: at every instant of a move every packet has a way, and it ends where the address is, was, or is going to be.

Invariants, checked with a forwarding table of the test's own (not with the code under test):

1. Paths: from every host to every address there is one, without a loop, as short as the graph allows.
2. Preparation changes no packet's way.
3. After any prefix of a move's changes, in any order within a stage, every packet reaches the old or the new host: also
   one that was between two switches when they changed. (A switch drops what would leave by the port that it entered,
   unless an entry says so: OpenFlow 1.3, 7.2.5.)
4. After the move every packet reaches the new host, by a shortest path, and arrives with its MAC; nothing is left over.
5. A move interrupted anywhere can be undone, with 3 holding on the way back; then every packet reaches the old host.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.controller.fabric import Attachment, Fabric, FabricError, Trunk
from testbed.controller.routes import Change, Flow, RouteError, RouteTable, Stage, side_by_side

ADDRESS = "10.0.0.1"


def fabric_of(graph: nx.Graph, places: list[int]) -> Fabric:
    """Switches s0…, the graph's edges as trunks, host k on switch `places[k]`, address 10.0.0.k at host k."""
    port = dict.fromkeys(graph, 1)

    def take(node: int) -> int:
        port[node] += 1
        return port[node] - 1

    hosts = {
        f"h{k}": Attachment(f"h{k}", f"s{place}", take(place), f"02:00:00:00:00:{k:02x}")
        for k, place in enumerate(places, start=1)
    }
    trunks = tuple(Trunk(f"s{a}", take(a), f"s{b}", take(b)) for a, b in graph.edges)
    addresses = {f"10.0.0.{k}": f"h{k}" for k in range(1, len(places) + 1)}
    return Fabric({f"s{node}": node + 1 for node in graph}, hosts, trunks, addresses)


def carry_out(table: RouteTable, stages: Sequence[Stage], send: Callable[[Stage], None]) -> None:
    """Send one stage, confirm it, and continue with the next: what a sender must do at least."""
    for stage in stages:
        send(stage)
        table.confirm(stage)


@st.composite
def fabrics(draw: st.DrawFn) -> Fabric:
    """Connected graphs of one to seven switches with two to five hosts."""
    size = draw(st.integers(1, 7))
    graph = nx.Graph()
    graph.add_nodes_from(range(size))
    for node in range(1, size):
        graph.add_edge(node, draw(st.integers(0, node - 1)))
    for a, b in draw(st.lists(st.tuples(st.integers(0, size - 1), st.integers(0, size - 1)), max_size=6)):
        if a != b:
            graph.add_edge(a, b)
    places = draw(st.lists(st.integers(0, size - 1), min_size=2, max_size=5))
    return fabric_of(graph, places)


class Switches:
    """Flow tables as OpenFlow describes them: the highest priority wins, same match and priority replaces."""

    def __init__(self, fabric: Fabric) -> None:
        self.fabric = fabric
        self.flows: dict[tuple[str, str, int], Flow] = {}
        self.seen: set[tuple[str, int]] = set()
        """(switch, port) by which some packet has entered, at any time so far: one may still wait there."""
        self.ends: dict[tuple[str, int], tuple[str, int]] = {}
        """(switch, port) → the other end of the cable; port 0 at a host."""
        for host in fabric.hosts.values():
            self.ends[host.switch, host.port] = host.host, 0
        for trunk in fabric.trunks:
            self.ends[trunk.a, trunk.a_port] = trunk.b, trunk.b_port
            self.ends[trunk.b, trunk.b_port] = trunk.a, trunk.a_port

    def apply(self, change: Change) -> None:
        key = change.flow.switch, change.flow.address, change.flow.priority
        if change.action == "added":
            self.flows[key] = change.flow
        else:
            assert self.flows.pop(key) == change.flow, "removes what is not there"

    def send(self, stage: Stage) -> None:
        for change in stage:
            self.apply(change)

    def deliver(self, source: str, address: str) -> tuple[str, str | None, int]:
        """Where a packet comes out, the MAC that it has been given, and how many switches it crossed."""
        host = self.fabric.hosts[source]
        return self.go_on(host.switch, host.port, address)

    def go_on(self, at: str, entered: int, address: str) -> tuple[str, str | None, int]:
        """As `deliver`, for a packet that waits at a port of a switch."""
        crossed: list[str] = []
        while True:
            # In flight it may come back once to where it has been, never twice.
            assert crossed.count(at) < 2, f"loop {crossed}"
            crossed.append(at)
            self.seen.add((at, entered))
            matching = [flow for (switch, to, _), flow in self.flows.items() if (switch, to) == (at, address)]
            assert matching, f"{at} drops packets for {address}"
            # A companion entry counts as one priority above its flow, and only for its own port.
            flow = max(matching, key=lambda flow: flow.priority + (flow.out_port == entered))
            at, entered = self.ends[at, flow.out_port]
            if at in self.fabric.hosts:
                return at, flow.eth_dst, len(crossed)

    def waiting(self, address: str) -> set[str]:
        """Where packets end that wait at any port where one has ever been."""
        return {self.go_on(switch, port, address)[0] for switch, port in sorted(self.seen)}

    def receivers(self, address: str) -> set[str]:
        return {self.deliver(source, address)[0] for source in self.fabric.hosts}


def started(fabric: Fabric) -> tuple[RouteTable, Switches]:
    table, switches = RouteTable(fabric), Switches(fabric)
    carry_out(table, [table.install()], switches.send)
    return table, switches


def check_shortest(fabric: Fabric, switches: Switches, address: str, host: str) -> None:
    """Every packet for `address` reaches `host` with its MAC over as few switches as possible."""
    for source in fabric.hosts:
        receiver, mac, crossed = switches.deliver(source, address)
        assert (receiver, mac) == (host, fabric.hosts[host].mac)
        here, there = fabric.hosts[source].switch, fabric.hosts[host].switch
        assert crossed == nx.shortest_path_length(fabric.graph, here, there) + 1


@given(fabrics())
@settings(max_examples=60, deadline=None)
def test_first_paths_are_shortest_and_whole(fabric: Fabric) -> None:
    """Invariant 1."""
    table, switches = started(fabric)
    for address, host in fabric.addresses.items():
        check_shortest(fabric, switches, address, host)
        for source in fabric.hosts:
            assert table.path(source, address)[-1] == host
    assert table.install() == ()


@given(fabrics(), st.data())
@settings(max_examples=100, deadline=None)
def test_a_move_never_leaves_a_packet_without_a_way(fabric: Fabric, data: st.DataObject) -> None:
    """Invariants 2, 3 and 4, over several moves of one address."""
    table, switches = started(fabric)
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    for _ in range(3):
        old = table.owner[ADDRESS]
        new = data.draw(st.sampled_from(sorted(fabric.hosts)))
        carry_out(table, table.prepare(ADDRESS, new), switches.send)
        check_shortest(fabric, switches, ADDRESS, old)
        for stage in table.move(ADDRESS, new):
            for change in rng.sample(stage, len(stage)):
                switches.apply(change)
                assert switches.receivers(ADDRESS) | switches.waiting(ADDRESS) <= {old, new}
            table.confirm(stage)
        table.moved(ADDRESS, new)
        switches.seen.clear()
        check_shortest(fabric, switches, ADDRESS, new)
        of_address = [flow for flow in switches.flows.values() if flow.address == ADDRESS]
        assert len(of_address) == len(fabric.switches), "one flow per switch, nothing left over"
        assert table.mac_of(ADDRESS) == fabric.hosts[new].mac


@given(fabrics(), st.data())
@settings(max_examples=100, deadline=None)
def test_an_interrupted_move_can_be_undone(fabric: Fabric, data: st.DataObject) -> None:
    """Invariant 5: the controller lost a switch after any number of confirmed changes."""
    table, switches = started(fabric)
    old = table.owner[ADDRESS]
    new = data.draw(st.sampled_from(sorted(fabric.hosts)))
    carry_out(table, table.prepare(ADDRESS, new), switches.send)
    changes = [change for stage in table.move(ADDRESS, new) for change in stage]
    for change in changes[: data.draw(st.integers(0, len(changes)))]:
        switches.apply(change)
        table.confirm([change])
    for ask in (table.prepare, table.move):
        for stage in ask(ADDRESS, old):
            for change in stage:
                switches.apply(change)
                assert switches.receivers(ADDRESS) <= {old, new}
            table.confirm(stage)
    table.moved(ADDRESS, old)
    check_shortest(fabric, switches, ADDRESS, old)
    assert table.owner[ADDRESS] == old and not table.prepared


@given(fabrics(), st.data())
@settings(max_examples=50, deadline=None)
def test_a_withdrawn_preparation_leaves_nothing(fabric: Fabric, data: st.DataObject) -> None:
    table, switches = started(fabric)
    before = dict(switches.flows)
    for host in data.draw(st.lists(st.sampled_from(sorted(fabric.hosts)), min_size=1, max_size=3)):
        carry_out(table, table.prepare(ADDRESS, host), switches.send)
    carry_out(table, table.withdraw(ADDRESS), switches.send)
    assert switches.flows == before


def two_switches() -> Fabric:
    return fabric_of(nx.path_graph(2), [0, 1, 1])


def test_only_switches_whose_step_changes_are_touched() -> None:
    """h2 and h3 are attached to the same switch: the other one continues as before."""
    table, switches = started(two_switches())
    carry_out(table, table.prepare("10.0.0.2", "h3"), switches.send)
    touched = {change.flow.switch for stage in table.move("10.0.0.2", "h3") for change in stage}
    assert touched == {"s1"}


def test_the_switch_of_the_new_host_comes_first_and_barriers_separate_distances() -> None:
    fabric = fabric_of(nx.path_graph(4), [0, 0, 3])
    table, switches = started(fabric)
    carry_out(table, table.prepare("10.0.0.2", "h3"), switches.send)
    order = [[change.flow.switch for change in stage] for stage in table.move("10.0.0.2", "h3")]
    assert order == [["s3"], ["s2"], ["s1"], ["s0"]]


def test_equal_paths_are_chosen_by_name() -> None:
    """A square: s0 reaches s3 by s1 or s2; it is s1, always."""
    square = nx.Graph([(0, 2), (2, 3), (0, 1), (1, 3)])
    table, _ = started(fabric_of(square, [0, 3]))
    assert table.path("h1", "10.0.0.2") == ["h1", "s0", "s1", "s3", "h2"]


def test_a_new_address_is_announced_from_its_host_outwards() -> None:
    fabric = two_switches()
    table, switches = started(fabric)
    stages = table.announce("10.0.0.99", "h3")
    assert [change.flow.switch for stage in stages for change in stage] == ["s1", "s0"]
    carry_out(table, stages, switches.send)
    check_shortest(fabric, switches, "10.0.0.99", "h3")
    assert table.announce("10.0.0.99", "h3") == []


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda table: table.prepare("10.9.9.9", "h2"), "no address '10.9.9.9'"),
        (lambda table: table.prepare(ADDRESS, "h9"), "no host 'h9'; there are h1, h2, h3"),
        (lambda table: table.move(ADDRESS, "h2"), "has not been prepared"),
        (lambda table: table.path("h9", ADDRESS), "no host 'h9'"),
        (lambda table: table.announce(ADDRESS, "h2"), "is already at h1"),
        (lambda table: table.announce("ten", "h2"), "not an IP address"),
    ],
)
def test_what_cannot_be_is_refused(ask: object, message: str) -> None:
    table, _ = started(two_switches())
    with pytest.raises(RouteError, match=message):
        ask(table)  # type: ignore[operator]


def test_a_move_waits_for_the_confirmation_of_its_preparation() -> None:
    """The preparation was computed, but a switch never confirmed it."""
    table, _ = started(two_switches())
    table.prepare(ADDRESS, "h2")
    with pytest.raises(RouteError, match="has not confirmed"):
        table.move(ADDRESS, "h2")


def test_path_says_which_switch_lacks_a_flow() -> None:
    table = RouteTable(two_switches())
    with pytest.raises(RouteError, match=r"s0 has no flow for 10\.0\.0\.2"):
        table.path("h1", "10.0.0.2")


def _changed(plain: dict[str, object], **changes: object) -> dict[str, object]:
    return {**plain, **changes}


def test_fabric_survives_json() -> None:
    fabric = two_switches()
    assert Fabric.from_plain(fabric.to_plain()) == fabric


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trunks": []}, "not all connected"),
        ({"switches": {"s0": 1, "s1": 1}}, "same datapath id"),
        ({"addresses": {"10.0.0.1": "h9"}}, "no host 'h9'"),
        ({"addresses": {"ten": "h1"}}, "not a fabric"),
        ({"switches": {"s0": 1}}, "no switch 's1'"),
        ({"hosts": None}, "not a fabric"),
        ({"trunks": [{"a": "s0", "a_port": 1, "b": "s1", "b_port": 9}]}, "port 1 of s0 is used by"),
    ],
)
def test_a_fabric_that_contradicts_itself_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(FabricError, match=message):
        Fabric.from_plain(_changed(two_switches().to_plain(), **changes))


def test_expected_ports_name_every_end() -> None:
    assert two_switches().expected_ports("s1") == {1: "", 2: "", 3: ""}


def _all(stages: Iterable[Stage]) -> list[Change]:
    return [change for stage in stages for change in stage]


def test_an_undo_concerns_the_last_move_only() -> None:
    """h1's address goes to h2. Then its move to h3 is started and refused: nothing of the first move may be undone."""
    table, switches = started(two_switches())
    assert table.undo_target(ADDRESS) is None
    carry_out(table, table.prepare(ADDRESS, "h2"), switches.send)
    assert table.undo_target(ADDRESS) == "h1", "prepared: back to where it is"
    carry_out(table, table.move(ADDRESS, "h2"), switches.send)
    table.moved(ADDRESS, "h2")
    assert table.undo_target(ADDRESS) == "h1", "moved: back to where it was"
    table.begin(ADDRESS)
    with pytest.raises(RouteError):
        table.prepare(ADDRESS, "h9")
    assert table.undo_target(ADDRESS) is None


def test_a_second_preparation_replaces_the_first() -> None:
    """First for h2, then for h3: only h3's flows are beneath, and the move to h2 is refused."""
    fabric = fabric_of(nx.path_graph(3), [0, 1, 2])
    table, switches = started(fabric)
    carry_out(table, table.prepare(ADDRESS, "h2"), switches.send)
    carry_out(table, table.prepare(ADDRESS, "h3"), switches.send)
    with pytest.raises(RouteError, match="has not been prepared"):
        table.move(ADDRESS, "h2")
    carry_out(table, table.move(ADDRESS, "h3"), switches.send)
    table.moved(ADDRESS, "h3")
    check_shortest(fabric, switches, ADDRESS, "h3")
    assert len(switches.flows) == len(fabric.switches) * len(fabric.addresses)
    assert _all(table.withdraw(ADDRESS)) == []


def test_two_addresses_change_side_by_side() -> None:
    """Stage by stage, in each address's own order; the longer one continues alone."""
    flows = [Change("added", Flow("s1", "10.0.0.1", priority, 1)) for priority in range(5)]
    one, two = [(flows[0],), (flows[1],)], [(flows[2],), (flows[3],), (flows[4],)]
    assert side_by_side(one, two) == [(flows[0], flows[2]), (flows[1], flows[3]), (flows[4],)]
    assert Flow("s1", "fd00::2", 1, 1).match == ("ipv6_dst", "fd00::2")
