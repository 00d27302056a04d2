"""The files between the NIC and one opening of the device, in ctx/<id>/ of the run directory.

    queues     the control area and every shared ring; the program's device descriptor is this file
    doorbell   FIFO, the NIC only reads: its end of file is the program's last descriptor closed
    reply      FIFO, the NIC is the only writer: its end of file is the NIC's death
    async, comp-N   FIFOs of events

Nothing is connected and everything is found by path, so a checkpoint of the program carries its half, and the NIC at
the destination creates the same files (CRIU carries a FIFO's unread bytes, but only the path of a shared file).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import stat
import struct
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path
from typing import Final

from softroce_ext.device.barrier import full_barrier
from softroce_ext.device.errors import VerbsError
from softroce_ext.device.shared import EventFifo, RingImage
from softroce_ext.uverbs import rings
from softroce_ext.uverbs.removal import remove_tree

LAYOUT_VERSION: Final = 2
AT_PENDING: Final = 0
AT_LAYOUT: Final = 4
AT_MAILBOX: Final = 64
AT_MAY_POST: Final = 4096
AT_DIRTY: Final = 69632
AT_ARMED: Final = 135168
HANDLES: Final = 65536
CONTROL_BYTES: Final = AT_ARMED + HANDLES
FILE_BYTES: Final = 1 << 32
"""Size of the queue file. It is sparse; only what queues use takes memory."""

_MAILBOX = struct.Struct("<IiII112s")
MAILBOX_DATA: Final = 3904
_SEQUENCE = struct.Struct("<I")
_PIPE_BYTES: Final = 65536
_PIPE_READS: Final = 16
"""Reads that empty a FIFO unless it is being filled: a program without privileges can have a pipe of 1 MiB."""

_libc = ctypes.CDLL(None, use_errno=True)
_PUNCH_HOLE_KEEP_SIZE: Final = 3


class Fifo:
    """A FIFO of fixed-size records from the NIC to the program. The NIC holds both ends, so a write never fails for
    want of a reader and unread records can be taken back."""

    __slots__ = ("_path", "fd", "lost", "name", "record_bytes")

    def __init__(self, directory: Path, name: str, record_bytes: int) -> None:
        self.name = name
        self.record_bytes = record_bytes
        self.lost = 0
        self._path = directory / name
        os.mkfifo(self._path, 0o600)
        try:
            # The directory belongs to the program, which may have replaced the FIFO.
            self.fd = os.open(self._path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
            status = os.fstat(self.fd)
            if not stat.S_ISFIFO(status.st_mode) or status.st_uid != os.geteuid():
                os.close(self.fd)
                raise OSError(errno.EPERM, f"{name} was replaced")
        except OSError:
            with contextlib.suppress(OSError):
                self._path.unlink()
            raise

    def post(self, record: bytes) -> bool:
        """Append one record; False (and counted in `lost`) when the FIFO is full."""
        try:
            os.write(self.fd, record)
        except BlockingIOError:
            self.lost += 1
            return False
        return True

    def withdraw(self, matches: Callable[[bytes], bool]) -> int:
        """Take back the unread records that match; the others stay in order. Returns how many were taken.

        The kernel counts an event as reported when it is *read*, and ibv_destroy_cq waits for as many acknowledgements
        as were reported.
        """
        kept = bytearray()
        taken = 0
        size = self.record_bytes
        with contextlib.suppress(BlockingIOError):
            for _ in range(_PIPE_READS):  # bounded: the program can write there, too
                data = os.read(self.fd, _PIPE_BYTES)
                for at in range(0, len(data) - size + 1, size):
                    record = data[at : at + size]
                    if matches(record):
                        taken += 1
                    else:
                        kept += record
        if kept:
            with contextlib.suppress(BlockingIOError):
                os.write(self.fd, kept)
        return taken

    def identity(self) -> tuple[int, int]:
        """(st_dev, st_ino)."""
        status = os.fstat(self.fd)
        return status.st_dev, status.st_ino

    def close(self) -> None:
        """Close and remove."""
        os.close(self.fd)
        with contextlib.suppress(OSError):  # the directory belongs to the program, which may have removed it
            self._path.unlink()


class FileSpace:
    """Page ranges of the queue file: first fit, neighbours merged."""

    __slots__ = ("_free",)

    def __init__(self, taken: list[tuple[int, int]] | None = None) -> None:
        self._free: list[tuple[int, int]] = []
        at = CONTROL_BYTES
        for offset, size in sorted(taken or []):
            if offset > at:
                self._free.append((at, offset - at))
            at = offset + size
        self._free.append((at, FILE_BYTES - at))

    def take(self, size: int) -> int:
        """Return the offset of `size` free bytes. Raises VerbsError(ENOMEM)."""
        for index, (offset, room) in enumerate(self._free):
            if room >= size:
                if room == size:
                    del self._free[index]
                else:
                    self._free[index] = (offset + size, room - size)
                return offset
        raise VerbsError(errno.ENOMEM, "the queue file of the user context is full")

    def give_back(self, offset: int, size: int) -> None:
        """Make a range free again."""
        free = self._free
        at = bisect_left(free, (offset,))
        if at < len(free) and free[at][0] == offset + size:
            size += free.pop(at)[1]
        if at and sum(free[at - 1]) == offset:
            before, length = free[at - 1]
            free[at - 1] = before, length + size
        else:
            free.insert(at, (offset, size))


class FileChannel:
    """The channel of one opening (device.shared.Channel)."""

    def __init__(
        self, run_directory: Path, identifier: str, owner: tuple[int, int], taken: list[tuple[int, int]] | None = None
    ) -> None:
        """owner: (uid, gid) that the files belong to; taken: (offset, size) of the rings that a restore will map."""
        self.directory = run_directory / "ctx" / identifier
        self._owner = owner
        self._space = FileSpace(taken)
        self._fifos: dict[str, Fifo] = {}
        self._next_comp = 0
        self._highest_handle = 0
        self._folder = self._fd = self.doorbell = -1
        self._reply: Fifo | None = None
        self.directory.mkdir(mode=0o700)
        try:
            self._create()
        except BaseException:
            self._close_descriptors()
            remove_tree(self.directory)
            raise

    def _create(self) -> None:
        self._folder = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        # By descriptor: the program may move its directory away and leave a link to another in its place.
        self._inside = Path(f"/proc/self/fd/{self._folder}")
        self._fd = os.open(self.directory / "queues", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._fd, FILE_BYTES)
        os.posix_fallocate(self._fd, 0, CONTROL_BYTES)
        self.control = mmap.mmap(self._fd, CONTROL_BYTES)
        self._file = mmap.mmap(self._fd, FILE_BYTES)
        self._area = memoryview(self._file)
        self._words = memoryview(self.control).cast("I")
        self._words[AT_LAYOUT // 4] = LAYOUT_VERSION
        os.mkfifo(self.directory / "doorbell", 0o600)
        self.doorbell = os.open(self.directory / "doorbell", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        self._reply = Fifo(self._inside, "reply", _SEQUENCE.size)
        if self._owner != (os.geteuid(), os.getegid()):
            # The directory last: from then on the program can put anything there.
            for descriptor in (self._fd, self.doorbell, self._reply.fd, self._folder):
                os.fchown(descriptor, *self._owner)

    # -- rings ---------------------------------------------------------------------------------------------------

    def _take(self, size: int) -> int:
        offset = self._space.take(size)
        try:
            # A full tmpfs must be an errno now and not a SIGBUS at the first touch.
            os.posix_fallocate(self._fd, offset, size)
        except OSError as error:
            self._space.give_back(offset, size)
            raise VerbsError(errno.ENOMEM, f"no memory for {size} bytes of queue: {error.strerror}") from None
        return offset

    def _place(self, offset: int, slots: int, element: int, fresh: bool = True) -> rings.RingPlace:
        return rings.RingPlace(self._area, offset, slots, element, self._give_back, fresh)

    def _give_back(self, offset: int, size: int) -> None:
        if _libc.fallocate(self._fd, _PUNCH_HOLE_KEEP_SIZE, ctypes.c_long(offset), ctypes.c_long(size)):
            with contextlib.suppress(OSError):
                os.pwrite(self._fd, bytes(size), offset)
        self._space.give_back(offset, size)

    def send_ring(self, max_wr: int, max_sge: int, max_inline: int) -> rings.SendRing:
        """A send queue with room for `max_wr` requests of `max_sge` elements or `max_inline` bytes each."""
        element = rings.element_bytes(rings.SEND_WQE + max(rings.SGE_BYTES * max_sge, max_inline))
        slots = rings.power_of_two(max_wr + 1)
        offset = self._take(rings.ring_bytes(slots, element))
        return rings.SendRing(self._place(offset, slots, element), max_sge, max_inline)

    def receive_ring(self, max_wr: int, max_sge: int, shared: bool) -> rings.ReceiveRing:
        """A receive queue (or an SRQ's) with room for `max_wr` receives."""
        element = rings.element_bytes(rings.RECV_WQE + rings.SGE_BYTES * max_sge)
        slots = rings.power_of_two(max_wr + 1)
        offset = self._take(rings.ring_bytes(slots, element))
        return rings.ReceiveRing(self._place(offset, slots, element), max_sge, shared)

    def completion_ring(self, max_cqe: int) -> rings.CompletionRing:
        """A completion queue with room for `max_cqe` completions."""
        slots = rings.power_of_two(max_cqe + 1)
        offset = self._take(rings.ring_bytes(slots, rings.MIN_ELEMENT))
        return rings.CompletionRing(self._place(offset, slots, rings.MIN_ELEMENT))

    def _reserve(self, image: RingImage, element: int) -> None:
        """Room for a ring of an image whose slots need `element` bytes. Raises VerbsError."""
        if image.offset < CONTROL_BYTES or image.offset + image.size > FILE_BYTES:
            raise VerbsError(errno.EINVAL, f"a queue of {image.size} bytes at {image.offset:#x}")
        if element > image.element or image.size != rings.ring_bytes(image.mask + 1, image.element):
            raise VerbsError(
                errno.EINVAL, f"a queue of {image.size} bytes with slots of {image.element}, not {element}"
            )
        try:
            os.posix_fallocate(self._fd, image.offset, image.size)
        except OSError as error:
            raise VerbsError(errno.ENOMEM, f"no memory for {image.size} bytes of queue: {error.strerror}") from None

    def restore_send_ring(self, image: RingImage, max_sge: int, max_inline: int) -> rings.SendRing:
        """Map and fill a dumped send queue at its offset."""
        self._reserve(image, rings.SEND_WQE + max(rings.SGE_BYTES * max_sge, max_inline))
        ring = rings.SendRing(self._place(image.offset, image.mask + 1, image.element, False), max_sge, max_inline)
        ring.load(image)
        return ring

    def restore_receive_ring(self, image: RingImage, max_sge: int, shared: bool) -> rings.ReceiveRing:
        """Map and fill a dumped receive queue at its offset."""
        self._reserve(image, rings.RECV_WQE + rings.SGE_BYTES * max_sge)
        ring = rings.ReceiveRing(self._place(image.offset, image.mask + 1, image.element, False), max_sge, shared)
        ring.load(image)
        return ring

    def restore_completion_ring(self, image: RingImage) -> rings.CompletionRing:
        """Map and fill a dumped completion queue at its offset."""
        if image.element != rings.MIN_ELEMENT:
            raise VerbsError(errno.EINVAL, f"a completion queue with slots of {image.element} bytes")
        self._reserve(image, rings.MIN_ELEMENT)
        ring = rings.CompletionRing(self._place(image.offset, image.mask + 1, image.element, False))
        ring.load(image)
        return ring

    # -- doorbell --------------------------------------------------------------------------------------------------

    def may_post(self, handle: int, allowed: bool) -> None:
        """Whether a doorbell for QP `handle` is accepted at the call (a post in RESET or INIT must fail there)."""
        self.control[AT_MAY_POST + handle] = allowed
        if handle > self._highest_handle:
            self._highest_handle = handle

    def silence_doorbell(self) -> None:
        """The doorbell's FIFO became readable: drain it.

        Order matters: drain, clear `pending`, then visit the queues. Were `pending` cleared first, a byte written in
        between would be drained while `pending` stays set, and the NIC would sleep.
        """
        try:
            os.read(self.doorbell, 4096)
        except BlockingIOError:
            return

    def arm_doorbell(self) -> None:
        """From now on, the program's next doorbell writes to the FIFO."""
        self._words[AT_PENDING] = 0
        full_barrier()

    def rung(self) -> bool:
        """Whether the program rang since the last `arm_doorbell`."""
        return bool(self._words[AT_PENDING])

    def take_dirty(self) -> list[int]:
        """HOT. Return the handles of queue pairs that the program rang for since the last call."""
        control = self.control
        end = AT_DIRTY + self._highest_handle + 1
        at = control.find(b"\1", AT_DIRTY, end)
        if at < 0:
            return []
        handles = []
        while at >= 0:
            control[at] = 0
            handles.append(at - AT_DIRTY)
            at = control.find(b"\1", at + 1, end)
        # The producer index must be read after the mark is gone, else a post in between is lost.
        full_barrier()
        return handles

    def all_dirty(self, handles: list[int]) -> None:
        """Mark queue pairs as rung for (after a restore: the doorbell is level-triggered)."""
        for handle in handles:
            self.control[AT_DIRTY + handle] = 1

    def arm_bytes(self) -> tuple[mmap.mmap, int]:
        """The buffer with one byte for each CQ handle by which the program asks for events, and where they begin."""
        return self.control, AT_ARMED

    # -- answers and events --------------------------------------------------------------------------------------

    def answer(self, sequence: int, error: int, data: bytes = b"", install: str = "") -> None:
        """Answer the command `sequence`; install: name of the FIFO whose descriptor is response word 0."""
        self.control[AT_MAILBOX : AT_MAILBOX + _MAILBOX.size] = _MAILBOX.pack(
            sequence, error, len(data), bool(install), install.encode()
        )
        if data:
            start = AT_MAILBOX + _MAILBOX.size
            self.control[start : start + len(data)] = data
        assert self._reply is not None
        self._reply.post(_SEQUENCE.pack(sequence))

    def dump_mailbox(self) -> bytes:
        """The last answer: a program frozen between the answer and reading it needs it at the destination."""
        return bytes(self.control[AT_MAILBOX:AT_MAY_POST]).rstrip(b"\0")

    def load_mailbox(self, data: bytes) -> None:
        """Put a dumped answer back."""
        self.control[AT_MAILBOX : AT_MAILBOX + len(data)] = data

    def event_fifo(self, record_bytes: int, name: str = "") -> Fifo:
        """A new event FIFO; without a name the next comp-N."""
        while not name:
            candidate = f"comp-{self._next_comp}"
            self._next_comp += 1
            if candidate not in self._fifos:
                name = candidate
        fifo = Fifo(self._inside, name, record_bytes)
        os.fchown(fifo.fd, *self._owner)
        self._fifos[name] = fifo
        return fifo

    def drop_fifo(self, fifo: EventFifo) -> None:
        """Close and remove an event FIFO."""
        self._fifos.pop(fifo.name, None)
        fifo.close()

    @property
    def owner(self) -> tuple[int, int]:
        """(uid, gid) of the files."""
        return self._owner

    def close(self) -> None:
        """Close and remove every file. Rings must have been freed or are unmapped with the last reference."""
        for fifo in list(self._fifos.values()):
            fifo.close()
        self._fifos.clear()
        self._words.release()
        self.control.close()
        self._area.release()
        with contextlib.suppress(BufferError):  # a ring is still referred to: the mapping goes with it
            self._file.close()
        self._close_descriptors()
        remove_tree(self.directory)

    def _close_descriptors(self) -> None:
        if self._reply is not None:
            self._reply.close()
            self._reply = None
        for descriptor in (self.doorbell, self._fd, self._folder):
            if descriptor >= 0:
                os.close(descriptor)
        self.doorbell = self._fd = self._folder = -1
