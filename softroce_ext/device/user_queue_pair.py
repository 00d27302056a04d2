"""A queue pair as the program sees it: handle, capabilities, address vector; the protocol is the transport's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from softroce_ext.device.address_handle import Destination
from softroce_ext.device.completion import CompletionQueue, SharedReceiveQueue
from softroce_ext.device.memory import ProcessMemory
from softroce_ext.device.regions import ProtectionDomain
from softroce_ext.device.shared import Channel, ReceiveRing, SendRing
from softroce_ext.device.user_object import Device, UserObject
from softroce_ext.transport.interfaces import RecvWqe
from softroce_ext.transport.queue_pair import QueuePair


@dataclass(frozen=True, slots=True)
class Capabilities:
    """struct ib_qp_cap: what the queues hold (work requests, scatter/gather elements each, inline bytes)."""

    max_send_wr: int
    max_recv_wr: int
    max_send_sge: int
    max_recv_sge: int
    max_inline_data: int


@dataclass(frozen=True, slots=True, kw_only=True)
class InitAttributes:
    """struct ibv_qp_init_attr: what a queue pair is created with."""

    user_handle: int
    """The program's own name of it, which its events carry."""
    kind: int
    """enum ib_qp_type."""
    pd: ProtectionDomain
    send_cq: CompletionQueue
    recv_cq: CompletionQueue
    srq: SharedReceiveQueue | None
    capabilities: Capabilities
    sq_sig_all: bool


class NoReceiveQueue:
    """The receive queue of a queue pair that has none (it uses an SRQ whose own object is handed in instead)."""

    def fetch(self) -> RecvWqe | None:
        """Return None: nothing can be posted."""
        return None

    def retire(self) -> None:
        """Do nothing: there is no slot to give back."""


class Owner(Protocol):
    """The user context of a queue pair (`user_context.UserContext`)."""

    @property
    def channel(self) -> Channel: ...

    @property
    def memory(self) -> ProcessMemory: ...

    def remove(self, handle: int) -> None:
        """Forget the object with `handle`."""

    def post_async(self, element: int, event: int) -> bool:
        """Send an asynchronous event; False when it cannot be delivered."""


class UserQueuePair(UserObject):
    """One queue pair of one user context. Its states and PSNs are the protocol object's (`transport`)."""

    __slots__ = (
        "alternate",
        "async_events",
        "capabilities",
        "context",
        "destination",
        "groups",
        "kind",
        "pd",
        "receive_ring",
        "recv_cq",
        "send_cq",
        "send_ring",
        "srq",
        "transport",
        "user_handle",
    )

    def __init__(
        self,
        context: Owner,
        attributes: InitAttributes,
        send_ring: SendRing,
        receive_ring: ReceiveRing | None,
        transport: QueuePair,
    ) -> None:
        """attributes: what it was created with, its capabilities those of the rings; receive_ring: None with an SRQ."""
        self.context = context
        self.user_handle = attributes.user_handle
        self.kind = attributes.kind
        self.pd = attributes.pd
        self.send_cq = attributes.send_cq
        self.recv_cq = attributes.recv_cq
        self.srq = attributes.srq
        self.capabilities = attributes.capabilities
        self.send_ring = send_ring
        self.receive_ring = receive_ring
        self.transport = transport
        self.handle = 0
        self.async_events = 0
        self.groups: dict[bytes, set[int]] = {}
        """The multicast groups that it is in: GID, and the LIDs that were named when it joined."""
        self.destination = Destination()
        self.alternate = Destination()

    @property
    def qpn(self) -> int:
        """The queue pair's number on the wire."""
        return self.transport.attributes.qpn

    def enter(self, device: Device) -> None:
        device.adopt(self)
        self._count_users(+1)

    def free(self, device: Device) -> None:
        device.withdraw(self)
        self._count_users(-1)
        self.send_ring.free()
        if self.receive_ring is not None:
            self.receive_ring.free()

    def _count_users(self, step: int) -> None:
        self.pd.users += step
        self.send_cq.users += step
        self.recv_cq.users += step
        if self.srq is not None:
            self.srq.users += step

    def reset_rings(self) -> None:
        """Empty both queues (a move to RESET)."""
        self.send_ring.reset()
        if self.receive_ring is not None:
            self.receive_ring.reset()
