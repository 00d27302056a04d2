"""The emulated network of one run: virtual hosts, Open vSwitch bridges, cables, management links, SSH servers.

What lives here: `plan` (every name and number, decided in advance; pure), `machine` (commands, their errors, what this
machine can do), `nodes` (Mininet's classes with error checking), `shaping` (offloads, bandwidth, delay, loss),
`fixtures` (the few resources that all runs on a machine share), `scheduling` (priority of the userspace datapath),
`ssh` (one server per host), `host` (a running virtual host) and `network` (builds and removes all of it). Only `nodes`
imports Mininet, and only when a network starts, so that a topology can be validated without Mininet.

May import: `testbed.base`, `testbed.cleanup`, `testbed.topology`, `testbed.controller`.
"""

from __future__ import annotations

from testbed.network.host import VirtualHost
from testbed.network.network import Network

__all__ = ["Network", "VirtualHost"]
