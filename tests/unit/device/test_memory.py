"""ProcessMemory on this very process.

Invariants: after `flush` memory is as if every write had been done in order; before it a write may be invisible, but a
`read` sees it; a fault names the first range that failed and harms no other.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softroce_ext.device import memory as memory_module
from softroce_ext.device.memory import MAX_RANGES, SCRATCH, STAGING, ProcessMemory
from softroce_ext.transport.interfaces import MemoryFault

AREA = 4 * STAGING


@pytest.fixture(scope="module")
def area() -> tuple[bytearray, int]:
    """A buffer of this process and its address."""
    buffer = bytearray(AREA)
    return buffer, ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def test_reads_any_length(area: tuple[bytearray, int]) -> None:
    """Shorter and longer than the scratch buffer."""
    buffer, at = area
    buffer[:] = os.urandom(AREA)
    memory = ProcessMemory(os.getpid())
    for length in (1, 8, 4096, SCRATCH, SCRATCH + 1, AREA):
        assert bytes(memory.read(at, length)) == buffer[:length]


def test_a_read_sees_earlier_writes(area: tuple[bytearray, int]) -> None:
    """A READ request behind a WRITE must get what was written."""
    _, at = area
    memory = ProcessMemory(os.getpid())
    memory.write(at + 100, b"written")
    assert bytes(memory.read(at + 100, 7)) == b"written"


writes = st.lists(st.tuples(st.integers(0, 3000), st.binary(min_size=1, max_size=400)), max_size=3 * MAX_RANGES)


@settings(max_examples=30, deadline=None)
@given(writes=writes)
def test_writes_happen_in_order(writes: list[tuple[int, bytes]]) -> None:
    """Overlaps, neighbours, more ranges than one call takes."""
    buffer = bytearray(4096)
    at = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    memory, model = ProcessMemory(os.getpid()), bytearray(4096)
    for offset, data in writes:
        memory.write(at + offset, data)
        model[offset : offset + len(data)] = data
    memory.flush()
    assert buffer == model


def test_writes_longer_than_the_staging_buffer(area: tuple[bytearray, int]) -> None:
    """One write of several stagings."""
    buffer, at = area
    data = os.urandom(3 * STAGING + 17)
    memory = ProcessMemory(os.getpid())
    memory.write(at, data)
    memory.flush()
    assert buffer[: len(data)] == data


def test_faults_are_reported_once_and_at_flush(area: tuple[bytearray, int]) -> None:
    """The first range that failed is named; the ranges before it are written; the next flush is clean."""
    buffer, at = area
    with mmap.mmap(-1, 8192, prot=mmap.PROT_READ) as readonly:
        hole = _address_of(readonly)
        memory = ProcessMemory(os.getpid())
        memory.write(at, b"before")
        memory.write(hole + 4096, b"fails")
        with pytest.raises(MemoryFault) as caught:
            memory.flush()
        assert (caught.value.address, caught.value.length) == (hole + 4096, 5)
        assert buffer[:6] == b"before"
        memory.flush()


def _address_of(mapping: mmap.mmap) -> int:
    """Where a mapping (also a read-only one) lies."""
    return int(numpy.frombuffer(memoryview(mapping), dtype=numpy.uint8).ctypes.data)


@pytest.mark.parametrize("address", [0, 8, 1 << 46])
def test_unmapped_memory_is_a_fault(address: int) -> None:
    """Addresses that belong to no mapping."""
    with pytest.raises(MemoryFault):
        ProcessMemory(os.getpid()).read(address, 8)


def test_a_process_that_is_gone_is_a_fault(area: tuple[bytearray, int]) -> None:
    """Also of a restored context that is not attached yet (pid 0)."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    for pid in (child, 0):
        with pytest.raises(MemoryFault):
            ProcessMemory(pid).read(area[1], 8)
        memory = ProcessMemory(pid)
        memory.write(area[1], b"x")
        with pytest.raises(MemoryFault):
            memory.flush()


def test_who_is_gone() -> None:
    """A process without an address space: a zombie, or nobody; not one whose memory is merely not mapped there."""
    assert not ProcessMemory(os.getpid()).gone()
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # it stays a zombie
    assert ProcessMemory(child).gone()
    os.waitpid(child, 0)
    assert ProcessMemory(child).gone()


@pytest.mark.parametrize("old_kernel", [False, True])
def test_accessible(area: tuple[bytearray, int], old_kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a registration checks: both ends mapped, and writable where that is asked."""
    if old_kernel:

        def refuse(maps: int, address: int) -> bool:
            raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))

        monkeypatch.setattr(memory_module, "_query_writable", refuse)
    memory = ProcessMemory(os.getpid())
    assert memory.accessible(area[1], AREA, True)
    assert memory.accessible(0, 0, True)
    assert not memory.accessible(0, 8, False)
    with mmap.mmap(-1, 4096, prot=mmap.PROT_READ) as readonly:
        at = _address_of(readonly)
        assert memory.accessible(at, 4096, False)
        assert not memory.accessible(at, 4096, True)
    with mmap.mmap(-1, 3 * 4096) as three:
        at = _address_of(three)
        assert memory.accessible(at, 3 * 4096, True)
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(at + 8192), 4096, mmap.PROT_READ) == 0
        assert memory.accessible(at, 8192, True)
        assert not memory.accessible(at, 3 * 4096, True), "its end may not be written"
        assert memory.accessible(at, 3 * 4096, False)
