"""One open of the device by one process, and every object that it owns."""

from __future__ import annotations

import errno
from typing import Any, TypeVar

from softroce_ext.device.completion import ASYNC_EVENT, CompletionChannel, CompletionQueue, SharedReceiveQueue
from softroce_ext.device.errors import VerbsError
from softroce_ext.device.memory import ProcessMemory
from softroce_ext.device.numbers import Handles
from softroce_ext.device.queue_pair import QueuePair
from softroce_ext.device.regions import MemoryRegion, MemoryWindow, ProtectionDomain
from softroce_ext.device.shared import EventFifo
from softroce_ext.wire.path import address_text

Object = Any
_T = TypeVar("_T")

UNAFFILIATED = (9, 10, 11, 12, 13, 17, 18)
"""Events of the port or device; their element is a port number, not a user handle."""


SWEEP_AT = 16
"""Completion channels that a context may have before those that the program closed are looked for."""


class AddressHandle:
    """An address handle of UD; `number` is what work requests carry."""

    __slots__ = ("attributes", "handle", "number", "pd")

    def __init__(self, pd: ProtectionDomain, attributes: bytes, number: int) -> None:
        self.pd = pd
        self.attributes = attributes
        self.number = number
        self.handle = 0


class Context:
    """What one process opened. `pid` is its number here (None from a restore to the attach), `inner_pid` its own."""

    def __init__(self, identifier: str, pid: int | None, inner_pid: int, channel: Any, memory: ProcessMemory) -> None:
        self.id = identifier
        self.pid = pid
        self.inner_pid = inner_pid
        self.channel = channel
        self.memory = memory
        self.handles = Handles()
        self.objects: dict[int, Object] = {}
        self.comp_channels: dict[tuple[int, int], CompletionChannel] = {}
        self.async_fifo: EventFifo | None = None
        self.held = False
        """A checkpoint holds it: its program is frozen, and a closed doorbell is not its death."""
        self.awake = False
        """The loop looks at its queues by itself, so the program need not ring."""
        self.pidfd = -1
        self.sweep_at = SWEEP_AT

    def check_room(self) -> None:
        """Raise VerbsError(ENOMEM) when `add` would: to be asked before the device knows anything of a new object."""
        self.handles.check()

    def add(self, item: Object) -> int:
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
        if item.__class__ is not kind:
            raise VerbsError(errno.EINVAL, f"handle {handle} is no {kind.__name__}")
        return item

    def remove(self, handle: int) -> None:
        """Forget the object with `handle`."""
        del self.objects[handle]
        self.handles.give_back(handle)

    def of(self, kind: type[_T]) -> list[_T]:
        """All objects of one kind, oldest handle first."""
        return [item for _, item in sorted(self.objects.items()) if item.__class__ is kind]

    @property
    def queue_pairs(self) -> list[QueuePair]:
        """All queue pairs, by handle."""
        return self.of(QueuePair)

    def post_async(self, element: int, event: int) -> bool:
        """Send an asynchronous event; False when nobody can take it."""
        return self.async_fifo is not None and self.async_fifo.post(ASYNC_EVENT.pack(element, event, 0))

    def unread_async(self, user_handle: int) -> int:
        """Take back the unread asynchronous events of an object that goes; return how many there were."""

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


def queue_pair_summary(qp: QueuePair) -> dict[str, Any]:
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
