"""A queue pair as the program sees it: handle, capabilities, address vector; the protocol is the transport's."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from softroce_ext.device.completion import CompletionQueue, SharedReceiveQueue
from softroce_ext.device.regions import ProtectionDomain
from softroce_ext.device.shared import ReceiveRing, SendRing
from softroce_ext.transport.interfaces import RecvWqe
from softroce_ext.transport.queue_pair import QueuePair as TransportQueuePair

if TYPE_CHECKING:
    from softroce_ext.device.context import Context

QPT_RC, QPT_UC, QPT_UD = 2, 3, 4
"""enum ib_qp_type."""

_DESTINATION = struct.Struct("<16sIHHBBBBBBBB")
"""struct ib_uverbs_qp_dest."""


_HANDLE_ATTRIBUTES = struct.Struct("<16sIBBBxHBBBBBx")
"""struct ib_uverbs_ah_attr: a struct ib_uverbs_global_route, then the local part."""


class Destination(NamedTuple):
    """An address vector (struct ib_uverbs_qp_dest, in its order)."""

    dgid: bytes = bytes(16)
    flow_label: int = 0
    dlid: int = 0
    reserved: int = 0
    sgid_index: int = 0
    hop_limit: int = 0
    traffic_class: int = 0
    sl: int = 0
    src_path_bits: int = 0
    static_rate: int = 0
    is_global: int = 0
    port_num: int = 0

    def pack(self) -> bytes:
        """32 bytes."""
        return _DESTINATION.pack(*self)

    @classmethod
    def of_handle(cls, attributes: bytes) -> Destination:
        """From the 32 bytes of struct ib_uverbs_ah_attr (its fields are those of a queue pair's, in another order)."""
        dgid, flow_label, sgid_index, hop_limit, traffic_class, dlid, sl, bits, rate, is_global, port = (
            _HANDLE_ATTRIBUTES.unpack(attributes)
        )
        return cls(
            dgid, flow_label, dlid, 0, sgid_index, hop_limit, traffic_class, sl, bits, rate, is_global, port
        )  # fmt: skip

    @classmethod
    def unpack(cls, data: bytes | memoryview) -> Destination:
        """From 32 bytes."""
        return cls._make(_DESTINATION.unpack_from(data))


@dataclass(frozen=True, slots=True)
class Capabilities:
    """struct ib_qp_cap: what the queues hold (work requests, scatter/gather elements each, inline bytes)."""

    max_send_wr: int
    max_recv_wr: int
    max_send_sge: int
    max_recv_sge: int
    max_inline_data: int


class NoReceiveQueue:
    """The receive queue of a queue pair that has none (it uses an SRQ whose own object is handed in instead)."""

    def fetch(self) -> RecvWqe | None:
        """Never anything."""
        return None

    def retire(self) -> None:
        """Nothing to give back."""


class QueuePair:
    """One queue pair of one context. Its protocol state is in `transport.state`."""

    __slots__ = (
        "alternate",
        "async_events",
        "capabilities",
        "context",
        "destination",
        "groups",
        "handle",
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
        context: Context,
        user_handle: int,
        kind: int,
        pd: ProtectionDomain,
        send_cq: CompletionQueue,
        recv_cq: CompletionQueue,
        srq: SharedReceiveQueue | None,
        send_ring: SendRing,
        receive_ring: ReceiveRing | None,
        capabilities: Capabilities,
        transport: TransportQueuePair,
    ) -> None:
        self.context = context
        self.user_handle = user_handle
        self.kind = kind
        self.pd = pd
        self.send_cq = send_cq
        self.recv_cq = recv_cq
        self.srq = srq
        self.send_ring = send_ring
        self.receive_ring = receive_ring
        self.capabilities = capabilities
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

    def users(self, step: int) -> None:
        """Count this queue pair in (+1) or out (−1) of everything it refers to."""
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

    def free_rings(self) -> None:
        """Give both queues' memory back."""
        self.send_ring.free()
        if self.receive_ring is not None:
            self.receive_ring.free()
