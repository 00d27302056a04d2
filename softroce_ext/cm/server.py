"""Opens of /dev/infiniband/rdma_cm: the files of each, its commands, its end.

As a context of verbs it has a control area with a mailbox, a FIFO `doorbell` that is never rung and whose end of file
says that the program closed its descriptor, and a FIFO for answers. The descriptor that the program holds is the FIFO
`events`: one byte in it for each event that waits, so that poll(2) tells the truth; GET_EVENT takes the byte out here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from softroce_ext.cm import checkpoint, ucma
from softroce_ext.cm.ids import Endpoint, EventQueue
from softroce_ext.cm.manager import CommunicationManager
from softroce_ext.cm.records import FileRecord
from softroce_ext.device.checkpoint import NO_PROCESS
from softroce_ext.device.errors import ImageError, StateError, VerbsError
from softroce_ext.device.memory import ProcessMemory
from softroce_ext.uverbs.channel import MAILBOX_DATA, FileChannel
from softroce_ext.uverbs.server import inner_pid_of, open_process

EVENTS: Final = "events"
MAX_FILES: Final = 256
"""Opens that one process may have at a time: each costs the NIC descriptors."""
_ROCE_PORT: Final = 4791


class CmFile:
    """One open of rdma_cm by one process."""

    def __init__(
        self, files: CmFiles, identifier: str, pid: int | None, inner_pid: int, channel: FileChannel, guid: bytes
    ) -> None:
        """pid: None for one that was restored, until it is attached; guid: of the device, as the program knows it."""
        self.id = identifier
        self.pid = pid
        self.inner_pid = inner_pid
        self.guid = guid
        self.channel = channel
        self.pidfd = -1
        self._files = files
        self.memory = ProcessMemory(pid if pid is not None else NO_PROCESS)
        self._fifo = channel.event_fifo(1, EVENTS)
        self.identity = self._fifo.identity()
        self.queue = EventQueue(self._tell)

    def _tell(self, count: int) -> None:
        if count > 0:
            self._fifo.post(b"e" * count)
            return
        with contextlib.suppress(BlockingIOError):  # a program that reads its descriptor took bytes that are not its
            os.read(self._fifo.fd, -count)

    def read(self, address: int, length: int) -> bytes:
        """Memory of the program. Raises VerbsError(EFAULT)."""
        try:
            return bytes(self.memory.read(address, length))
        except Exception:
            raise VerbsError(errno.EFAULT, f"{length} bytes at {address:#x} cannot be read") from None

    @property
    def held(self) -> bool:
        """Whether a checkpoint holds its program."""
        return self.queue.held_at is not None

    def sibling(self, descriptor: int) -> CmFile:
        """Another open by the same process, by its descriptor there. Raises VerbsError."""
        try:
            status = os.stat(f"/proc/{self.pid}/fd/{descriptor}")
        except OSError:
            raise VerbsError(errno.EBADF, f"descriptor {descriptor} is not open") from None
        for file in self._files.files.values():
            if file.pid == self.pid and file.identity == (status.st_dev, status.st_ino):
                return file
        raise VerbsError(errno.EINVAL, f"descriptor {descriptor} is no rdma_cm file")


class CmFiles:
    """All opens of one NIC. `watch` and `unwatch` are the loop's."""

    def __init__(
        self,
        run_directory: Path,
        cm: CommunicationManager,
        watch: Callable[[int, Callable[[int], None]], None],
        unwatch: Callable[[int], None],
        clock: Callable[[], float],
    ) -> None:
        self.files: dict[str, CmFile] = {}
        self.trace: Callable[[str], None] | None = None
        """Takes one line for each command."""
        self._run = run_directory
        self._cm = cm
        self._watch, self._unwatch, self._clock = watch, unwatch, clock

    def open(self, identifier: str, pid: int, uid: int, gid: int) -> CmFile:
        """A process opens rdma_cm. Raises OSError or VerbsError."""
        if len(self.of({pid})) >= MAX_FILES:
            raise VerbsError(errno.EMFILE, f"process {pid} has {MAX_FILES} opens of rdma_cm")
        channel = FileChannel(self._run, identifier, (uid, gid))
        try:
            file = CmFile(self, identifier, pid, inner_pid_of(pid), channel, self._cm.adapter.guid)
            self._listen_to(file)
        except OSError:
            channel.close()
            raise
        self.files[identifier] = file
        return file

    def _listen_to(self, file: CmFile) -> None:
        self._watch(file.channel.doorbell, lambda events: self._doorbell(file, events))
        with contextlib.suppress(StateError):  # no descriptor: the doorbell's end tells, too
            if file.pidfd < 0:
                file.pidfd = open_process(file.pid)
        if file.pidfd >= 0:
            self._watch(file.pidfd, lambda _: self.close(file))

    def _be_deaf_to(self, file: CmFile) -> None:
        self._unwatch(file.channel.doorbell)
        if file.pidfd >= 0:
            self._unwatch(file.pidfd)
            os.close(file.pidfd)
            file.pidfd = -1

    def _doorbell(self, file: CmFile, events: int) -> None:
        if events & select.EPOLLIN:
            file.channel.silence_doorbell()
        elif events & (select.EPOLLHUP | select.EPOLLERR):
            self.close(file)

    def close(self, file: CmFile) -> None:
        """The program closed it or ended: its ids disconnect and are freed."""
        if self.files.pop(file.id, None) is None:
            return
        self._be_deaf_to(file)
        self._cm.close(file.queue, self._clock())
        file.channel.close()

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def hold(self, file: CmFile) -> None:
        """Its program is frozen: be deaf to its end, let its ids stand still."""
        self._be_deaf_to(file)
        self._cm.hold(file.queue, self._clock())

    def release(self, file: CmFile) -> None:
        """Its program runs again, here. Raises StateError, and changes nothing, when no descriptor is left."""
        if file.pidfd < 0:
            file.pidfd = open_process(file.pid)
        self._cm.release(file.queue, self._clock())
        self._listen_to(file)
        if file.pidfd < 0:
            self.close(file)  # it ended while it was held

    def discard(self, file: CmFile) -> None:
        """Forget a held one without a message."""
        if self.files.pop(file.id, None) is not None:
            self._be_deaf_to(file)
            self._cm.discard(file.queue)
            file.channel.close()

    def dump(self, files: list[CmFile]) -> list[dict[str, Any]]:
        """Records for an image; nothing is changed."""
        return checkpoint.dump(self._cm, files)

    def restore(self, plain: list[dict[str, Any]], addresses: dict[bytes, bytes]) -> list[CmFile]:
        """Make the opens of an image, all held, or none. `addresses`: IP address there → here. Raises ImageError."""
        records = checkpoint.parse(plain)
        made: list[CmFile] = []

        def make(record: FileRecord) -> CmFile:
            if record.id in self.files:
                raise ImageError(f"rdma_cm file {record.id} exists here already")
            channel = FileChannel(self._run, record.id, (record.uid, record.gid))
            try:
                channel.load_mailbox(bytes.fromhex(record.mailbox))
                file = CmFile(self, record.id, None, record.inner_pid, channel, bytes.fromhex(record.guid))
            except BaseException:
                channel.close()
                raise
            self.files[file.id] = file
            made.append(file)
            return file

        try:
            return checkpoint.restore(self._cm, records, make, addresses, self._clock())
        except ImageError:
            for file in made:
                self.discard(file)
            raise

    def summary(self, file: CmFile) -> dict[str, Any]:
        """Plain data of one for the management socket."""
        return checkpoint.summary(self._cm, file)

    def command(self, file: CmFile, sequence: int, message: bytes) -> None:
        """Run one command and answer it."""
        error, data = 0, b""
        try:
            data = ucma.execute(self._cm, file, message, self._clock())[:MAILBOX_DATA]
        except VerbsError as fault:
            error = fault.number
            if self.trace and error != errno.EAGAIN:
                self.trace(f"{file.id} {name(message)}: {fault}")
        except Exception:  # a fault of ours must not end every other program's connections
            error = errno.EIO
            traceback.print_exc()
        file.channel.answer(sequence, error, data)
        if self.trace:
            self.trace(f"{file.id} {name(message)} in={len(message)} error={error}")

    def of(self, pids: set[int]) -> list[CmFile]:
        """The opens of these processes."""
        return [file for file in self.files.values() if file.pid in pids]

    def close_all(self) -> None:
        """The NIC ends."""
        for file in list(self.files.values()):
            self.close(file)


def name(message: bytes) -> str:
    """A command's name, for the trace."""
    number = int.from_bytes(message[:4], "little")
    try:
        return f"rdma_cm {ucma.Command(number).name}"
    except ValueError:
        return f"rdma_cm command {number}"


class Sources:
    """Which of the host's addresses a packet to somewhere would have: the kernel's routing table says."""

    def __init__(self, interface: int) -> None:
        """interface: its index."""
        self._interface = interface

    def __call__(self, destination: Endpoint, source: bytes | None) -> bytes:
        """source: the address that it is to have. Raises VerbsError with the kernel's errno."""
        family = socket.AF_INET if len(destination.ip) == 4 else socket.AF_INET6
        local = destination.ip[:2] in (b"\xfe\x80", b"\xff\x02")
        # Who has an address of the device sends over its interface.
        index = self._interface if source is not None else destination.scope or self._interface
        scope = (0, index if local else 0) if family == socket.AF_INET6 else ()
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                if source is not None:
                    with contextlib.suppress(OSError):  # an address of the device that the host has not
                        probe.bind((socket.inet_ntop(family, source), 0, *scope))
                probe.connect((socket.inet_ntop(family, destination.ip), _ROCE_PORT, *scope))
                found = socket.inet_pton(family, probe.getsockname()[0].partition("%")[0])
        except OSError as error:
            raise VerbsError(error.errno or errno.ENETUNREACH, "no way there") from None
        return source or found


class Memberships:
    """Tells the network of groups (IGMP, MLD): ordinary sockets join them, and the kernel does the rest."""

    SHARED: Final = 20
    """Groups of one socket: what the kernel allows for IPv4, unless it is told otherwise."""

    def __init__(self, interface: int) -> None:
        """interface: its index."""
        self._interface = interface
        self._joined: dict[bytes, socket.socket] = {}
        self._used: Counter[socket.socket] = Counter()

    def __call__(self, address: bytes, member: bool) -> None:
        """Join or leave a group. A kernel that refuses only means that nobody is told."""
        with contextlib.suppress(OSError):
            if member:
                self._join(address)
            elif address in self._joined:
                self._leave(address, self._joined.pop(address))

    def _join(self, address: bytes) -> None:
        family = socket.AF_INET if len(address) == 4 else socket.AF_INET6
        known = next((sock for sock, used in self._used.items() if sock.family == family and used < self.SHARED), None)
        joined = known or socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._joined[address] = joined
        self._used[joined] += 1
        self._tell(joined, address, socket.IP_ADD_MEMBERSHIP, socket.IPV6_JOIN_GROUP)

    def _leave(self, address: bytes, joined: socket.socket) -> None:
        self._used[joined] -= 1
        if not self._used[joined]:
            del self._used[joined]
            joined.close()
        else:
            self._tell(joined, address, socket.IP_DROP_MEMBERSHIP, socket.IPV6_LEAVE_GROUP)

    def _tell(self, joined: socket.socket, address: bytes, option: int, option6: int) -> None:
        interface = struct.pack("=i", self._interface)
        if len(address) == 4:
            joined.setsockopt(socket.IPPROTO_IP, option, address + bytes(4) + interface)
        else:
            joined.setsockopt(socket.IPPROTO_IPV6, option6, address + interface)

    def close(self) -> None:
        """Leave all."""
        for joined in self._used:
            joined.close()
        self._used.clear()
        self._joined.clear()
