"""The queues that a program shares with the NIC: struct rxe_queue_buf and its elements (rdma/rdma_user_rxe.h).

One side owns the producer index, the other the consumer index. The NIC trusts neither: it keeps a private copy of the
index that it owns, masks the other, copies each element out once, and checks the copy. A program that scribbles here
harms its own queue pair only.

An index is stored through a `memoryview` of 32-bit words, in one aligned store (`struct.pack_into` would store bytes,
and the program could see half an index). On x86 the program sees the stores in that order; other machines would need a
barrier.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from struct import Struct
from typing import Final, NamedTuple

from softroce_ext.device.shared import RingImage
from softroce_ext.transport.interfaces import RecvWqe, SendWqe, Sge, WorkCompletion
from softroce_ext.transport.verbs import SendFlag, WrOpcode

HEADER: Final = 384
"""Bytes before the first element: sizes @0, producer index @128, consumer index @256."""
_LOG2, _MASK, _PRODUCER, _CONSUMER = 0, 1, 32, 64  # in 32-bit words

SEND_WQE: Final = 208
RECV_WQE: Final = 40
SGE_BYTES: Final = 16
MIN_ELEMENT: Final = 64

_SEND_HEAD = Struct("<Q4xIIIQQQI")
"""wr_id 0, opcode 12, flags 16, imm 20, and the union: remote address 24, rkey or compare/add 32, swap 40, rkey 48."""
_SEND_DMA_AT: Final = 184
_DMA = Struct("<I8xI")
"""struct rxe_dma_info: length 0, num_sge 12."""
_RECV_HEAD = Struct("<Q8xI8xI")
_SGE = Struct("<QII")
_CQE = Struct("<QIIIIIIIIHHBBBB")
"""struct ib_uverbs_wc."""

_MW = Struct("<QIIII")
_ATOMICS: Final = frozenset({int(WrOpcode.ATOMIC_CMP_AND_SWP), int(WrOpcode.ATOMIC_FETCH_AND_ADD)})
_BIND_MW: Final = int(WrOpcode.BIND_MW)
_CARRY_DATA: Final = frozenset(
    int(opcode)
    for opcode in (
        WrOpcode.RDMA_WRITE, WrOpcode.RDMA_WRITE_WITH_IMM, WrOpcode.SEND, WrOpcode.SEND_WITH_IMM,
        WrOpcode.SEND_WITH_INV,
    )
)  # fmt: skip
"""Requests whose data may be inline: those that carry any from the program."""
BAD_OPCODE: Final = 255
"""The opcode that `fetch` returns for an invalid element; the requester completes it as LOC_QP_OP_ERR."""
_INLINE: Final = int(SendFlag.INLINE)
_UD_AT: Final = 24
_UD = Struct("<IIH2xI")
"""The union of a datagram: remote_qpn 24, remote_qkey 28, pkey_index 32, ah_num 36."""


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << max(0, (number - 1).bit_length())


def ring_bytes(elements: int, element: int) -> int:
    """Bytes of a ring with `elements` slots, in whole pages."""
    return -(-(HEADER + elements * element) // mmap.PAGESIZE) * mmap.PAGESIZE


def element_bytes(bytes_needed: int) -> int:
    """Bytes of a slot: a power of two, at least a cache line."""
    return max(MIN_ELEMENT, power_of_two(bytes_needed))


class RingPlace(NamedTuple):
    """A ring's place in the queue file of its user context."""

    area: memoryview
    """The whole file, mapped once (a mapping and a descriptor for each ring would soon be too many)."""
    offset: int
    slots: int
    """A power of two."""
    element: int
    """Bytes of a slot, a power of two."""
    free: Callable[[int, int], None]
    """Takes the range (offset, size) back."""
    fresh: bool = True
    """The ring is new: its header is written; else a dump brings it (`load`)."""


class Ring:
    """A ring in the mapped queue file of a user context. One slot is always empty, so `capacity` is slots − 1."""

    __slots__ = ("_free", "_index", "_map", "capacity", "element", "log2", "mask", "offset", "size")

    def __init__(self, place: RingPlace) -> None:
        self.offset = place.offset
        self.element = place.element
        self.log2 = place.element.bit_length() - 1
        self.mask = self.capacity = place.slots - 1
        self.size = ring_bytes(place.slots, place.element)
        self._free = place.free
        self._map = place.area[place.offset : place.offset + self.size]
        self._index = self._map.cast("I")
        if place.fresh:
            self._index[_LOG2] = self.log2
            self._index[_MASK] = self.mask

    def reset(self) -> None:
        """Both indices to zero."""
        self._index[_PRODUCER] = self._index[_CONSUMER] = 0

    def free(self) -> None:
        """Give the range of the file back. Not to be used afterwards."""
        self._index.release()
        self._map.release()
        self._free(self.offset, self.size)

    def _image(self, producer: int, consumer: int, fetched: int) -> RingImage:
        return RingImage(
            self.offset, self.size, self.element, self.mask, producer, consumer, fetched, bytes(self._map[: self.size])
        )

    def fill(self, data: bytes) -> None:
        """Put back the bytes of a dump."""
        self._map[: self.size] = data


class _WorkRing(Ring):
    """A ring that the NIC consumes: private indices of the next element to fetch and the oldest fetched."""

    __slots__ = ("_fetched", "_retired", "max_sge")

    def __init__(self, place: RingPlace, max_sge: int) -> None:
        super().__init__(place)
        self.max_sge = max_sge
        self._fetched = self._retired = 0

    def reset(self) -> None:
        super().reset()
        self._fetched = self._retired = 0

    def _advance(self) -> int:
        """HOT. Fetch the next posted element: where it is in the ring, or -1 when there is none."""
        fetched = self._fetched
        if self._index[_PRODUCER] & self.mask == fetched:
            return -1
        following = (fetched + 1) & self.mask
        if following == self._retired:
            return -1  # more elements than the ring holds: the producer index is invalid
        self._fetched = following
        return HEADER + (fetched << self.log2)

    def retire(self) -> None:
        """HOT. Give the oldest fetched slot back."""
        if self._retired != self._fetched:
            self._retired = (self._retired + 1) & self.mask
            self._index[_CONSUMER] = self._retired

    def posted(self) -> int:
        """Elements that are posted and not yet fetched."""
        return (self._index[_PRODUCER] - self._fetched) & self.mask

    def dump(self) -> RingImage:
        """Return a copy of everything."""
        return self._image(self._index[_PRODUCER] & self.mask, self._retired, self._fetched)

    def load(self, image: RingImage) -> None:
        """Take over a dump: bytes and indices."""
        self.fill(image.data)
        self._fetched = image.fetched & self.mask
        self._retired = image.consumer & self.mask
        self._index[_PRODUCER] = image.producer & self.mask
        self._index[_CONSUMER] = self._retired

    def _sges(self, at: int, count: int) -> tuple[tuple[Sge, ...], int]:
        if count == 1:
            sge = Sge._make(_SGE.unpack_from(self._map, at))
            return (sge,), sge.length
        sges = tuple(Sge._make(_SGE.unpack_from(self._map, at + SGE_BYTES * i)) for i in range(count))
        return sges, min(sum(sge.length for sge in sges), 0xFFFFFFFF)  # the largest length of a completion


class SendRing(_WorkRing):
    """A send queue (transport.interfaces.SendQueue)."""

    __slots__ = ("datagrams", "max_inline")

    def __init__(self, place: RingPlace, max_sge: int, max_inline: int) -> None:
        super().__init__(place, max_sge)
        self.max_inline = max_inline
        self.datagrams = False

    def fetch(self) -> SendWqe | None:
        """HOT. Copy out the next posted request. An invalid one has the opcode BAD_OPCODE."""
        at = self._advance()
        if at < 0:
            return None
        ring = self._map
        wr_id, opcode, flags, imm, remote, second, swap, atomic_rkey = _SEND_HEAD.unpack_from(ring, at)
        length, count = _DMA.unpack_from(ring, at + _SEND_DMA_AT)
        destination = None
        if self.datagrams:
            remote_qpn, qkey, _, ah_number = _UD.unpack_from(ring, at + _UD_AT)
            destination = ah_number, remote_qpn, qkey
        if flags & _INLINE and opcode in _CARRY_DATA:
            if length > self.max_inline:
                return SendWqe(wr_id, BAD_OPCODE, flags, 0, 0, (), None, 0, 0, 0, 0, None)
            data = bytes(ring[at + SEND_WQE : at + SEND_WQE + length])
            return SendWqe(wr_id, opcode, flags, imm, length, (), data, remote, second & 0xFFFFFFFF, 0, 0, destination)
        if count > self.max_sge:
            return SendWqe(wr_id, BAD_OPCODE, flags, 0, 0, (), None, 0, 0, 0, 0, None)
        if opcode == _BIND_MW:
            # address 24, length 32, region's lkey 40, window's key 44, key to be 48, access 52
            size, lkey, window, key, access = _MW.unpack_from(ring, at + 32)
            return SendWqe(wr_id, opcode, flags, imm, size, (), None, remote, key, lkey, window << 32 | access, None)
        sges, length = self._sges(at + SEND_WQE, count)
        if opcode in _ATOMICS:
            return SendWqe(wr_id, opcode, flags, imm, length, sges, None, remote, atomic_rkey, second, swap, None)
        return SendWqe(wr_id, opcode, flags, imm, length, sges, None, remote, second & 0xFFFFFFFF, 0, 0, destination)


class ReceiveRing(_WorkRing):
    """A receive queue (transport.interfaces.ReceiveQueue), or the ring of an SRQ (`shared`)."""

    __slots__ = ("_shared",)

    def __init__(self, place: RingPlace, max_sge: int, shared: bool = False) -> None:
        super().__init__(place, max_sge)
        self._shared = shared

    def fetch(self) -> RecvWqe | None:
        """HOT. Copy out the next posted receive. One with too many elements is a receive of length 0."""
        at = self._advance()
        if at < 0:
            return None
        wr_id, _, count = _RECV_HEAD.unpack_from(self._map, at)
        if self._shared:
            self._retired = self._fetched
            self._index[_CONSUMER] = self._fetched
        if count > self.max_sge:
            return RecvWqe(wr_id, 0, ())
        sges, length = self._sges(at + RECV_WQE, count)
        return RecvWqe(wr_id, length, sges)

    def move_to(self, other: ReceiveRing) -> None:
        """Copy the receives that are not fetched into an empty `other` with elements of the same size."""
        count = min(self.posted(), other.capacity)
        for slot in range(count):
            source = HEADER + (((self._fetched + slot) & self.mask) << self.log2)
            target = HEADER + (slot << self.log2)
            other._map[target : target + self.element] = self._map[source : source + self.element]
        other._index[_PRODUCER] = count


class CompletionRing(Ring):
    """A completion queue's ring: the NIC produces, the program consumes."""

    __slots__ = ("_producer",)

    def __init__(self, place: RingPlace) -> None:
        """place: its elements have MIN_ELEMENT bytes."""
        super().__init__(place)
        self._producer = 0

    def push(self, completion: WorkCompletion) -> bool:
        """HOT. Publish one completion (vendor_err 0, port 1); False when the ring is full."""
        producer = self._producer
        following = (producer + 1) & self.mask
        if following == self._index[_CONSUMER] & self.mask:
            return False
        wr_id, status, opcode, byte_len, imm, qp_num, src_qp, wc_flags, _ = completion
        _CQE.pack_into(
            self._map,
            HEADER + (producer << 6),
            wr_id, status, opcode, 0, byte_len, imm, qp_num, src_qp, wc_flags, 0, 0, 0, 0, 1, 0,
        )  # fmt: skip
        self._producer = following
        self._index[_PRODUCER] = following
        return True

    def reset(self) -> None:
        super().reset()
        self._producer = 0

    def waiting(self) -> int:
        """Return how many completions the program has not taken."""
        return (self._producer - self._index[_CONSUMER]) & self.mask

    def move_to(self, other: CompletionRing) -> None:
        """Copy the completions that were not taken into an empty `other` (ibv_resize_cq)."""
        at = self._index[_CONSUMER] & self.mask
        for slot in range(min(self.waiting(), other.capacity)):
            source = HEADER + (((at + slot) & self.mask) << 6)
            other._map[HEADER + (slot << 6) : HEADER + (slot + 1 << 6)] = self._map[source : source + 64]
            other._producer = slot + 1
        other._index[_PRODUCER] = other._producer

    def dump(self) -> RingImage:
        """Return a copy of everything."""
        return self._image(self._producer, self._index[_CONSUMER] & self.mask, 0)

    def load(self, image: RingImage) -> None:
        """Take over a dump: bytes and indices."""
        self.fill(image.data)
        self._producer = image.producer & self.mask
        self._index[_PRODUCER] = self._producer
        self._index[_CONSUMER] = image.consumer & self.mask
