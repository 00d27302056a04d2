"""A queue pair: its context, and the queues, memory and path that it was handed."""

from __future__ import annotations

from typing import Any

from softroce_ext.transport.context import QpContext
from softroce_ext.transport.interfaces import (
    CompletionQueue,
    EventSink,
    ProtectionDomain,
    ReceiveQueue,
    SendQueue,
)
from softroce_ext.transport.states import InvalidTransition
from softroce_ext.wire.frame import Path

__all__ = ["InvalidTransition", "QpContext", "QueuePair"]


class QueuePair:
    """One RC queue pair. Create it, `engine.add_qp(qp)`, then `modify` it through its states."""

    __slots__ = ("context",)

    def __init__(
        self,
        context: QpContext,
        send_queue: SendQueue,
        receive_queue: ReceiveQueue,
        send_cq: CompletionQueue,
        recv_cq: CompletionQueue,
        pd: ProtectionDomain,
        path: Path | None,
        events: EventSink,
    ) -> None:
        """path: overrides `context.path` when given (after a restore: this host's MAC and the same or a new IP).

        A restored QP's queues must stand where they stood at the dump: fetched-but-not-retired WQEs are copied in the
        context (in order) and are retired, not fetched again.
        """
        raise NotImplementedError

    def modify(self, attributes: dict[str, Any]) -> None:
        """ibv_modify_qp: all or nothing. Keys: `states.ATTRIBUTES`. Raises InvalidTransition. Completions that a move to ERR flushes are pushed before it returns."""
        raise NotImplementedError

    def stop(self) -> None:
        """MigrOS Stopped: sends no request, takes no answer; requests get NAK_STOPPED (a stock partner: silence)."""
        raise NotImplementedError

    def unstop(self) -> None:
        """Leave Stopped without telling the partner; the requester goes back to the first unacknowledged PSN."""
        raise NotImplementedError

    def resume(self, path: Path | None = None) -> None:
        """Un-stop and send RESUME over `path` (None: the path it has) until it is acknowledged.

        Does nothing but un-stop when the partner is not known to speak MigrOS, or the QP is not in RTS/SQD (RTR too
        sends one: the partner may be paused).
        """
        raise NotImplementedError

    @property
    def resume_settled(self) -> bool:
        """No RESUME is waiting for an answer, or the partner answered that it is itself stopped."""
        raise NotImplementedError
