"""The memory of another process, read and written by address (process_vm_readv(2), process_vm_writev(2)).

The system call costs a few microseconds however little it moves, so writes are collected: each is copied into a staging
buffer, where the payloads of consecutive packets of one message are adjacent and become one range of one call.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import struct
from typing import Final

from softroce_ext.transport.interfaces import MemoryFault
from softroce_ext.wire.frame import Buffer

STAGING: Final = 1 << 19
"""Bytes of deferred writes, per process, before a flush is forced."""
MAX_RANGES: Final = 256
SCRATCH: Final = 1 << 18
"""Bytes of the buffer that `read` returns views of; a longer read gets a buffer of its own."""

_libc = ctypes.CDLL(None, use_errno=True)
_readv = _libc.process_vm_readv
_writev = _libc.process_vm_writev
for _call in (_readv, _writev):
    _call.restype = ctypes.c_ssize_t
    _call.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong]


_PROCMAP_QUERY: Final = 0xC0686611
_QUERY = struct.Struct("=QQQQQQQQQIIIIQQ")
"""struct procmap_query: size, query flags, address, begin, end, flags, page size, offset, inode, device, lengths."""
_QUERY_WRITABLE: Final = 2


def _query_writable(maps: int, address: int) -> bool:
    """Whether the mapping at `address` may be written; maps: descriptor of /proc/<pid>/maps. Raises OSError."""
    query = bytearray(_QUERY.pack(_QUERY.size, 0, address, *[0] * 12))
    fcntl.ioctl(maps, _PROCMAP_QUERY, query)
    return bool(_QUERY.unpack(query)[5] & _QUERY_WRITABLE)


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_uint64), ("length", ctypes.c_uint64))


# The NIC is one thread: the buffers through which bytes pass can be shared by all processes it serves.
_scratch = bytearray(SCRATCH)
_scratch_view = memoryview(_scratch)
_scratch_address = ctypes.addressof(ctypes.c_char.from_buffer(_scratch))
_iovecs = (_Iovec * 2)()
_local = memoryview(_iovecs).cast("B").cast("Q")
_local_at = ctypes.addressof(_iovecs)
_remote_at = _local_at + ctypes.sizeof(_Iovec)


class ProcessMemory:
    """The address space of process `pid` (transport.interfaces.Memory). Not thread-safe."""

    __slots__ = (
        "_address",
        "_at",
        "_count",
        "_end",
        "_fault",
        "_ranges",
        "_ranges_at",
        "_staging",
        "_used",
        "pid",
    )

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._staging: memoryview | None = None
        self._address = 0
        self._used = 0  # bytes of staging in use
        self._at = 0  # where the open range starts in staging
        self._end = -1  # remote address at which a write would extend the open range
        self._count = 0
        self._fault: MemoryFault | None = None

    def _open_staging(self) -> memoryview:
        buffer = bytearray(STAGING)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        self._staging = memoryview(buffer)
        ranges = (_Iovec * (2 * MAX_RANGES))()
        self._ranges = memoryview(ranges).cast("B").cast("Q")
        self._ranges_at = ctypes.addressof(ranges)
        return self._staging

    def read(self, address: int, length: int) -> Buffer:
        """HOT. Return `length` bytes at `address`, valid until the next read of any process. Raises MemoryFault."""
        if self._count:
            self._flush_quietly()
        if length <= SCRATCH:
            target, view = _scratch_address, _scratch_view[:length]
        else:
            own = bytearray(length)
            target, view = ctypes.addressof(ctypes.c_char.from_buffer(own)), memoryview(own)
        _local[0] = target
        _local[1] = length
        _local[2] = address
        _local[3] = length
        if _readv(self.pid, _local_at, 1, _remote_at, 1, 0) != length:
            raise MemoryFault(address, length)
        return view

    def write(self, address: int, data: Buffer) -> None:
        """HOT. Take `data` for `address`; it is written at the latest by `flush`, which alone raises MemoryFault."""
        staging = self._staging
        if staging is None:
            staging = self._open_staging()
        length = len(data)
        used = self._used
        if used + length > STAGING or self._count == MAX_RANGES:
            self._flush_quietly()
            used = 0
            if length > STAGING:
                for start in range(0, length, STAGING):
                    self.write(address + start, memoryview(data)[start : start + STAGING])
                return
        staging[used : used + length] = data
        ranges = self._ranges
        if address == self._end:
            count = self._count
            ranges[2 * count - 1] += length
            ranges[2 * (MAX_RANGES + count) - 1] += length
        else:
            count = self._count
            ranges[2 * count] = self._address + used
            ranges[2 * count + 1] = length
            ranges[2 * (MAX_RANGES + count)] = address
            ranges[2 * (MAX_RANGES + count) + 1] = length
            self._count = count + 1
        self._end = address + length
        self._used = used + length

    def flush(self) -> None:
        """HOT. Carry out every write taken so far. Raises MemoryFault for the first that failed."""
        if self._count:
            self._flush_quietly()
        if self._fault is not None:
            fault, self._fault = self._fault, None
            raise fault

    def _flush_quietly(self) -> None:
        count, used = self._count, self._used
        self._count = self._used = 0
        self._end = -1
        done = _writev(self.pid, self._ranges_at, count, self._ranges_at + 16 * MAX_RANGES, count, 0)
        if done == used or self._fault is not None:
            return
        # Which range failed: the kernel stops at the first bad page and returns how many bytes it moved.
        moved = max(done, 0)
        for index in range(count):
            length = self._ranges[2 * (MAX_RANGES + index) + 1]
            if moved < length:
                self._fault = MemoryFault(self._ranges[2 * (MAX_RANGES + index)], length)
                return
            moved -= length

    def accessible(self, address: int, length: int, writable: bool) -> bool:
        """Whether the first and last byte of a range are mapped (and, if asked, may be written)."""
        if length == 0:
            return True
        try:
            ends = (address, address + length - 1)
            for at in ends:
                self.read(at, 1)
        except MemoryFault:
            return False
        # Writing back what was read is not harmless while the program runs; query the mapping instead.
        return not writable or self._mapped_writable(ends)

    def _mapped_writable(self, addresses: tuple[int, int]) -> bool:
        try:
            with open(f"/proc/{self.pid}/maps", "rb", buffering=0) as maps:
                return all(_query_writable(maps.fileno(), address) for address in addresses)
        except OSError as error:
            return error.errno == errno.ENOTTY and self._listed_writable(addresses)

    def _listed_writable(self, addresses: tuple[int, int]) -> bool:
        """The same by reading the whole list, on kernels before 6.11 (a program can make the list long)."""
        found = 0
        try:
            with open(f"/proc/{self.pid}/maps", encoding="ascii", errors="replace") as maps:
                for line in maps:
                    span, mode = line.split(" ", 2)[:2]
                    start, end = (int(number, 16) for number in span.split("-"))
                    if mode[1] == "w":
                        found += sum(start <= address < end for address in addresses)
                    if start > max(addresses):
                        break
        except (OSError, ValueError):
            return False
        return found == len(addresses)

    def gone(self) -> bool:
        """Whether the process has ended, or is just ending: it no longer has an address space."""
        _local[0], _local[1], _local[2], _local[3] = _scratch_address, 1, 0, 1
        return _readv(self.pid, _local_at, 1, _remote_at, 1, 0) < 0 and ctypes.get_errno() == errno.ESRCH
