"""IP addresses on the data interface, added and removed as an application's address moves between hosts.

An IPv4 address always comes with its companion IPv6 address (`testbed.base.ip6`).
"""

from __future__ import annotations

import json
import subprocess
from typing import Any

from testbed.agent.operations import OperationError
from testbed.agent.service import Agent
from testbed.base import ip6


def address_add(agent: Agent, *, ip: str, prefix: int = 16) -> dict[str, Any]:
    """Add `ip`/`prefix` to the data interface. Idempotent. The controller answers ARP, so nothing is announced."""
    _run("ip", "address", "replace", f"{ip}/{prefix}", "dev", agent.interface)
    beside = f"{ip6.companion(ip)}/{ip6.NETWORK.prefixlen}"
    _run("ip", "-6", "address", "replace", beside, "dev", agent.interface, "nodad")
    return {}


def address_del(agent: Agent, *, ip: str) -> dict[str, Any]:
    """Remove `ip` and its companion, whatever their prefix lengths. No error if they are not there."""
    wanted = ip6.both(ip)
    for address, length in _with_prefixes(agent.interface):
        if address in wanted:
            _run("ip", "address", "delete", f"{address}/{length}", "dev", agent.interface)
    return {}


def list_addresses(agent: Agent) -> dict[str, Any]:
    """Return the addresses of the data interface: {"addresses": [ip, …]}."""
    return {"addresses": addresses(agent.interface)}


def addresses(interface: str) -> list[str]:
    """The addresses of `interface`, in the kernel's order."""
    return [address for address, _ in _with_prefixes(interface)]


def _with_prefixes(interface: str) -> list[tuple[str, int]]:
    """The addresses of `interface` with the lengths of their prefixes."""
    links = json.loads(_run("ip", "-json", "address", "show", "dev", interface))
    return [(info["local"], info["prefixlen"]) for link in links for info in link.get("addr_info", [])]


def _run(*argv: str) -> str:
    result = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if result.returncode:
        raise OperationError(f"{' '.join(argv)}: {result.stderr.strip()}", blame="environment")
    return result.stdout
