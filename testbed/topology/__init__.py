"""The topology file: its schema, its checks, and the resolved form that all other packages work with.

What lives here: `models` (what a user may write), `units` (durations, sizes, fractions), `load` (YAML with line
numbers, all errors at once), `checks` (what a schema cannot express: names, reachability, addresses) and the `view` of
a file that they use, and `resolved` (every automatic value filled in). Nothing here changes or inspects the machine, so
validation does not need root.

May import: `softroce_ext.wire`, `testbed.base`.
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
