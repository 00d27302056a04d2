"""What the roles of a reliable connection share: batch caches, the timer, and what follows from the attributes."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from softroce_ext.transport.interfaces import (
    CompletionQueue,
    EventSink,
    ProtectionDomain,
    ReceiveQueue,
    SendQueue,
)
from softroce_ext.transport.queue_pair import QueuePair
from softroce_ext.transport.scatter import Segment
from softroce_ext.transport.state.queue_pair import QueuePairState
from softroce_ext.transport.state.sender import SendRecord
from softroce_ext.transport.verbs import QpEvent
from softroce_ext.wire import opcodes as op
from softroce_ext.wire.headers import ACK_REQ, MIGROS_CAPABLE

if TYPE_CHECKING:
    from softroce_ext.transport.engine import Engine


class Connection(QueuePair):
    """The part of an RC queue pair that its roles work on."""

    __slots__ = (
        "ack_pending",
        "ack_timeout",
        "batch_psn",
        "held",
        "read_record",
        "read_segments",
    )

    service: ClassVar[int] = op.RC
    ack_request: ClassVar[int] = ACK_REQ

    def __init__(
        self,
        state: QueuePairState,
        send_queue: SendQueue,
        receive_queue: ReceiveQueue,
        send_cq: CompletionQueue,
        recv_cq: CompletionQueue,
        pd: ProtectionDomain,
        events: EventSink,
    ) -> None:
        super().__init__(state, send_queue, receive_queue, send_cq, recv_cq, pd, events)
        self.batch_psn = 0
        """What was expected when this batch began."""
        self.ack_pending = False
        """Packets of this batch are to be acknowledged."""
        self.held: list[bytes] = []
        """Frames that wait until earlier READs have been answered (`in_order`)."""
        self.read_segments: list[Segment] = []
        self.read_record: SendRecord | None = None
        """Where a READ's responses go, once it was resolved in this batch; and which READ that is."""
        self.ack_timeout: float | None = None
        """Seconds, from the attribute's timeout code; None: no timeout."""

    def attach(self, engine: Engine) -> None:
        """The engine takes the queue pair in, perhaps with deadlines of before a dump."""
        super().attach(engine)
        self.capability = MIGROS_CAPABLE if engine.config.migros else 0
        learned = self.sender.ack_timeout_now
        self.attributes_changed()
        if learned is not None and self.ack_timeout is not None:
            self.sender.set_ack_timeout(min(max(learned, self.ack_timeout), self.longest_ack_timeout(self.ack_timeout)))
        for deadline in (*self.retransmission_deadlines(), *self.movement_deadlines()):
            self.arm(deadline)

    def attributes_changed(self) -> None:
        code = self.attributes.timeout
        self.ack_timeout = max(4.096e-6 * (1 << code), self.config.minimum_ack_timeout) if code else None
        self.sender.set_ack_timeout(self.ack_timeout)

    def longest_ack_timeout(self, timeout: float) -> float:
        """What the attribute's `timeout` may be prolonged to, seconds."""
        return min(4 * timeout, max(timeout, self.config.ack_patience))

    def enter_error(self, receive_status: int | None, event: QpEvent | None) -> None:
        self.ack_pending = False
        super().enter_error(receive_status, event)

    def forget_targets(self) -> None:
        super().forget_targets()
        self.read_segments = []
        self.read_record = None

    def reset(self) -> None:
        super().reset()
        self.ack_pending = False

    def go_back(self) -> None:
        """Retransmit from the first unacknowledged PSN on."""
        self.sender.go_back()
        self.make_ready()

    # -- timers ----------------------------------------------------------------------------------------------------

    def arm(self, when: float) -> None:
        """Have `on_timer` called at `when` (or before)."""
        if self.heap_at is None or when < self.heap_at:
            self.heap_at = when
            self.engine.push_timer(when, self)

    def observe_timer(self, kind: str) -> None:
        """A timer acts now: ack, rnr, pause or resume."""
        if self.engine.observer is not None:
            self.engine.observer.timer(self.attributes.qpn, kind)

    def retransmission_deadlines(self) -> list[float]:
        """The deadlines of the sender that are set."""
        sender = self.sender
        return [when for when in (sender.rnr_deadline, sender.ack_deadline) if when is not None]

    def movement_deadlines(self) -> list[float]:
        """The deadlines of the migration that are set."""
        movement = self.movement
        return [when for when in (movement.resume_deadline, movement.pause_deadline) if when is not None]

    @property
    def speaks_migros(self) -> bool:
        """Whether both ends speak MigrOS."""
        return self.config.migros and self.movement.peer_migros
