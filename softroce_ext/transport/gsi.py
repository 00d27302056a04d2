"""QP1, the general services interface: management datagrams (MADs) of 256 bytes, for the connection manager.

No program owns it: its user hands MADs in (`send`) and takes them (`on_mad`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from softroce_ext.transport.interfaces import FrameSink
from softroce_ext.wire import opcodes as op
from softroce_ext.wire.frame import Packet, datagram_source_port
from softroce_ext.wire.headers import (
    ACK_REQ,
    BTH_DETH,
    DETH,
    GSI_QKEY,
    GSI_QPN,
    PKEY_DEFAULT,
    PKEY_MASK,
    PKEY_PARTITION,
    PSN_MASK,
)
from softroce_ext.wire.path import Path

MAD_BYTES = 256
MAX_WAITING = 4096
"""MADs that may wait to be sent; their senders repeat them, so more are dropped."""

_FIRST_WORD = (op.UD | op.SEND_ONLY) << 24 | PKEY_DEFAULT
_SOURCE_PORT = datagram_source_port(GSI_QPN)

OnMad = Callable[[Packet, int, memoryview, float], None]
"""packet (its addresses and MAC are the sender's), source QPN, MAD (valid during the call only), now."""


class Gsi:
    """QP1 of an engine."""

    qpn = GSI_QPN

    def __init__(self, counters: dict[str, int], ready: deque[Any]) -> None:
        """counters, ready: the engine's."""
        self._counters = counters
        self._ready = ready
        self._waiting: deque[tuple[Path, int, bytes]] = deque()
        self.received: list[tuple[Packet, int]] = []
        """What was received in this batch, with the source QPN."""
        self._psn = 0
        self.ready = False
        self.more = False
        self.on_mad: OnMad | None = None
        """Takes each valid MAD; while it is None they are counted as refused."""

    def send(self, path: Path, mad: bytes, destination_qpn: int = GSI_QPN) -> None:
        """Queue one MAD of 256 bytes for `destination_qpn` at the end of `path` (whose UDP source port is not used)."""
        if len(mad) != MAD_BYTES:
            raise ValueError(f"a MAD has {MAD_BYTES} bytes, not {len(mad)}")
        if len(self._waiting) >= MAX_WAITING:
            self._counters["dropped_mad"] += 1
            return
        if path.udp_source_port != _SOURCE_PORT:
            path = path.replace(udp_source_port=_SOURCE_PORT)
        self._waiting.append((path, destination_qpn, bytes(mad)))
        self.make_ready()

    def receive(self, packet: Packet) -> None:
        """Take a packet for QP1 until the end of its batch; never raises for what is in it."""
        counters = self._counters
        if packet.opcode != op.UD | op.SEND_ONLY:
            counters["refused_state"] += 1
        elif packet.first_word & PKEY_MASK != PKEY_PARTITION:
            counters["refused_pkey"] += 1
        else:
            qkey, source = DETH.unpack_from(packet.raw, packet.headers_at)
            if qkey != GSI_QKEY:
                counters["refused_qkey"] += 1
            elif len(packet.payload) != MAD_BYTES or self.on_mad is None:
                counters["refused_mad"] += 1
            else:
                self.received.append((packet, source & 0xFFFFFF))

    def end_of_batch(self, now: float) -> None:
        """Hand on what was received (what `on_mad` raises passes through).

        Only now: the data before a DREQ, with their completions, are there when a program is told that the connection
        has ended. In Linux a work queue sees to that.
        """
        received, self.received = self.received, []
        for packet, source in received:
            if self.on_mad is not None:
                self.on_mad(packet, source, packet.payload, now)

    def transmit(self, now: float, sink: FrameSink, budget: int) -> int:
        """Send up to `budget` MADs; returns how many."""
        sent = 0
        while self._waiting and sent < budget:
            path, destination, mad = self._waiting.popleft()
            # rxe sets AckReq in its MADs; no one answers it.
            third = ACK_REQ << 24 | self._psn
            sink.add(path, BTH_DETH.pack(_FIRST_WORD, destination, third, GSI_QKEY, GSI_QPN), mad, 0)
            self._psn = self._psn + 1 & PSN_MASK
            sent += 1
        self.more = bool(self._waiting)
        return sent

    def make_ready(self) -> None:
        """Have the engine give QP1 a turn to send."""
        if not self.ready:
            self.ready = True
            self._ready.append(self)
