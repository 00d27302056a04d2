"""The share of each queue pair in what one NIC may have in flight."""

from __future__ import annotations

from typing import Final

from softroce_ext.transport.engine import Engine

PACKETS_IN_FLIGHT: Final = 1024
"""Of all queue pairs of one NIC together; a port of the userspace Open vSwitch buffers about 1800 of 4 KiB."""
MIN_WINDOW: Final = 16
"""Packets in flight that each queue pair may have in any case."""


class WindowShares:
    """Counts the queue pairs that may send, and lowers the engine's window as they become more.

    What all queue pairs together have in flight must fit into the buffers of a software switch.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._sending: set[int] = set()
        """QPNs of the queue pairs in RTS or beyond."""

    def count(self, qpn: int, may_send: bool) -> None:
        """Note whether a queue pair may send."""
        if may_send:
            self._sending.add(qpn)
        else:
            self._sending.discard(qpn)
        share = max(MIN_WINDOW, PACKETS_IN_FLIGHT // max(len(self._sending), 1))
        self._engine.window = min(self._engine.config.window, share)
