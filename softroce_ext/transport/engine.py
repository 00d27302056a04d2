"""The engine: all queue pairs of one NIC, fed with frames and time, asked for frames and the next time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from softroce_ext.transport.qp import QueuePair
from softroce_ext.wire.frame import Buffer, Path


class FrameSink(Protocol):
    """Where frames to send go: the port's arena, or a list in a test."""

    room: int
    """Frames that still fit; `add` lowers it."""

    def add(self, path: Path, headers: bytes, payload: Buffer, pad: int) -> None:
        """HOT. Build one frame (`wire.frame.build`, taking and advancing `path.ip_id`).

        headers: BTH and extended headers; payload: may be empty, valid only during this call; pad: 0..3.
        """


@dataclass(slots=True)
class EngineConfig:
    """Constants of the transport, all with rxe's values."""

    migros: bool = True
    """Announce and use the migration extension; without it the packets are those of rxe."""
    window: int = 128
    """Unacknowledged PSNs that a requester may have on the way."""
    packets_per_ackreq: int = 66
    """AckReq on every n-th packet of a long message (and on every message's last)."""
    quantum: int = 32
    """Frames that one queue pair may send before the next one gets its turn; also packets per memory read."""
    minimum_ack_timeout: float = 0.008
    """Seconds; shorter local ACK timeouts are raised to it (rxe: its timer's granularity)."""
    pause_limit: float = 60.0
    """Seconds that a partner stays Paused without a RESUME before ordinary retransmission starts again."""
    resume_interval: float = 0.02
    """Seconds until an unanswered RESUME is sent again; doubles up to `resume_interval_limit`."""
    resume_interval_limit: float = 1.0
    resume_limit: float = 60.0
    """Seconds after which an unanswered RESUME makes the queue pair fail (QP_FATAL)."""


class Engine:
    """All queue pairs of one NIC. Not re-entrant; the caller's loop is:

    receive(…) for each frame of a batch, end_of_batch(now), ring(qp) for doorbells, on_timer(now) when next_timer() has
    come, frames_to_send(now, sink) until it returns 0.
    """

    counters: dict[str, int]
    """Plain counters by name; rxe's hw_counters names where they exist. Unknown keys may be added by the caller."""
    qps: dict[int, QueuePair]

    def __init__(self, config: EngineConfig | None = None) -> None:
        raise NotImplementedError

    def add_qp(self, qp: QueuePair) -> None:
        """Take a queue pair in. Raises ValueError when its number is taken."""
        raise NotImplementedError

    def remove_qp(self, qpn: int) -> None:
        """Forget a queue pair without a packet or a completion (destroy, discard). Unknown numbers are ignored."""
        raise NotImplementedError

    def receive(self, frame: memoryview, now: float) -> None:
        """HOT. Take one received Ethernet frame; never raises for what is in it.

        The frame's buffer must stay valid until `end_of_batch` has returned.
        """
        raise NotImplementedError

    def end_of_batch(self, now: float) -> None:
        """Flush memory, then publish the batch's completions and queue its (coalesced) ACKs."""
        raise NotImplementedError

    def ring(self, qp: QueuePair) -> None:
        """Doorbell: the application may have posted send work requests (in ERR: posted work of any kind is flushed)."""
        raise NotImplementedError

    def on_timer(self, now: float) -> None:
        """Let every timer that is due act; completions it causes are published before it returns."""
        raise NotImplementedError

    def next_timer(self) -> float | None:
        """When `on_timer` should be called at the latest (seconds, the caller's clock), or None. May be early."""
        raise NotImplementedError

    def frames_to_send(self, now: float, sink: FrameSink) -> int:
        """HOT. Fill `sink` from the queue pairs in turn; returns the number of frames added, 0 when nothing is left."""
        raise NotImplementedError

    def has_work(self) -> bool:
        """Whether `frames_to_send` would (probably) add frames now."""
        raise NotImplementedError
