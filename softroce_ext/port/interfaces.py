"""What can stand between the port and the interface: observers of frames, and the stage that sends them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from softroce_ext.port.batch import Batch


@dataclass(slots=True)
class PortCounters:
    """Frames and bytes of one port, by the names of the NIC's counters."""

    tx_packets: int = 0
    tx_bytes: int = 0
    rx_packets: int = 0
    rx_bytes: int = 0
    tx_busy: int = 0
    """Times that the socket was full."""
    tx_errors: int = 0
    """Frames that the interface did not take (it is down, or they are too long for it)."""
    loopback_lost: int = 0
    """Frames to this NIC itself that found the loopback queue full."""


class FrameObserver(Protocol):
    """Sees every frame that passes the port, in both directions; a capture is one."""

    def write(self, frames: Iterable[memoryview]) -> None:
        """Frames were received, or are being sent; they are valid during the call only."""

    def flush(self) -> None:
        """The NIC is idle: finish what was put off."""


class Egress(Protocol):
    """The stage that takes built frames from the port: the interface's socket, or an impaired link before it."""

    def send(self, batch: Batch, first: int, end: int) -> int:
        """HOT. Take the frames in slots `first` up to `end`; returns the first slot that was not taken."""

    def advance(self) -> None:
        """HOT. Send what the stage held back until now."""

    def next_time(self) -> float | None:
        """When `advance` has something to send (CLOCK_MONOTONIC), or None."""
