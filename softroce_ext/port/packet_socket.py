"""The port: frames in and out of an interface, in batches, through AF_PACKET sockets.

No frame is lost here that the kernel did not lose: a full socket is back-pressure, and the frames wait. Frames to an
address of this NIC itself are looped back inside, because a packet socket never sees them come back.

The port only knows two kinds of neighbours (`interfaces`): observers, which see every frame, and the egress stage,
which takes what is sent.
"""

from __future__ import annotations

import socket
from collections import deque
from typing import Final

from softroce_ext.port.batch import BATCH, Batch
from softroce_ext.port.egress import ImpairedEgress, SocketEgress
from softroce_ext.port.impairment import Impairment
from softroce_ext.port.interfaces import Egress, FrameObserver, PortCounters
from softroce_ext.port.sockets import RoceSockets, hardware
from softroce_ext.wire.frame import Buffer, Path, build

LOOPBACK_LIMIT: Final = 8192
"""Frames to this NIC's own addresses that may wait inside."""


class Port:
    """A RoCEv2 port on interface `name`; it is the engine's frame sink as well (`room`, `add`)."""

    def __init__(self, name: str, impairment: Impairment | None = None) -> None:
        """impairment: a bad link that everything sent goes through.

        Raises OSError when the interface does not exist or packet sockets are not allowed.
        """
        self.name = name
        self.index = socket.if_nametoindex(name)
        self.mac, self.mtu = hardware(name)
        self.counters = PortCounters()
        self.observers: list[FrameObserver] = []
        self.own: set[bytes] = set()
        """IP addresses of this NIC, and of the multicast groups with members here; frames to them are looped back."""
        self._groups: set[bytes] = set()
        self.loopback: deque[bytes] = deque()
        self.room = BATCH
        self._out, self._in, self._in6 = Batch(), Batch(), Batch()
        self._filled = self._sent = 0
        self._out_views = self._out.views
        self._out_lengths = self._out.lengths
        self._sockets = RoceSockets(name, self.index)
        ipv4 = self._sockets.ipv4
        self._fd, self._fd6 = ipv4.fileno(), self._sockets.ipv6.fileno()
        self._egress: Egress = (
            SocketEgress(ipv4, self.counters) if impairment is None else ImpairedEgress(impairment, ipv4, self.counters)
        )
        self.advance = self._egress.advance
        """HOT. Send what an impaired link has held back until now."""
        self.next_time = self._egress.next_time
        """When `advance` has something to send, or None."""

    def set_addresses(self, own: set[bytes]) -> None:
        """Set the IP addresses of this NIC."""
        self.own = own | self._groups

    def set_group(self, address: bytes, member: bool) -> None:
        """Whether frames of a multicast group are wanted."""
        self._sockets.set_group(address, member)
        for addresses in (self._groups, self.own):
            (addresses.add if member else addresses.discard)(address)

    def fileno(self) -> int:
        """The descriptor on which IPv4 frames arrive, for the event loop."""
        return self._fd

    def fileno6(self) -> int:
        """The descriptor on which IPv6 frames arrive, for the event loop."""
        return self._fd6

    # -- receiving -----------------------------------------------------------------------------------------------

    def receive(self) -> list[memoryview]:
        """HOT. The IPv4 frames that have arrived, at most BATCH; valid until the next call."""
        return self._received(self._in.receive(self._fd))

    def receive6(self) -> list[memoryview]:
        """HOT. The IPv6 frames that have arrived, at most BATCH; valid until the next call."""
        return self._received(self._in6.receive(self._fd6))

    def _received(self, frames: list[memoryview]) -> list[memoryview]:
        if frames:
            counters = self.counters
            counters.rx_packets += len(frames)
            counters.rx_bytes += sum(map(len, frames))
            for observer in self.observers:
                observer.write(frames)
        return frames

    # -- sending -------------------------------------------------------------------------------------------------

    def add(self, path: Path, headers: bytes, payload: Buffer, pad: int) -> None:
        """HOT. transport.engine.FrameSink: build one frame into the next slot."""
        ip_id = path.ip_id
        path.ip_id = (ip_id + 1) & 0xFFFF
        slot = self._filled
        view = self._out_views[slot]
        length = build(path, ip_id, headers, payload, pad, view)
        if path.destination_ip in self.own:
            if len(self.loopback) < LOOPBACK_LIMIT:
                self.loopback.append(bytes(view[:length]))
            else:
                self.counters.loopback_lost += 1  # only datagrams come here without end: connections have a window
            if path.destination_ip not in self._groups:
                return
        self._out_lengths[2 * slot + 1] = length
        self._filled = slot + 1
        self.room = BATCH - 1 - slot

    def flush(self) -> bool:
        """HOT. Hand the built frames to the egress; False when it does not take them all now (try again later)."""
        filled, sent = self._filled, self._sent
        if filled == sent:
            return True
        sent = self._egress.send(self._out, sent, filled)
        if sent < filled:
            self._sent = sent
            return False
        counters = self.counters
        counters.tx_packets += filled
        counters.tx_bytes += sum(self._out_lengths[1 : 2 * filled : 2])
        if self.observers:
            frames = self._out.frames(filled)
            for observer in self.observers:
                observer.write(frames)
        self._filled = self._sent = 0
        self.room = BATCH
        return True

    @property
    def unsent(self) -> bool:
        """Whether built frames wait for the egress to take them."""
        return self._filled != self._sent

    def flush_observers(self) -> None:
        """The NIC is idle: let the observers finish what they put off."""
        for observer in self.observers:
            observer.flush()

    def close(self) -> None:
        """Close every socket."""
        self._sockets.close()
