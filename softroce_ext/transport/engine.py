"""The engine: all queue pairs of one NIC, fed with frames and time, asked for frames and the next time."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Protocol

from softroce_ext.transport.completion import PendingCompletion, WorkQueues
from softroce_ext.transport.gsi import Gsi
from softroce_ext.transport.interfaces import FrameSink, Memory, MemoryFault, Observer
from softroce_ext.transport.queue_pair import QueuePair
from softroce_ext.transport.verbs import QpState, WcOpcode, WcStatus
from softroce_ext.wire.frame import Packet, Path, parse
from softroce_ext.wire.headers import GSI_QPN, MULTICAST_QPN

V4_MAPPED = bytes(10) + b"\xff\xff"
"""What precedes an IPv4 address in a GID."""


class Turn(Protocol):
    """What gets turns to send: a queue pair, or QP1."""

    ready: bool
    more: bool

    @property
    def qpn(self) -> int: ...

    def transmit(self, now: float, sink: FrameSink, budget: int) -> int: ...
    def make_ready(self) -> None: ...


@dataclass(slots=True)
class EngineConfig:
    """Constants of the transport; where rxe has one, its value."""

    migros: bool = True
    """Announce and use the migration extension; without it the packets are those of rxe."""
    window: int = 128
    """Unacknowledged PSNs that a requester may have outstanding (a RESUME is believed this far behind)."""
    packets_per_ackreq: int = 66
    """AckReq on every n-th packet of a long message (and on every message's last)."""
    retry_read_gaps: bool = True
    """Ask for a READ's rest as soon as a response is missing (IBA: an implied NAK). rxe waits for its timer."""
    quantum: int = 32
    """Frames that one queue pair may send before the next one gets its turn; also packets per memory read."""
    minimum_ack_timeout: float = 0.008
    """Seconds; shorter local ACK timeouts are raised to it (rxe: its timer's granularity)."""
    ack_patience: float = 0.5
    """Seconds. A local ACK timeout that turns out to be shorter than the answers take is doubled, up to four times (IBA
    9.7.6.1.3 wants it between T and 4 T) but not above this. rxe always waits T: a peer that is slow because its
    processors are busy then gets whole windows of retransmissions, which make it slower still."""
    pause_limit: float = 60.0
    """Seconds that a queue pair stays Paused without a RESUME before ordinary retransmission starts again."""
    stale_stop_limit: float = 1.0
    """Seconds after a RESUME during which a NAK_STOPPED may be an old one that the RESUME has overtaken."""
    stale_stop_pause: float = 0.05
    """Seconds that such a NAK_STOPPED pauses."""
    resume_interval: float = 0.02
    """Seconds until an unanswered RESUME is sent again; doubles up to `resume_interval_limit`."""
    resume_interval_limit: float = 1.0
    resume_limit: float = 60.0
    """Seconds after which an unanswered RESUME makes the queue pair fail (QP_FATAL)."""


_RECEIVE_OPCODES = int(WcOpcode.RECV)
"""Opcodes of completions from here on are of receives."""
_READ_AND_ATOMICS = frozenset(map(int, (WcOpcode.RDMA_READ, WcOpcode.COMP_SWAP, WcOpcode.FETCH_ADD)))


class Engine:
    """All queue pairs of one NIC. Not re-entrant; the caller's loop is:

    receive(…) for each frame of a batch, end_of_batch(now), ring(qp) for doorbells, on_timer(now) when next_timer() has
    come (after what was received, so that an ACK that is already here counts), frames_to_send(now, sink) until it
    returns 0.
    """

    def __init__(self, config: EngineConfig | None = None) -> None:
        self.config = config or EngineConfig()
        self.window = self.config.window
        """The window in force, at least 2; the caller may lower it and raise it again."""
        self.counters: dict[str, int] = defaultdict(int)
        """Counts by name, rxe's hw_counters names where they exist; callers may add their own."""
        self.qps: dict[int, QueuePair] = {}
        self.port_mtu = 4096
        """Bytes of the longest datagram: the port's active MTU, which the caller sets."""
        self.peer_moved: Callable[[int, bytes, Path], None] = lambda _qpn, _before, _path: None
        """Called (remote QPN, its address before, new path) when a RESUME has come from another address."""
        self.multicast: dict[bytes, list[QueuePair]] = {}
        """UD queue pairs by the GID (16 bytes) of the groups that they are in; the caller keeps it."""
        self.ready: deque[Turn] = deque()
        """Queue pairs that may have something to send, in turn."""
        self.gsi = Gsi(self.counters, self.ready)
        """QP1."""
        self.touched: list[QueuePair] = []
        """Queue pairs that received something in this batch."""
        self.holding: list[QueuePair] = []
        """Queue pairs of which received packets wait for earlier READs to be answered."""
        self.held = 0
        """Those packets."""
        self.written: dict[int, tuple[Memory, dict[WorkQueues, bool]]] = {}
        """Memories with unflushed writes, by identity; whose they are, and whether a responder's are among them."""
        self.completions: list[PendingCompletion] = []
        self.observer: Observer | None = None
        """What follows this engine's work."""
        self._timers: list[tuple[float, int]] = []

    def add_qp(self, qp: QueuePair) -> None:
        """Take a queue pair in. Raises ValueError when its number is taken."""
        qpn = qp.attributes.qpn
        if qpn in self.qps:
            raise ValueError(f"queue pair {qpn} exists already")
        self.qps[qpn] = qp
        qp.attach(self)
        if self.observer is not None:
            self.observer.changed((qpn,))

    def remove_qp(self, qpn: int) -> None:
        """Forget a queue pair without a packet or a completion (destroy, discard). Unknown numbers are ignored."""
        qp = self.qps.pop(qpn, None)
        if qp is None:
            return
        if qp.ready:
            qp.ready = False
            self.ready.remove(qp)
        if qp.touched:
            qp.touched = False
            self.touched.remove(qp)
        qp.forget_held()
        self.completions = [entry for entry in self.completions if entry[0] is not qp]
        if self.observer is not None:
            self.observer.removed(qpn)

    def receive(self, frame: memoryview, now: float) -> None:
        """HOT. Take one received Ethernet frame; never raises for what is in it.

        The frame's buffer must stay valid until `end_of_batch` has returned.
        """
        packet = parse(frame)
        counters = self.counters
        observer = self.observer
        if isinstance(packet, str):
            counters["refused_" + packet] += 1
            if observer is not None:
                observer.refused(packet, len(frame))
            return
        counters["rcvd_pkts"] += 1
        if observer is not None:
            observer.receiving(packet)
        qp = self.qps.get(packet.destination_qpn)
        if qp is None:
            self._special(packet, now)
        else:
            qp.receive(packet, now)
        if observer is not None:
            observer.received(packet)

    def _special(self, packet: Packet, now: float) -> None:
        """A packet for no queue pair of a program: for QP1, for a multicast group, or for none."""
        number = packet.destination_qpn
        if number == GSI_QPN:
            self.gsi.receive(packet)
            return
        members: list[QueuePair] = []
        if number == MULTICAST_QPN:
            group = packet.destination_ip
            members = self.multicast.get(group if len(group) == 16 else V4_MAPPED + group, members)
        if not members:
            self.counters["refused_qpn"] += 1
        for qp in members:
            qp.receive(packet, now)

    def end_of_batch(self, now: float) -> None:
        """Flush memory, publish the batch's completions, queue its (coalesced) ACKs, then hand on QP1's datagrams."""
        if self.written:
            written, self.written = self.written, {}
            for memory, writers in written.values():
                try:
                    memory.flush()
                except MemoryFault:
                    for qp, as_responder in writers.items():
                        self._fail_completions(qp)
                        qp.memory_gone(as_responder)
        touched, self.touched = self.touched, []
        for qp in touched:
            qp.end_of_batch()
        if self.completions:
            self.publish()
        if self.gsi.received:
            self.gsi.end_of_batch(now)
        if self.observer is not None:  # without anything received all may have changed: programs were held
            self.observer.changed([qp.attributes.qpn for qp in touched] or list(self.qps))

    def ring(self, qp: QueuePair) -> None:
        """Doorbell: the application may have posted send work requests (in ERR: posted work of any kind is flushed)."""
        qp.make_ready()

    def flush_failed(self) -> None:
        """Return what was posted to receive queues after their queue pair went to ERR: receives ring no doorbell.

        Linux rxe never returns it, and a program that waits for it hangs.
        """
        for qp in self.qps.values():
            if qp.attributes.state == QpState.ERR and not qp.movement.stopped:
                qp.make_ready()

    def on_timer(self, now: float) -> None:
        """Let every timer that is due act; completions it causes are published before it returns."""
        timers = self._timers
        acted = []
        while timers and timers[0][0] <= now:
            when, qpn = heappop(timers)
            qp = self.qps.get(qpn)
            if qp is not None and qp.heap_at == when:  # otherwise an earlier entry has replaced this one
                qp.on_timer(now)
                acted.append(qpn)
        if self.completions:
            self.publish()
        if acted and self.observer is not None:
            self.observer.changed(acted)

    def next_timer(self) -> float | None:
        """When `on_timer` should be called at the latest (seconds, the caller's clock), or None. May be early."""
        return self._timers[0][0] if self._timers else None

    def frames_to_send(self, now: float, sink: FrameSink) -> int:
        """HOT. Fill `sink` from the queue pairs in turn; returns the number of frames added, 0 when nothing is left.

        Completions of requests that fail on their way out are published before it returns.
        """
        observer = self.observer
        if observer is not None:
            ready = [turn.qpn for turn in self.ready]
            observer.changed(ready)
        total = self._turns(now, sink)
        while self.holding and self._release_held(now):
            total += self._turns(now, sink)
        if total:
            self.counters["sent_pkts"] += total
        if observer is not None:
            observer.changed(ready)
        return total

    def _release_held(self, now: float) -> bool:
        """Receive what waited for answers that have left now, as a batch of its own; whether there was any."""
        released = [qp for qp in list(self.holding) if qp.release_held(now)]
        if released:
            self.end_of_batch(now)
        return bool(released)

    def _turns(self, now: float, sink: FrameSink) -> int:
        """HOT. The work of `frames_to_send`, except for requests that waited for answers to leave."""
        ready, observer = self.ready, self.observer
        quantum = self.config.quantum
        room = sink.room
        total = 0
        idle = len(ready) + 1  # turns that may send nothing and leave more (flushing, local operations)
        while ready and room > 0 and idle > 0:
            qp = ready.popleft()
            qp.ready = False
            way = sink if observer is None else observer.sink(qp.qpn, sink)
            sent = qp.transmit(now, way, quantum if quantum < room else room)
            total += sent
            room -= sent
            if qp.more:
                qp.make_ready()
                idle -= not sent
        if self.completions:
            self.publish()
        return total

    def has_work(self) -> bool:
        """Whether `frames_to_send` would (probably) add frames now."""
        return bool(self.ready)

    def publish(self) -> None:
        """Push the completions that were held back until memory was flushed."""
        while self.completions:
            completions, self.completions = self.completions, []
            if self.observer is not None:
                for qp, _, completion, _, _ in completions:
                    self.observer.completed(qp.qpn, completion)
            for qp, cq, completion, psn, msn in completions:
                if (
                    not cq.push(completion)
                    and completion.opcode >= _RECEIVE_OPCODES
                    and qp.attributes.state != QpState.ERR
                ):
                    # The message was received and its completion is lost (IBA 11.6.3.4; as rxe): it must not be
                    # acknowledged. Lost completions of requests leave their queue pair as it is.
                    qp.completion_lost(psn, msn)

    def push_timer(self, when: float, qp: WorkQueues) -> None:
        """Have `qp.on_timer` called at `when`."""
        timers = self._timers
        if len(timers) > 64 + 4 * len(self.qps):
            # Entries that earlier ones replaced, or whose queue pair was removed, would stay here until their time.
            qps = self.qps
            timers[:] = {entry for entry in timers if (live := qps.get(entry[1])) and live.heap_at == entry[0]}
            heapify(timers)
        heappush(timers, (when, qp.attributes.qpn))

    def _fail_completions(self, qp: WorkQueues) -> None:
        """What this batch's data would have completed fails, since they could not be stored."""
        failed: set[bool] = set()
        completions, self.completions = self.completions, []
        for owner, cq, completion, psn, msn in completions:
            if owner is qp and completion.status == WcStatus.SUCCESS:
                received = completion.opcode >= _RECEIVE_OPCODES
                if received in failed:
                    completion = completion._replace(status=int(WcStatus.WR_FLUSH_ERR))
                elif received or completion.opcode in _READ_AND_ATOMICS:
                    failed.add(received)
                    completion = completion._replace(status=int(WcStatus.LOC_PROT_ERR))
            self.completions.append((owner, cq, completion, psn, msn))
