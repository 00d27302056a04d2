"""Completion queues and channels, and shared receive queues."""

from __future__ import annotations

import struct
from typing import Any

from softroce_ext.device.barrier import full_barrier
from softroce_ext.device.regions import ProtectionDomain
from softroce_ext.device.shared import CompletionRing, EventFifo, ReceiveRing
from softroce_ext.transport.interfaces import RecvWqe, WorkCompletion

CQ_ERR = 0
SRQ_ERR = 14
SRQ_LIMIT_REACHED = 15
"""enum ib_event_type, the events of this module."""

COMP_EVENT = struct.Struct("<Q")
ASYNC_EVENT = struct.Struct("<QII")
"""struct ib_uverbs_comp_event_desc and ib_uverbs_async_event_desc: element (its user handle), event type, reserved."""


class CompletionChannel:
    """A FIFO through which completion events reach the program (ibv_comp_channel)."""

    __slots__ = ("fifo", "identity", "users")

    def __init__(self, fifo: EventFifo, identity: tuple[int, int]) -> None:
        self.fifo = fifo
        self.identity = identity
        """(st_dev, st_ino) of the FIFO: how a descriptor of the program is recognised."""
        self.users = 0


NOTIFY_NONE, NOTIFY_NEXT, NOTIFY_SOLICITED = 0, 1, 2
ARM_EXISTS = 0x80
"""Set in the shared byte of a completion queue that there is; below it one of NOTIFY_*."""


class CompletionQueue:
    """A CQ (transport.interfaces.CompletionQueue): completions go to the ring, events to the channel."""

    __slots__ = (
        "_arm_at",
        "_arms",
        "async_events",
        "async_fifo",
        "channel",
        "comp_events",
        "handle",
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
        # command; this byte is a stand-in until `share` is called.
        self._arms: Any = bytearray(1)
        self._arm_at = 0
        self.comp_events = 0
        self.async_events = 0

    def push(self, completion: WorkCompletion) -> bool:
        """HOT. Publish a completion; tell the program when it asked to be told. False: the queue was full.

        Each completion that is lost so is a CQ_ERR event.
        """
        if not self.ring.push(completion):
            if self.async_fifo.post(ASYNC_EVENT.pack(self.user_handle, CQ_ERR, 0)):
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

    def share(self, arms: Any, start: int) -> None:
        """Use the program's byte for this queue: `arms[start + handle]`. The handle must be known."""
        state = self.notify
        self._arms, self._arm_at = arms, start + self.handle
        arms[self._arm_at] = ARM_EXISTS | state

    def unshare(self) -> None:
        """The queue goes: its byte says so to the program."""
        self._arms[self._arm_at] = 0

    @property
    def notify(self) -> int:
        """What event was asked for: one of NOTIFY_*."""
        return int(self._arms[self._arm_at] & 3)

    @notify.setter
    def notify(self, state: int) -> None:
        self._arms[self._arm_at] = self._arms[self._arm_at] & ARM_EXISTS | state

    def arm(self, solicited_only: bool) -> None:
        """Ask for one event: at the next completion, or the next solicited or failed one. The stronger wish stays."""
        if self.notify != NOTIFY_NEXT:
            self.notify = NOTIFY_SOLICITED if solicited_only else NOTIFY_NEXT


class SharedReceiveQueue:
    """An SRQ (transport.interfaces.ReceiveQueue); each queue pair takes the oldest receive."""

    __slots__ = (
        "async_events",
        "async_fifo",
        "handle",
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

    def fetch(self) -> RecvWqe | None:
        """HOT. Take the oldest receive; below the limit the program gets SRQ_LIMIT_REACHED once."""
        wqe = self.ring.fetch()
        if wqe is not None and self.limit and self.ring.posted() < self.limit:
            self.limit = 0
            if self.async_fifo.post(ASYNC_EVENT.pack(self.user_handle, SRQ_LIMIT_REACHED, 0)):
                self.async_events += 1
        return wqe

    def retire(self) -> None:
        """Nothing: several queue pairs share the ring and finish in any order, so `fetch` gave the slot back."""
