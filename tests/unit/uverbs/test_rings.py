"""Shared queues: the layout is the kernel's, and nothing that the other side writes leads outside.

Invariants: what one side puts in comes out once, unchanged, in order; a ring holds `capacity` elements; indices and
counts of the other side are masked and checked, whatever they are.
"""

from __future__ import annotations

import mmap
import os
import random
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softroce_ext.native import build
from softroce_ext.transport.interfaces import Sge, WorkCompletion
from softroce_ext.uverbs import abi, rings
from softroce_ext.uverbs.rings import MIN_ELEMENT, CompletionRing, ReceiveRing, RingPlace, SendRing

PRODUCER, CONSUMER = 128, 256


def ignore(_offset: int, _size: int) -> None:
    """Ignore a range that is given back."""


class Shared:
    """A queue file and the program's view of it."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("queues")
        os.ftruncate(self.fd, 1 << 20)
        self.area = memoryview(mmap.mmap(self.fd, 1 << 20))

    def get(self, at: int) -> int:
        """A 32-bit word."""
        return int(struct.unpack("<I", os.pread(self.fd, 4, at))[0])

    def put(self, at: int, value: int) -> None:
        """Store a 32-bit word."""
        os.pwrite(self.fd, struct.pack("<I", value), at)

    def post_send(self, ring: SendRing, data: bytes) -> None:
        """Append a send element as the provider does."""
        producer = self.get(PRODUCER)
        os.pwrite(self.fd, data, rings.HEADER + producer * ring.element)
        self.put(PRODUCER, (producer + 1) & ring.mask)


@pytest.fixture
def shared() -> Iterator[Shared]:
    """A fresh file."""
    made = Shared()
    yield made
    os.close(made.fd)


def send_wqe(
    wr_id: int, opcode: int, flags: int, union: bytes, sges: list[tuple[int, int, int]], inline: bytes = b""
) -> bytes:
    """struct rxe_send_wqe."""
    head = struct.pack("<Q4xIII", wr_id, opcode, flags, 0xABCD).ljust(24, b"\0") + union
    dma = struct.pack("<IIIIII", len(inline), 0, 0, len(sges), 0, 0)
    tail = inline or b"".join(struct.pack("<QII", *sge) for sge in sges)
    return head.ljust(184, b"\0") + dma + tail


def send_ring(shared: Shared, slots: int = 8) -> SendRing:
    """A send queue of 2 elements each and 64 inline bytes."""
    return SendRing(RingPlace(shared.area, 0, slots, 512, ignore), 2, 64)


def test_send_elements_come_out_as_posted(shared: Shared) -> None:
    """RDMA, atomic, inline, bind: every field from its place."""
    ring = send_ring(shared)
    rdma = struct.pack("<QII", 0x1122334455667788, 0x99AA, 0)
    shared.post_send(ring, send_wqe(7, 0, 2, rdma, [(0x1000, 10, 5), (0x2000, 20, 6)]))
    shared.post_send(ring, send_wqe(8, 5, 2, struct.pack("<QQQI", 64, 1, 2, 3), [(0x1000, 8, 5)]))
    shared.post_send(ring, send_wqe(9, 2, 8, b"", [], b"inline data"))
    shared.post_send(ring, send_wqe(10, 8, 2, struct.pack("<QQIIII", 64, 100, 11, 12, 13, 14), []))
    first, second, third, fourth = (ring.fetch() for _ in range(4))
    assert ring.fetch() is None
    assert first is not None and second is not None and third is not None and fourth is not None
    assert first.sges == (Sge(0x1000, 10, 5), Sge(0x2000, 20, 6))
    assert (first.wr_id, first.length, first.remote_address, first.rkey, first.imm) == (
        7, 30, 0x1122334455667788, 0x99AA, 0xABCD,
    )  # fmt: skip
    assert (second.remote_address, second.compare_add, second.swap, second.rkey) == (64, 1, 2, 3)
    assert (third.inline, third.length) == (b"inline data", 11)
    assert (fourth.remote_address, fourth.length, fourth.compare_add, fourth.swap, fourth.rkey) == (
        64, 100, 11, 12 << 32 | 14, 13,
    )  # fmt: skip


def test_the_consumer_moves_when_elements_are_retired(shared: Shared) -> None:
    """Fetching is private; retiring gives the slot back; round and round."""
    ring = send_ring(shared, 4)
    for number in range(20):
        shared.post_send(ring, send_wqe(number, 2, 0, b"", [(0, 1, 1)]))
        wqe = ring.fetch()
        assert wqe is not None and wqe.wr_id == number
        assert shared.get(CONSUMER) == number % 4
        ring.retire()
        assert shared.get(CONSUMER) == (number + 1) % 4
    ring.retire()
    assert shared.get(CONSUMER) == 0, "nothing was fetched, so nothing can be retired"


@pytest.mark.parametrize(
    "element",
    [
        send_wqe(1, 2, 0, b"", [(0, 1, 1)] * 3),
        send_wqe(1, 2, 8, b"", [], bytes(65)),
        send_wqe(1, 0, 0, b"", [(0, 1, 1)])[:196] + b"\xff\xff\xff\xff" + bytes(16),
    ],
)
def test_elements_that_make_no_sense(shared: Shared, element: bytes) -> None:
    """Too many pieces, too much inline: a bad opcode for the requester to fail, and no byte from beyond the slot."""
    ring = send_ring(shared)
    shared.post_send(ring, element)
    wqe = ring.fetch()
    assert wqe is not None
    assert (wqe.opcode, wqe.sges, wqe.inline) == (rings.BAD_OPCODE, (), None)


@settings(max_examples=60, deadline=None)
@given(noise=st.integers(0, 1 << 32), count=st.integers(1, 20))
def test_scribbled_queues_stay_inside(noise: int, count: int) -> None:
    """Random bytes over header and slots: fetch, push and retire never raise and never leave the ring."""
    shared = Shared()
    try:
        chance = random.Random(noise)
        send, receive = send_ring(shared), ReceiveRing(RingPlace(shared.area, 65536, 8, 128, ignore), 2)
        completion = CompletionRing(RingPlace(shared.area, 131072, 8, MIN_ELEMENT, ignore))
        for _ in range(count):
            for at in (0, 65536, 131072):
                os.pwrite(shared.fd, chance.randbytes(4096), at)
            wqe, taken = send.fetch(), receive.fetch()
            assert wqe is None or len(wqe.sges) <= 2
            assert taken is None or len(taken.sges) <= 2
            completion.push(WorkCompletion(1, 0, 0, 0, 0, 0, 0, 0, False))
            send.retire()
            receive.retire()
            assert send.posted() <= send.mask and 0 <= completion.waiting() <= completion.mask
    finally:
        os.close(shared.fd)


@given(steps=st.lists(st.booleans(), max_size=60))
def test_completions_are_taken_once_in_order_and_overflow_is_seen(steps: list[bool]) -> None:
    """Against a list as model: push refuses exactly when `capacity` wait."""
    shared = Shared()
    try:
        ring = CompletionRing(RingPlace(shared.area, 0, 4, MIN_ELEMENT, ignore))
        waiting: list[int] = []
        for number, push in enumerate(steps):
            if push:
                assert ring.push(WorkCompletion(number, 0, 1, 2, 3, 4, 5, 6, False)) == (len(waiting) < ring.capacity)
                if len(waiting) < ring.capacity:
                    waiting.append(number)
            elif waiting:
                at = shared.get(CONSUMER)
                (wr_id,) = struct.unpack("<Q", os.pread(shared.fd, 8, rings.HEADER + 64 * at))
                assert wr_id == waiting.pop(0)
                shared.put(CONSUMER, (at + 1) & ring.mask)
            assert ring.waiting() == len(waiting)
    finally:
        os.close(shared.fd)


def test_a_shared_receive_queue_gives_its_slot_back_at_once(shared: Shared) -> None:
    """Several queue pairs finish in any order."""
    ring = ReceiveRing(RingPlace(shared.area, 0, 8, 128, ignore), 2, shared=True)
    shared.put(PRODUCER, 3)
    assert ring.fetch() is not None
    assert shared.get(CONSUMER) == 1
    assert ring.posted() == 2


def test_a_dumped_ring_is_loaded_as_it_was(shared: Shared) -> None:
    """Also with elements fetched and not retired, and bytes that are not published yet."""
    ring = send_ring(shared)
    for number in range(5):
        shared.post_send(ring, send_wqe(number, 2, 0, b"", [(0, 1, 1)]))
    for _ in range(3):
        ring.fetch()
    ring.retire()
    image = ring.dump()
    other = Shared()
    again = send_ring(other)
    again.load(image)
    assert again.dump() == image
    wqe = again.fetch()
    assert wqe is not None and wqe.wr_id == 3
    again.retire()
    assert other.get(CONSUMER) == 2
    os.close(other.fd)


LAYOUT = r"""
#include <stddef.h>
#include <stdio.h>
#include <rdma/ib_user_verbs.h>
#include <rdma/rdma_user_rxe.h>
#define S(t) printf("%zu ", sizeof(struct t))
#define O(t, f) printf("%zu ", offsetof(struct t, f))
int main(void) {
    O(rxe_queue_buf, index_mask); O(rxe_queue_buf, producer_index); O(rxe_queue_buf, consumer_index);
    O(rxe_queue_buf, data);
    O(rxe_send_wqe, dma); O(rxe_send_wqe, dma.num_sge); O(rxe_send_wqe, dma.sge); O(rxe_recv_wqe, dma.sge);
    O(rxe_recv_wqe, dma.num_sge); O(rxe_send_wr, opcode); O(rxe_send_wr, wr.rdma.rkey); O(rxe_send_wr, wr.atomic.swap);
    O(rxe_send_wr, wr.atomic.rkey); O(rxe_send_wr, wr.mw.mr_lkey); O(rxe_send_wr, wr.mw.access);
    S(ib_uverbs_wc); S(mminfo); S(ib_uverbs_query_device_resp); S(ib_uverbs_ex_query_device_resp);
    S(ib_uverbs_query_port_resp); S(ib_uverbs_create_qp_resp); S(ib_uverbs_modify_qp); S(ib_uverbs_query_qp_resp);
    return 0;
}
"""


def test_layouts_are_those_of_the_kernel_headers(tmp_path: Path) -> None:
    """Offsets and sizes, computed by the compiler from rdma/ib_user_verbs.h and rdma/rdma_user_rxe.h."""
    source = tmp_path / "layout.c"
    source.write_text(LAYOUT)
    program = tmp_path / "layout"
    subprocess.run([build.compiler(), "-o", str(program), str(source)], check=True)
    numbers = [int(word) for word in subprocess.run([program], capture_output=True, check=True).stdout.split()]
    assert numbers == [
        4, 128, 256, rings.HEADER,
        184, 184 + 12, rings.SEND_WQE, rings.RECV_WQE,
        28, 12, 32, 40,
        48, 40, 52,
        rings._CQE.size, abi.MMINFO.size, 176, abi.EX_DEVICE_BYTES,
        40, abi.CREATE_QP_RESP.size, abi.MODIFY_QP.size, abi.QUERY_QP_RESP.size,
    ]  # fmt: skip
