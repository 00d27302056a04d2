"""docs/topology.md lists every shipped topology, and quotes messages that `testbed validate` gives."""

from __future__ import annotations

import re
from pathlib import Path

from testbed.base import ip6

ROOT = Path(__file__).resolve().parents[3]
TEXT = (ROOT / "docs" / "topology.md").read_text(encoding="utf-8")


def test_every_shipped_topology_is_listed() -> None:
    listed = re.findall(r"^\| `(topologies/[\w.]+)` \|", TEXT, re.MULTILINE)
    assert sorted(listed) == sorted(f"topologies/{path.name}" for path in (ROOT / "topologies").glob("*.yaml"))


def test_messages_are_those_of_the_program() -> None:
    expected = (ROOT / "tests" / "unit" / "topology" / "errors" / "addresses.txt").read_text(encoding="utf-8")
    quoted = TEXT.partition("## Mistakes")[2].split("```")[1].strip("\n")
    assert quoted in expected


def test_the_ipv6_address_beside_an_ipv4_address() -> None:
    (pair,) = re.findall(r"([\d.]+) has\s+`(fd4d::[\w:]+)`", TEXT)
    assert ip6.companion(pair[0]) == pair[1]
