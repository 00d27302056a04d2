"""The stages that send frames: straight to the interface's socket, or through a seeded bad link before it."""

from __future__ import annotations

import ctypes
import errno
import socket
from typing import Final

from softroce_ext.port.batch import Batch
from softroce_ext.port.impairment import Impairment
from softroce_ext.port.interfaces import PortCounters

_FULL: Final = frozenset({errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM})
"""The socket takes no frame now, but will take it later."""


class SocketEgress:
    """Sends to the interface (interfaces.Egress). A full socket is back-pressure: the frames wait."""

    def __init__(self, sock: socket.socket, counters: PortCounters) -> None:
        self._fd = sock.fileno()
        self._counters = counters

    def send(self, batch: Batch, first: int, end: int) -> int:
        """HOT. interfaces.Egress."""
        while first < end:
            taken = batch.send(self._fd, first, end)
            if taken <= 0:
                code = ctypes.get_errno()
                if code == errno.EINTR:
                    continue
                if code in _FULL:
                    self._counters.tx_busy += 1
                    break
                self._counters.tx_errors += 1
                taken = 1  # the interface is down or the frame too long for it: that frame is lost, as on a cable
            first += taken
        return first

    def advance(self) -> None:
        """HOT. Nothing is held back."""

    def next_time(self) -> float | None:
        """None: nothing is held back."""
        return None


class ImpairedEgress:
    """Sends through a bad link (interfaces.Egress), which takes every frame."""

    def __init__(self, impairment: Impairment, sock: socket.socket, counters: PortCounters) -> None:
        self._impairment = impairment
        self._socket = sock
        self._counters = counters
        self.next_time = impairment.next_time

    def send(self, batch: Batch, first: int, end: int) -> int:
        """interfaces.Egress."""
        for frame in batch.frames(end)[first:]:
            self._impairment.take(bytes(frame))
        self.advance()
        return end

    def advance(self) -> None:
        """Send what the bad link delivers by now."""
        for frame in self._impairment.due():
            try:
                self._socket.send(frame)
            except OSError:
                self._counters.tx_busy += 1  # one more impairment
