"""Completion queues and channels, and shared receive queues."""

from __future__ import annotations

import mmap
import struct

from softroce_ext.device import image as im
from softroce_ext.device.barrier import full_barrier
from softroce_ext.device.regions import ProtectionDomain
from softroce_ext.device.shared import CompletionRing, EventFifo, ReceiveRing
from softroce_ext.device.user_object import Device, Restore, UserObject
from softroce_ext.transport.interfaces import RecvWqe, WorkCompletion
from softroce_ext.transport.verbs import QpEvent

COMP_EVENT = struct.Struct("<Q")
ASYNC_EVENT = struct.Struct("<QII")
"""struct ib_uverbs_comp_event_desc and ib_uverbs_async_event_desc: element (its user handle), event type, reserved."""


class CompletionChannel:
    """A FIFO through which completion events reach the program (ibv_comp_channel)."""

    __slots__ = ("fifo", "identity", "users")

    def __init__(self, fifo: EventFifo) -> None:
        self.fifo = fifo
        self.identity = fifo.identity()
        """(st_dev, st_ino) of the FIFO: how a descriptor of the program is recognised."""
        self.users = 0


NOTIFY_NONE, NOTIFY_NEXT, NOTIFY_SOLICITED = 0, 1, 2
ARM_EXISTS = 0x80
"""Set in the shared byte of a completion queue that exists; below it one of NOTIFY_*."""


class CompletionQueue(UserObject):
    """A CQ (transport.interfaces.CompletionQueue): completions go to the ring, events to the channel."""

    __slots__ = (
        "_arm_at",
        "_arms",
        "async_events",
        "async_fifo",
        "channel",
        "comp_events",
        "ring",
        "user_handle",
        "users",
    )

    def __init__(
        self, ring: CompletionRing, user_handle: int, channel: CompletionChannel | None, async_fifo: EventFifo
    ) -> None:
        self.ring = ring
        self.user_handle = user_handle
        self.channel = channel
        self.async_fifo = async_fifo
        self.handle = 0
        self.users = 0
        # The program arms by a store into shared memory (the bridge does it), so that asking for an event costs no
        # command; until `share` is called, this byte takes its place.
        self._arms: bytearray | mmap.mmap = bytearray(1)
        self._arm_at = 0
        self.comp_events = 0
        self.async_events = 0

    def push(self, completion: WorkCompletion) -> bool:
        """HOT. Publish a completion, and an event if the program asked for one. False: the queue was full.

        Each completion that is lost because of that causes a CQ_ERR event.
        """
        if not self.ring.push(completion):
            if self.async_fifo.post(ASYNC_EVENT.pack(self.user_handle, QpEvent.CQ_ERR, 0)):
                self.async_events += 1
            return False
        channel = self.channel
        if channel is not None:
            full_barrier()  # the completion must be visible before we see whether an event was asked for
            notify = self._arms[self._arm_at] & 3
            if notify and (notify == NOTIFY_NEXT or completion.solicited or completion.status):
                self._arms[self._arm_at] = ARM_EXISTS
                if channel.fifo.post(COMP_EVENT.pack(self.user_handle)):
                    self.comp_events += 1
        return True

    def enter(self, device: Device) -> None:
        if self.channel is not None:
            self.channel.users += 1

    def free(self, device: Device) -> None:
        if self.channel is not None:
            self.channel.users -= 1
        self.unshare()
        self.ring.free()

    def to_record(self, rings: im.RingSection) -> im.CqRecord:
        """Describe it for an image."""
        return im.CqRecord(
            handle=self.handle,
            user_handle=self.user_handle,
            ring=rings.add(self.ring.dump()),
            channel=self.channel.fifo.name if self.channel is not None else None,
            notify=self.notify,
            comp_events=self.comp_events,
            async_events=self.async_events,
        )

    @classmethod
    def from_record(cls, record: im.CqRecord, restore: Restore) -> CompletionQueue:
        """Make it from its record."""
        channel = restore.completion_channels[record.channel] if record.channel is not None else None
        ring = restore.channel.restore_completion_ring(restore.ring(record.ring))
        cq = cls(ring, record.user_handle, channel, restore.async_fifo)
        cq.handle = record.handle
        cq.share(*restore.channel.arm_bytes())
        cq.notify = record.notify
        cq.comp_events, cq.async_events = record.comp_events, record.async_events
        return cq

    def share(self, arms: bytearray | mmap.mmap, start: int) -> None:
        """Use the program's byte for this queue: `arms[start + handle]`. The handle must be known."""
        state = self.notify
        self._arms, self._arm_at = arms, start + self.handle
        arms[self._arm_at] = ARM_EXISTS | state

    def unshare(self) -> None:
        """The queue is destroyed: its byte says so to the program."""
        self._arms[self._arm_at] = 0

    @property
    def notify(self) -> int:
        """The event that the program asked for: one of NOTIFY_*."""
        return int(self._arms[self._arm_at] & 3)

    @notify.setter
    def notify(self, state: int) -> None:
        self._arms[self._arm_at] = self._arms[self._arm_at] & ARM_EXISTS | state

    def arm(self, solicited_only: bool) -> None:
        """Ask for one event: at the next completion, or the next solicited or failed one. The wider request stays."""
        if self.notify != NOTIFY_NEXT:
            self.notify = NOTIFY_SOLICITED if solicited_only else NOTIFY_NEXT


class SharedReceiveQueue(UserObject):
    """An SRQ (transport.interfaces.ReceiveQueue); each queue pair takes the oldest receive."""

    __slots__ = (
        "async_events",
        "async_fifo",
        "limit",
        "max_sge",
        "number",
        "pd",
        "ring",
        "user_handle",
        "users",
    )

    def __init__(
        self,
        ring: ReceiveRing,
        pd: ProtectionDomain,
        *,
        user_handle: int,
        max_sge: int,
        limit: int,
        number: int,
        async_fifo: EventFifo,
    ) -> None:
        self.ring = ring
        self.pd = pd
        self.user_handle = user_handle
        self.max_sge = max_sge
        self.limit = limit
        self.number = number
        self.async_fifo = async_fifo
        self.handle = 0
        self.users = 0
        self.async_events = 0

    def enter(self, device: Device) -> None:
        self.pd.users += 1
        device.srq_numbers.claim(self.number)

    def free(self, device: Device) -> None:
        self.pd.users -= 1
        device.srq_numbers.give_back(self.number)
        self.ring.free()

    def to_record(self, rings: im.RingSection) -> im.SrqRecord:
        """Describe it for an image."""
        return im.SrqRecord(
            handle=self.handle,
            user_handle=self.user_handle,
            pd=self.pd.handle,
            ring=rings.add(self.ring.dump()),
            max_sge=self.max_sge,
            limit=self.limit,
            number=self.number,
            async_events=self.async_events,
        )

    @classmethod
    def from_record(cls, record: im.SrqRecord, restore: Restore) -> SharedReceiveQueue:
        """Make it from its record."""
        ring = restore.channel.restore_receive_ring(restore.ring(record.ring), record.max_sge, True)
        pd = restore.get(record.pd, ProtectionDomain)
        srq = cls(
            ring,
            pd,
            user_handle=record.user_handle,
            max_sge=record.max_sge,
            limit=record.limit,
            number=record.number,
            async_fifo=restore.async_fifo,
        )
        srq.async_events = record.async_events
        return srq

    def fetch(self) -> RecvWqe | None:
        """HOT. Take the oldest receive; below the limit the program gets SRQ_LIMIT_REACHED once."""
        wqe = self.ring.fetch()
        if wqe is not None and self.limit and self.ring.posted() < self.limit:
            self.limit = 0
            if self.async_fifo.post(ASYNC_EVENT.pack(self.user_handle, QpEvent.SRQ_LIMIT_REACHED, 0)):
                self.async_events += 1
        return wqe

    def retire(self) -> None:
        """Do nothing: several queue pairs share the ring and finish in any order, so `fetch` gave the slot back."""
