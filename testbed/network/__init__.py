"""The emulated network of one run: virtual hosts, Open vSwitch bridges, cables, management links, SSH servers.

What lives here: `plan` (every name and number, decided beforehand; pure), `machine` (commands, their errors, what this
machine can do), `nodes` (Mininet's classes, made to check what they do), `shaping` (offloads, bandwidth, delay, loss),
`fixtures` (the few things that all runs on a machine share), `ssh` (one server per host) and `network` (builds it all
and takes it away). Only `nodes` imports Mininet, when a network starts, so that a topology can be validated where
Mininet is missing.

May import: `testbed.base`, `testbed.cleanup`, `testbed.topology`, `testbed.controller`.
"""

from __future__ import annotations

from testbed.network.network import Network, VirtualHost

__all__ = ["Network", "VirtualHost"]
