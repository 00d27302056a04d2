"""The stages that send frames for the port.

Invariants: a frame that the socket cannot take now is not lost and not sent twice; a frame that the interface refuses
is lost, and counted; an impaired link takes every frame.
"""

from __future__ import annotations

import errno
import os
from types import SimpleNamespace
from typing import Any

import pytest

from softroce_ext.port import egress
from softroce_ext.port.batch import Batch
from softroce_ext.port.egress import ImpairedEgress, SocketEgress
from softroce_ext.port.impairment import Impairment, ImpairmentSpec
from softroce_ext.port.interfaces import PortCounters


class Kernel:
    """sendmmsg as a script: how many frames it takes at each call, or an errno."""

    def __init__(self, *answers: int) -> None:
        self.answers = list(answers)
        self.sent: list[int] = []
        self.errno = 0

    def send(self, _fd: int, first: int, end: int) -> int:
        answer = self.answers.pop(0)
        if answer < 0:
            self.errno = -answer
            return -1
        self.sent += range(first, min(first + answer, end))
        return min(answer, end - first)


def send(kernel: Kernel, monkeypatch: pytest.MonkeyPatch, first: int, end: int) -> tuple[int, PortCounters]:
    counters = PortCounters()
    monkeypatch.setattr(egress.ctypes, "get_errno", lambda: kernel.errno)
    sock: Any = SimpleNamespace(fileno=lambda: 3)
    batch: Any = kernel
    return SocketEgress(sock, counters).send(batch, first, end), counters


@pytest.mark.parametrize("full", [errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM])
def test_a_full_socket_is_back_pressure(monkeypatch: pytest.MonkeyPatch, full: int) -> None:
    kernel = Kernel(5, -full, 3, -errno.EINTR, 4)
    left, counters = send(kernel, monkeypatch, 0, 12)
    assert (left, counters.tx_busy, counters.tx_errors) == (5, 1, 0)
    left, counters = send(kernel, monkeypatch, left, 12)
    assert (left, counters.tx_busy, counters.tx_errors) == (12, 0, 0)
    assert kernel.sent == list(range(12))


def test_a_frame_that_the_interface_refuses_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(2, -errno.ENETDOWN, -errno.EMSGSIZE, 4)
    left, counters = send(kernel, monkeypatch, 0, 8)
    assert (left, counters.tx_errors) == (8, 2)
    assert kernel.sent == [0, 1, 4, 5, 6, 7]


def test_an_impaired_link_takes_every_frame() -> None:
    """They come out when the link delivers them, and a socket that does not take one loses it."""
    now = 0.0
    sent: list[bytes] = []

    def take(frame: bytes) -> None:
        if frame == b"frame 2":
            raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))
        sent.append(frame)

    counters = PortCounters()
    impairment = Impairment(ImpairmentSpec(delay=0.5), 0, lambda: now)
    sock: Any = SimpleNamespace(send=take)
    stage = ImpairedEgress(impairment, sock, counters)
    batch = Batch()
    for slot in range(4):
        frame = b"frame %d" % slot
        batch.views[slot][: len(frame)] = frame
        batch.lengths[2 * slot + 1] = len(frame)
    assert stage.send(batch, 0, 4) == 4
    assert sent == [] and stage.next_time() == 0.5
    now = 0.5
    stage.advance()
    assert sent == [b"frame 0", b"frame 1", b"frame 3"] and counters.tx_busy == 1
    assert stage.next_time() is None
