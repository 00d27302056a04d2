"""What all services have in common: the verbs of a queue pair, and its part in the engine's loop.

The services are siblings: `rc.queue_pair`, `uc` and `ud`; `services` has the table of them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from softroce_ext.transport import states
from softroce_ext.transport.completion import WorkQueues
from softroce_ext.transport.interfaces import (
    CompletionQueue,
    EventSink,
    Memory,
    ProtectionDomain,
    ReceiveQueue,
    SendQueue,
)
from softroce_ext.transport.state.movement import STOPPED_STATES, MovementEvent
from softroce_ext.transport.state.queue_pair import QueuePairState
from softroce_ext.transport.states import InvalidTransition
from softroce_ext.transport.verbs import QpState
from softroce_ext.wire.frame import Packet
from softroce_ext.wire.path import Path

if TYPE_CHECKING:
    from softroce_ext.transport.engine import Engine, EngineConfig

_ERR = int(QpState.ERR)
_SENDING = frozenset(map(int, (QpState.RTS, QpState.SQD)))


class QueuePair(WorkQueues):
    """One queue pair. Make it by `services.make_queue_pair`, `engine.add_qp(qp)`, then `modify` it through its states.

    Everything that the protocol remembers is in `state`. The other fields are handed in, follow from it, or may be lost
    at any time: caches of a batch, the place in the engine's lists.
    """

    __slots__ = ("capability", "config", "write_target")

    config: EngineConfig

    service: ClassVar[int]
    """The opcodes' top three bits."""
    ack_request: ClassVar[int] = 0
    """What a message's last packet says in BTH byte 8; 0 for a service without acknowledgements."""

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
        self.capability = 0
        """What each of its packets announces in BTH byte 8."""
        self.write_target: tuple[Memory, int] | None = None
        """Of the WRITE in progress, once its key was checked in this batch: memory, and local minus remote address."""

    # -- what the device calls -------------------------------------------------------------------------------------

    def modify(self, attributes: Mapping[str, Any]) -> None:
        """ibv_modify_qp: all or nothing. Keys: `states.ATTRIBUTES`. Raises InvalidTransition.

        Completions that a move to ERR flushes are pushed before it returns. A move to RESET forgets all protocol state;
        emptying the queues is the caller's part.
        """
        own, sender = self.attributes, self.sender
        target = states.check(own.state, attributes, own.qp_type)
        if sender.sq_draining and "qp_state" in attributes and target != QpState.ERR:
            raise InvalidTransition("the send queue is still draining: wait for SQ_DRAINED")
        if target == QpState.RESET:
            self.reset()
            return
        if target == QpState.ERR:
            if own.state != QpState.ERR:
                self.enter_error(None, None)
                self.receiver.drop_reads()
            self.engine.publish()
            return
        before = own.state
        own.update(states.stored(attributes), target)
        if target == QpState.RTR and before == QpState.INIT:
            self.receiver.start(own.rq_psn)
        if target == QpState.RTS and before == QpState.RTR:
            sender.start(own)
        if target == QpState.SQD and before == QpState.RTS:
            sender.begin_draining()
            self.check_drained()
        self.attributes_changed()
        self.make_ready()

    def stop(self) -> None:
        """Freeze: nothing is sent and nothing is taken until `resume`."""
        self.movement.handle(MovementEvent.STOP)

    def resume(self, path: Path | None = None) -> None:
        """Run again, over `path` (None: the path it has)."""
        if path is not None:
            self.state.move_to(path)
        self.movement.handle(MovementEvent.RESUME_SILENTLY)
        self.make_ready()

    @property
    def resume_settled(self) -> bool:
        """Whether there is no answer of the peer to wait for after `resume`."""
        return True

    # -- what the engine calls -------------------------------------------------------------------------------------

    def attach(self, engine: Engine) -> None:
        """The engine takes the queue pair in."""
        self.engine = engine
        self.config = engine.config
        self.counters = engine.counters
        self.make_ready()

    @abstractmethod
    def receive(self, packet: Packet, now: float) -> None:
        """HOT. Take a packet that names this queue pair."""

    def end_of_batch(self) -> None:
        """HOT. The batch's writes are in memory."""
        self.touched = False
        self.forget_targets()
        self.make_ready()

    def on_timer(self, now: float) -> None:
        """The time of its entry in the timer heap has come."""

    def release_held(self, now: float) -> bool:
        """Receive the packets that waited for answers to leave; False: they must wait longer."""
        return False

    def forget_held(self) -> None:
        """Drop the packets that wait for answers to leave."""

    # -- what the services share -----------------------------------------------------------------------------------

    def forget_targets(self) -> None:
        """Resolved keys are good for one batch only: the application may deregister between batches."""
        self.write_target = None
        self.recv_segments = None

    def attributes_changed(self) -> None:
        """A modify was accepted: derive what follows from the attributes."""

    def reset(self) -> None:
        """To RESET: forget everything but what the queue pair was created with."""
        self.state.reset()
        self.forget_targets()

    def no_receive(self, psn: int) -> None:
        """A message that begins with `psn` finds no receive."""
        self.counters["dropped_no_receive"] += 1

    def may_send(self) -> bool:
        """The beginning of an unreliable service's turn: whether it may send. In ERR what is posted is flushed."""
        state = self.attributes.state
        self.more = False
        if state == _ERR:
            self.flush()
        return state in _SENDING and self.movement.state not in STOPPED_STATES
