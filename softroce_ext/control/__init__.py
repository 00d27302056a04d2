"""The NIC's management socket: JSON lines over a Unix stream socket, one object in, one object out.

What lives here: the client (`client`), which this package exports, and the listening side (`server`). The commands
themselves are methods of `softroce_ext.process.management`. The standard library is enough for both, so that a small
process can talk to a NIC without loading one.

May import: nothing.
"""

from __future__ import annotations

from softroce_ext.control.client import ControlClient, ControlError

__all__ = ["ControlClient", "ControlError"]
