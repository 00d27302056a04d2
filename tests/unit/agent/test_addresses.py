"""Addresses of the data interface. Invariant: what was added can be removed, whatever its prefix."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from testbed.agent import addresses
from testbed.base import ip6


@pytest.mark.parametrize("prefix", [8, 16, 24, 29])
def test_removed_with_the_prefix_that_it_has(prefix: int, monkeypatch: pytest.MonkeyPatch) -> None:
    beside = ip6.companion("10.0.0.2")
    held = [("10.0.0.9", prefix), ("10.0.0.2", prefix), (beside, 64)]
    shown = json.dumps([{"ifname": "eth0", "addr_info": [{"local": ip, "prefixlen": length} for ip, length in held]}])
    ran: list[tuple[str, ...]] = []
    monkeypatch.setattr(addresses, "_run", lambda *argv: ran.append(argv) or shown)
    agent: Any = SimpleNamespace(interface="eth0")
    assert addresses.list_addresses(agent) == {"addresses": ["10.0.0.9", "10.0.0.2", beside]}
    addresses.address_del(agent, ip="10.0.0.2")
    assert [argv[3] for argv in ran if argv[2] == "delete"] == [f"10.0.0.2/{prefix}", f"{beside}/64"]
    ran.clear()
    addresses.address_del(agent, ip="10.0.0.3")
    assert not [argv for argv in ran if argv[2] == "delete"]
