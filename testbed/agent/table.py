"""Every operation of an agent, by name: importing this module imports all groups of operations."""

from __future__ import annotations

from testbed.agent import addresses, apps, files, moves, nic
from testbed.agent.operations import OPS

__all__ = ["OPS", "addresses", "apps", "files", "moves", "nic"]
