"""The services: which class of queue pair gives which."""

from __future__ import annotations

from typing import Final

from softroce_ext.transport.interfaces import (
    CompletionQueue,
    EventSink,
    ProtectionDomain,
    ReceiveQueue,
    SendQueue,
)
from softroce_ext.transport.queue_pair import QueuePair
from softroce_ext.transport.rc.queue_pair import RcQueuePair
from softroce_ext.transport.state.queue_pair import QueuePairState
from softroce_ext.transport.uc import UcQueuePair
from softroce_ext.transport.ud import UdQueuePair
from softroce_ext.transport.verbs import QpType

SERVICES: Final[dict[int, type[QueuePair]]] = {
    QpType.RC: RcQueuePair,
    QpType.UC: UcQueuePair,
    QpType.UD: UdQueuePair,
}


def make_queue_pair(
    state: QueuePairState,
    send_queue: SendQueue,
    receive_queue: ReceiveQueue,
    send_cq: CompletionQueue,
    recv_cq: CompletionQueue,
    pd: ProtectionDomain,
    events: EventSink,
) -> QueuePair:
    """A queue pair of the type that `state` says, new or restored. Raises KeyError for a type that is not a service.

    A restored queue pair's queues must have the indices of the dump.
    """
    service = SERVICES[state.attributes.qp_type]
    return service(state, send_queue, receive_queue, send_cq, recv_cq, pd, events)
