"""One opening of the device by one process, and every object that it owns."""

from __future__ import annotations

import errno
from typing import Any, Final, TypeVar

from softroce_ext.device.completion import ASYNC_EVENT, CompletionChannel, CompletionQueue, SharedReceiveQueue
from softroce_ext.device.errors import VerbsError
from softroce_ext.device.memory import ProcessMemory
from softroce_ext.device.numbers import Handles
from softroce_ext.device.opening import Opening
from softroce_ext.device.regions import MemoryRegion, MemoryWindow, ProtectionDomain
from softroce_ext.device.shared import Channel, EventFifo
from softroce_ext.device.user_object import UserObject
from softroce_ext.device.user_queue_pair import UserQueuePair
from softroce_ext.transport.verbs import QpEvent
from softroce_ext.wire.path import address_text

_T = TypeVar("_T", bound=UserObject)

UNAFFILIATED: Final = frozenset(
    {
        QpEvent.PORT_ACTIVE,
        QpEvent.PORT_ERR,
        QpEvent.LID_CHANGE,
        QpEvent.PKEY_CHANGE,
        QpEvent.SM_CHANGE,
        QpEvent.CLIENT_REREGISTER,
        QpEvent.GID_CHANGE,
    }
)
"""Events of the port or device; their element is a port number, not a user handle."""

SWEEP_AT: Final = 16
"""Completion channels that a user context may have before a sweep removes those that the program closed."""


class UserContext(Opening):
    """What one process opened (the kernel's ib_ucontext)."""

    def __init__(
        self, identifier: str, pid: int | None, inner_pid: int, channel: Channel, memory: ProcessMemory
    ) -> None:
        super().__init__(identifier, pid, inner_pid, channel, memory)
        self.handles = Handles()
        self.objects: dict[int, UserObject] = {}
        """By handle."""
        self.comp_channels: dict[tuple[int, int], CompletionChannel] = {}
        self.async_fifo: EventFifo | None = None
        self.awake = False
        """The loop visits its queues in every round, so the program need not ring the doorbell."""
        self.sweep_at = SWEEP_AT

    def check_room(self) -> None:
        """Raise VerbsError(ENOMEM) when `add` would. To be called before the device knows anything of a new object."""
        self.handles.check()

    def add(self, item: UserObject) -> int:
        """Give `item` a handle and keep it. Returns the handle."""
        handle = self.handles.take()
        item.handle = handle
        self.objects[handle] = item
        return handle

    def get(self, handle: int, kind: type[_T]) -> _T:
        """Return the object with `handle`. Raises VerbsError: ENOENT when there is none, EINVAL for another kind."""
        item = self.objects.get(handle)
        if item is None:
            raise VerbsError(errno.ENOENT, f"no object has handle {handle}")
        if not isinstance(item, kind):
            raise VerbsError(errno.EINVAL, f"handle {handle} is a {type(item).__name__}, not a {kind.__name__}")
        return item

    def remove(self, handle: int) -> None:
        """Forget the object with `handle`."""
        del self.objects[handle]
        self.handles.give_back(handle)

    def of(self, kind: type[_T]) -> list[_T]:
        """Return all objects of one kind, in the order of their handles."""
        return [item for _, item in sorted(self.objects.items()) if isinstance(item, kind)]

    @property
    def queue_pairs(self) -> list[UserQueuePair]:
        """All queue pairs, in the order of their handles."""
        return self.of(UserQueuePair)

    def post_async(self, element: int, event: int) -> bool:
        """Send an asynchronous event; False when it cannot be delivered."""
        return self.async_fifo is not None and self.async_fifo.post(ASYNC_EVENT.pack(element, event, 0))

    def unread_async(self, user_handle: int) -> int:
        """Take back the unread asynchronous events of an object that is destroyed; return how many there were."""

        def of_object(record: bytes) -> bool:
            element, event, _ = ASYNC_EVENT.unpack(record)
            return element == user_handle and event not in UNAFFILIATED

        return self.async_fifo.withdraw(of_object) if self.async_fifo is not None else 0

    def summary(self) -> dict[str, Any]:
        """Plain data for the management socket."""
        return {
            "id": self.id,
            "pid": self.pid,
            "inner_pid": self.inner_pid,
            "held": self.held,
            "pds": len(self.of(ProtectionDomain)),
            "mrs": len(self.of(MemoryRegion)),
            "mws": len(self.of(MemoryWindow)),
            "cqs": len(self.of(CompletionQueue)),
            "srqs": len(self.of(SharedReceiveQueue)),
            "qps": [queue_pair_summary(qp) for qp in self.queue_pairs],
        }


def queue_pair_summary(qp: UserQueuePair) -> dict[str, Any]:
    """Plain data of one queue pair for the management socket."""
    transport = qp.transport
    attributes, movement = transport.attributes, transport.movement
    sender, receiver, statistics = transport.sender, transport.receiver, transport.statistics
    path = attributes.path
    return {
        "qpn": attributes.qpn,
        "handle": qp.handle,
        "state": attributes.state,
        "remote_qpn": attributes.destination_qpn,
        "local_ip": address_text(path.source_ip) if path is not None else None,
        "remote_ip": address_text(path.destination_ip) if path is not None else None,
        "path_mtu": attributes.path_mtu,
        "send_psn": sender.send_psn,
        "expected_psn": receiver.expected_psn,
        "migros": movement.peer_migros,
        "stopped": movement.stopped,
        "paused": movement.paused,
        "resume_pending": movement.resume_pending,
        "type": attributes.qp_type,
        "una_psn": sender.una_psn,
        "inflight": len(sender.inflight),
        "completed_sends": statistics.completed_sends,
        "completed_receives": statistics.completed_receives,
        "retransmits": statistics.retransmits,
    }
