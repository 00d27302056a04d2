"""Asynchronous events: from the protocol, the port and the GID table to the programs that they concern."""

from __future__ import annotations

from typing import Final, Protocol

from softroce_ext.device.addressing import PORT
from softroce_ext.device.user_context import UserContext
from softroce_ext.device.user_queue_pair import UserQueuePair
from softroce_ext.transport.verbs import QpEvent

ENTERS_ERR: Final = frozenset({QpEvent.QP_FATAL, QpEvent.QP_REQ_ERR, QpEvent.QP_ACCESS_ERR})
"""Events that say that the queue pair is in ERR."""


class Tables(Protocol):
    """What is on the device (`adapter.Adapter`)."""

    contexts: dict[str, UserContext]
    queue_pairs: dict[int, UserQueuePair]


class Events:
    """Delivers events to programs (transport.interfaces.EventSink)."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def qp_event(self, qpn: int, event: int) -> None:
        """transport.interfaces.EventSink: an event of queue pair `qpn`."""
        qp = self._tables.queue_pairs.get(qpn)
        if qp is not None:
            if event in ENTERS_ERR:
                qp.context.channel.may_post(qp.handle, True)
            if qp.context.post_async(qp.user_handle, event):
                qp.async_events += 1

    def owner_gone(self, qpn: int) -> bool:
        """transport.interfaces.EventSink: whether the process that owns queue pair `qpn` has ended."""
        qp = self._tables.queue_pairs.get(qpn)
        return qp is not None and qp.context.memory.gone()

    def port_event(self, event: QpEvent) -> None:
        """Report an event of the port to every program that is not held (IBA 11.6.3.2)."""
        for context in self._tables.contexts.values():
            if not context.held:
                context.post_async(PORT, event)
