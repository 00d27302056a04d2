"""Every verb with its data checked: stock libibverbs (by pyverbs) between two NICs.

Invariant: what one end sends, writes or reads is, byte for byte, what the other end has; errors have the status that
Linux rxe gives; a program that misbehaves harms itself only.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.system import programs
from tests.system.nic_pair import Host, hosts, nics, pair

SCENARIOS = (
    "data",
    "pieces",
    "atomics",
    "shared",
    "late",
    "bad_key",
    "short_receive",
    "window",
    "resize",
    "fork",
)


@pytest.fixture(scope="module")
def joined() -> Iterator[tuple[Host, Host]]:
    """Two hosts with NICs, for all scenarios."""
    with nics() as both:
        yield both


def contexts(host: Host) -> list[str]:
    """What programs have open on a host."""
    with host.control() as control:
        return [context["id"] for context in control.call("status")["contexts"]]


def probe(server: Host, client: Host, scenario: str) -> None:
    """Run one scenario and check both ends."""
    words = programs.module("verbs_probe", scenario)
    passive, active = pair(server, client, words, wait=False)
    assert passive == (0, "ok\n"), f"passive end: {passive[1]}"
    assert active == (0, "ok\n"), f"active end: {active[1]}"
    assert contexts(server) == contexts(client) == [], "a program that ended left something behind"


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenario(joined: tuple[Host, Host], scenario: str) -> None:
    """As the scenario's own text says."""
    probe(joined[0], joined[1], scenario)


def test_loopback(joined: tuple[Host, Host]) -> None:
    """Both ends on one host: the frames go round inside the NIC."""
    probe(joined[0], joined[0], "data")


@pytest.mark.parametrize("scenario", ["scribble", "cut"])
def test_a_hostile_program_harms_only_itself(joined: tuple[Host, Host], scenario: str) -> None:
    """After it the same NICs serve the next program."""
    words = programs.module("verbs_probe", scenario)
    pair(joined[0], joined[1], words, wait=False)
    for host in joined:
        assert host.nic is not None
        assert host.nic.poll() is None, f"the NIC of host {host.number} ended"
    probe(joined[0], joined[1], "pieces")


def test_data_over_a_bad_cable() -> None:
    """Loss, duplicates, swapped and damaged frames at both ends: still every byte."""
    impair = ["--impair", "loss=0.01,duplicate=0.01,reorder=0.01,corrupt=0.01"]
    with hosts() as (first, second):
        first.start_nic("--seed", "1", *impair)
        second.start_nic("--seed", "2", *impair)
        probe(first, second, "data")
        with first.control() as one, second.control() as two:
            counters = [control.call("counters")["counters"] for control in (one, two)]
    assert all(c["impairment_lost"] and c["impairment_corrupted"] for c in counters), "the cable was good"
    assert sum(c.get("retransmits", 0) for c in counters) > 0
