"""The topology file: its schema, its checks, and the resolved form that everything else is programmed against.

What lives here: `models` (what a user may write), `units` (durations, sizes, fractions), `load` (YAML with line
numbers, every error at once), `checks` (what no schema can say: names, reachability, addresses), `resolved` (every
automatic value filled in). Nothing here touches the machine, so validating needs no root.

May import: `testbed.base`.
"""

from __future__ import annotations

from testbed.topology.load import find, load, parse
from testbed.topology.models import App, Host, Impair, Link, Migration, Nic, Report, Topology
from testbed.topology.resolved import (
    ResolvedApp,
    ResolvedHost,
    ResolvedLink,
    ResolvedMigration,
    ResolvedNic,
    ResolvedSwitch,
    ResolvedTopology,
    resolve,
)

__all__ = [
    "App",
    "Host",
    "Impair",
    "Link",
    "Migration",
    "Nic",
    "Report",
    "ResolvedApp",
    "ResolvedHost",
    "ResolvedLink",
    "ResolvedMigration",
    "ResolvedNic",
    "ResolvedSwitch",
    "ResolvedTopology",
    "Topology",
    "find",
    "load",
    "parse",
    "resolve",
]
