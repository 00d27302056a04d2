"""Openings of /dev/infiniband/rdma_cm: the files of each, its commands, its end.

Like a user context of verbs, an opening has a control area with a mailbox, a FIFO `doorbell` that is never rung and
whose end of file says that the program closed its descriptor, and a FIFO for answers. The descriptor that the program
holds is the FIFO `events`: it has one byte for each waiting event, so that poll(2) is right; GET_EVENT takes the byte
out here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

from softroce_ext.cm import checkpoint, ucma
from softroce_ext.cm.ids import EventQueue
from softroce_ext.cm.manager import CommunicationManager
from softroce_ext.cm.records import FileRecord
from softroce_ext.device.errors import ImageError, VerbsError
from softroce_ext.device.memory import ProcessMemory
from softroce_ext.device.opening import NO_PROCESS, Descriptors, Opening, Openings, inner_pid_of
from softroce_ext.transport.interfaces import MemoryFault
from softroce_ext.uverbs.channel import MAILBOX_DATA, FileChannel

EVENTS: Final = "events"
MAX_FILES: Final = 256
"""Openings that one process may have at a time: each costs the NIC descriptors."""


class CmFile(Opening):
    """One opening of rdma_cm by one process."""

    def __init__(
        self, files: CmFiles, identifier: str, pid: int | None, inner_pid: int, channel: FileChannel, guid: bytes
    ) -> None:
        """pid: None for a restored one, until it is attached; guid: of the device, as the program knows it."""
        super().__init__(identifier, pid, inner_pid, channel, ProcessMemory(pid if pid is not None else NO_PROCESS))
        self.guid = guid
        self._files = files
        self._fifo = channel.event_fifo(1, EVENTS)
        self.identity = self._fifo.identity()
        self.queue = EventQueue(self._signal)

    def _signal(self, count: int) -> None:
        if count > 0:
            self._fifo.post(b"e" * count)
            return
        with contextlib.suppress(BlockingIOError):  # a program that reads its descriptor has taken bytes out
            os.read(self._fifo.fd, -count)

    def read(self, address: int, length: int) -> bytes:
        """Read memory of the program. Raises VerbsError(EFAULT)."""
        try:
            return bytes(self.memory.read(address, length))
        except MemoryFault:
            raise VerbsError(errno.EFAULT, f"{length} bytes at {address:#x} cannot be read") from None

    def sibling(self, descriptor: int) -> CmFile:
        """Return another opening by the same process, by its descriptor there. Raises VerbsError."""
        try:
            status = os.stat(f"/proc/{self.pid}/fd/{descriptor}")
        except OSError:
            raise VerbsError(errno.EBADF, f"descriptor {descriptor} is not open") from None
        for file in self._files.by_id.values():
            if file.pid == self.pid and file.identity == (status.st_dev, status.st_ino):
                return file
        raise VerbsError(errno.EINVAL, f"descriptor {descriptor} is not an rdma_cm file")

    def summary(self) -> dict[str, Any]:
        return checkpoint.summary(self._files.cm, self)


class CmFiles(Openings[CmFile]):
    """All openings of rdma_cm of one NIC (uverbs.server.RdmaCm)."""

    def __init__(
        self, run_directory: Path, cm: CommunicationManager, descriptors: Descriptors, clock: Callable[[], float]
    ) -> None:
        super().__init__({}, descriptors)
        self.cm = cm
        self.trace: Callable[[str], None] | None = None
        """Takes one line for each command."""
        self._run = run_directory
        self._clock = clock

    def open(self, identifier: str, pid: int, uid: int, gid: int) -> CmFile:
        """A process opens rdma_cm. Raises OSError or VerbsError."""
        if len(self.of({pid})) >= MAX_FILES:
            raise VerbsError(errno.EMFILE, f"process {pid} has {MAX_FILES} openings of rdma_cm")
        channel = FileChannel(self._run, identifier, (uid, gid))
        try:
            file = CmFile(self, identifier, pid, inner_pid_of(pid), channel, self.cm.adapter.guid)
            self.watch(file)
        except OSError:
            channel.close()
            raise
        self.by_id[identifier] = file
        return file

    # -- device.opening.Openings -----------------------------------------------------------------------------------

    def _watch_doorbell(self, file: CmFile) -> None:
        self._descriptors.watch(file.channel.doorbell, partial(self._doorbell, file))

    def _stop_watching_doorbell(self, file: CmFile) -> None:
        self._descriptors.unwatch(file.channel.doorbell)

    def _doorbell(self, file: CmFile, events: int) -> None:
        if events & select.EPOLLIN:
            file.channel.silence_doorbell()
        elif events & (select.EPOLLHUP | select.EPOLLERR):
            self.drop(file)

    def _close(self, file: CmFile) -> None:
        """Its ids disconnect and are freed."""
        del self.by_id[file.id]
        self.cm.close(file.queue, self._clock())
        file.channel.close()

    def _stop(self, file: CmFile) -> None:
        self.cm.hold(file.queue, self._clock())

    def _resume(self, file: CmFile, source: bytes | None) -> None:
        self.cm.unhold(file.queue, self._clock())

    def _discard(self, file: CmFile) -> None:
        del self.by_id[file.id]
        self.cm.discard(file.queue)
        file.channel.close()

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def dump(self, files: list[CmFile]) -> list[dict[str, Any]]:
        """Return records for an image; nothing is changed."""
        return checkpoint.dump(self.cm, files)

    def restore(self, plain: list[dict[str, Any]], addresses: dict[bytes, bytes]) -> list[CmFile]:
        """Make the openings of an image, all held, or none. `addresses`: IP address there → here. Raises ImageError."""
        records = checkpoint.parse(plain)
        made: list[CmFile] = []

        def make(record: FileRecord) -> CmFile:
            if record.id in self.by_id:
                raise ImageError(f"rdma_cm file {record.id} exists here already")
            channel = FileChannel(self._run, record.id, (record.uid, record.gid))
            try:
                channel.load_mailbox(bytes.fromhex(record.mailbox))
                file = CmFile(self, record.id, None, record.inner_pid, channel, bytes.fromhex(record.guid))
            except BaseException:
                channel.close()
                raise
            file.held = True
            self.by_id[file.id] = file
            made.append(file)
            return file

        try:
            return checkpoint.restore(self.cm, records, make, addresses, self._clock())
        except ImageError:
            for file in made:
                self.discard(file)
            raise

    # -- commands --------------------------------------------------------------------------------------------------

    def serve(self, identifier: str, pid: int, sequence: int, message: bytes) -> bool:
        """Run and answer a command of an opening of process `pid`; False when there is no such opening."""
        file = self.by_id.get(identifier)
        if file is None or file.pid != pid:
            return False
        self._command(file, sequence, message)
        return True

    def _command(self, file: CmFile, sequence: int, message: bytes) -> None:
        error, data = 0, b""
        try:
            data = ucma.execute(self.cm, file, message, self._clock())[:MAILBOX_DATA]
        except VerbsError as fault:
            error = fault.number
            if self.trace and error != errno.EAGAIN:
                self.trace(f"{file.id} {name(message)}: {fault}")
        except Exception:  # a defect here must not end every other program's connections
            error = errno.EIO
            traceback.print_exc()
        file.channel.answer(sequence, error, data)
        if self.trace:
            self.trace(f"{file.id} {name(message)} in={len(message)} error={error}")


def name(message: bytes) -> str:
    """Return a command's name, for the trace."""
    number = int.from_bytes(message[:4], "little")
    try:
        return f"rdma_cm {ucma.Command(number).name}"
    except ValueError:
        return f"rdma_cm command {number}"
