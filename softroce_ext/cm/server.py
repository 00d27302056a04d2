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
from collections.abc import Callable
from pathlib import Path
from typing import Final

from softroce_ext.cm import ucma
from softroce_ext.cm.ids import EventQueue
from softroce_ext.cm.manager import CommunicationManager
from softroce_ext.device.addressing import is_multicast
from softroce_ext.device.errors import VerbsError
from softroce_ext.device.memory import ProcessMemory
from softroce_ext.uverbs.channel import MAILBOX_DATA, FileChannel

EVENTS: Final = "events"
MAX_FILES: Final = 256
"""Opens that one process may have at a time: each costs the NIC descriptors."""
_ROCE_PORT: Final = 4791


class CmFile:
    """One open of rdma_cm by one process."""

    def __init__(self, files: CmFiles, identifier: str, pid: int, channel: FileChannel) -> None:
        self.id = identifier
        self.pid = pid
        self.channel = channel
        self.pidfd = -1
        self._files = files
        self._memory = ProcessMemory(pid)
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
            return bytes(self._memory.read(address, length))
        except Exception:
            raise VerbsError(errno.EFAULT, f"{length} bytes at {address:#x} cannot be read") from None

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
        file = CmFile(self, identifier, pid, FileChannel(self._run, identifier, (uid, gid)))
        self.files[identifier] = file
        self._watch(file.channel.doorbell, lambda events: self._doorbell(file, events))
        with contextlib.suppress(OSError):
            file.pidfd = os.pidfd_open(pid)
            self._watch(file.pidfd, lambda _: self.close(file))
        return file

    def _doorbell(self, file: CmFile, events: int) -> None:
        if events & select.EPOLLIN:
            file.channel.silence_doorbell()
        elif events & (select.EPOLLHUP | select.EPOLLERR):
            self.close(file)

    def close(self, file: CmFile) -> None:
        """The program closed it or ended: its ids disconnect and are freed."""
        if self.files.pop(file.id, None) is None:
            return
        self._unwatch(file.channel.doorbell)
        if file.pidfd >= 0:
            self._unwatch(file.pidfd)
            os.close(file.pidfd)
        self._cm.close(file.queue, self._clock())
        file.channel.close()

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

    def __init__(self, interface: int, addresses: Callable[[], list[bytes]]) -> None:
        """interface: its index; addresses: the device's own (4 or 16 bytes each)."""
        self._interface = interface
        self._addresses = addresses

    def __call__(self, destination: bytes) -> bytes | None:
        """None: there is no route."""
        family = socket.AF_INET if len(destination) == 4 else socket.AF_INET6
        text = socket.inet_ntop(family, destination)
        local = destination[:2] in (b"\xfe\x80", b"\xff\x02")
        target = (text, _ROCE_PORT) if len(destination) == 4 else (text, _ROCE_PORT, 0, self._interface if local else 0)
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(target)
                return socket.inet_pton(family, probe.getsockname()[0].partition("%")[0])
        except OSError:
            if not is_multicast(destination):
                return None
        # A group needs no route on a host with one interface.
        return next((ip for ip in self._addresses() if len(ip) == len(destination)), None)


class Memberships:
    """Tells the network of groups (IGMP, MLD): an ordinary socket joins them, and the kernel does the rest."""

    def __init__(self, interface: int) -> None:
        """interface: its index."""
        self._interface = interface
        self._sockets: dict[bytes, socket.socket] = {}

    def __call__(self, address: bytes, member: bool) -> None:
        """Join or leave a group. A kernel that refuses only means that nobody is told."""
        if not member:
            known = self._sockets.pop(address, None)
            if known is not None:
                known.close()
            return
        family = socket.AF_INET if len(address) == 4 else socket.AF_INET6
        with contextlib.suppress(OSError):
            joined = socket.socket(family, socket.SOCK_DGRAM)
            self._sockets[address] = joined
            if family == socket.AF_INET:
                request = address + bytes(4) + struct.pack("=i", self._interface)
                joined.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, request)
            else:
                request = address + struct.pack("=i", self._interface)
                joined.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, request)

    def close(self) -> None:
        """Leave all."""
        for joined in self._sockets.values():
            joined.close()
        self._sockets.clear()
