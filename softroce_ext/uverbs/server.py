"""The command socket: datagrams from bridges in, answers out through each context's own mailbox and FIFO.

The sender of a datagram is the process that the kernel names (SCM_CREDENTIALS), whatever the message says; a context
obeys only the process that opened it.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import stat
import struct
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from softroce_ext.device.adapter import Adapter
from softroce_ext.device.errors import NotYet, VerbsError
from softroce_ext.device.memory import ProcessMemory
from softroce_ext.device.opening import Opening, inner_pid_of
from softroce_ext.device.user_context import UserContext
from softroce_ext.uverbs import abi
from softroce_ext.uverbs.channel import LAYOUT_VERSION, MAILBOX_DATA, FileChannel
from softroce_ext.uverbs.commands_qp import HANDLERS
from softroce_ext.uverbs.sysfs import DEVICE_NUMBER

MAGIC: Final = 0x4252474D
_REQUEST = struct.Struct("<IHHII48s")
"""magic, version, kind, sequence, reserved, name: ahead of every datagram."""
_OPENED = struct.Struct("<iIII48s")
"""error, major, minor, layout version, context id: the answer to OPEN."""
_KIND_OPEN, _KIND_COMMAND, _KIND_OPEN_CM = 1, 2, 3
_CREDENTIALS = struct.Struct("<iII")
_OPEN_NAME = re.compile(rb"open-[0-9a-f-]{1,40}")
_MAX_DATAGRAM: Final = 65536
MAX_CONTEXTS: Final = 256
"""Openings of the device that one process may have at a time: each costs the NIC descriptors."""
_NEIGHBOUR_TIMEOUT: Final = 3.0
"""Seconds that ibv_modify_qp waits for the peer's MAC, about as long as the kernel's ib_resolve_eth_dmac."""
_TURN: Final = 0.005
"""Seconds of commands before frames get their turn."""
_ALL_TURNS: Final = 64
"""Turns of `serve_all`: other programs can keep sending."""
_ALL_TURN: Final = 1.0
"""Seconds of one of them."""


@dataclass(slots=True)
class _Waiting:
    """A command that waits for a neighbour's MAC."""

    context: UserContext
    sequence: int
    message: bytes
    deadline: float


class RdmaCm(Protocol):
    """The openings of rdma_cm, which use the same socket (`cm.server.CmFiles`)."""

    def open(self, identifier: str, pid: int, uid: int, gid: int) -> Opening:
        """A process opens rdma_cm. Raises OSError or VerbsError."""

    def serve(self, identifier: str, pid: int, sequence: int, message: bytes) -> bool:
        """Run and answer a command of an opening of process `pid`; False when there is no such opening."""


class CommandServer:
    """Owns uverbs.sock: opens user contexts and runs their commands."""

    def __init__(
        self,
        run_directory: Path,
        adapter: Adapter,
        *,
        opened: Callable[[UserContext], None],
        before_command: Callable[[UserContext], None],
        cm: RdmaCm | None,
    ) -> None:
        """opened: called with each new context; before_command: called with the context of each command, so that
        doorbells that were rung before it are served first; cm: None when there is no rdma_cm.
        """
        self._run = run_directory
        self._adapter = adapter
        self._opened = opened
        self._before_command = before_command
        self._cm = cm
        self._waiting: list[_Waiting] = []
        self._counter = 0
        self.trace: Callable[[str], None] | None = None
        """Takes one line for each command."""
        self.path = run_directory / "uverbs.sock"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind(str(self.path))
        os.chmod(self.path, 0o666)
        # Programs of any user put the FIFO for the answer to OPEN here.
        (run_directory / "ctx").mkdir(exist_ok=True)
        os.chmod(run_directory / "ctx", 0o1777)

    def fileno(self) -> int:
        """For the event loop."""
        return self._socket.fileno()

    def serve(self, limit: int = 16, seconds: float = _TURN) -> int:
        """Serve up to `limit` waiting datagrams, but start none after `seconds`; returns how many there were."""
        end = time.monotonic() + seconds
        for served in range(limit):
            if served and time.monotonic() > end:
                return served
            try:
                message, ancillary, _, _ = self._socket.recvmsg(
                    _MAX_DATAGRAM, socket.CMSG_SPACE(_CREDENTIALS.size), socket.MSG_DONTWAIT
                )
            except (BlockingIOError, InterruptedError):
                return served
            for level, kind, data in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
                    self._datagram(message, *_CREDENTIALS.unpack(data[: _CREDENTIALS.size]))
        return limit

    def serve_all(self) -> None:
        """Serve every datagram that has been sent by now."""
        for _ in range(_ALL_TURNS):
            if not self.serve(64, _ALL_TURN):
                break

    def _datagram(self, message: bytes, pid: int, uid: int, gid: int) -> None:
        if len(message) < _REQUEST.size:
            self._count("datagram_length")
            return
        magic, version, kind, sequence, _, name = _REQUEST.unpack_from(message)
        if magic != MAGIC or version != LAYOUT_VERSION or not _KIND_OPEN <= kind <= _KIND_OPEN_CM:
            self._count("datagram_kind")
            return
        name = name.rstrip(b"\0")
        if kind in (_KIND_OPEN, _KIND_OPEN_CM):
            self._open(name, pid, uid, gid, self._new_context if kind == _KIND_OPEN else self._new_cm_file)
            return
        identifier = name.decode("ascii", "replace")
        context = self._adapter.contexts.get(identifier)
        body = message[_REQUEST.size :]
        if context is None and self._cm is not None and self._cm.serve(identifier, pid, sequence, body):
            return
        if context is None or context.pid != pid:
            # A wrong pid is a forked child's, or another program's that guesses. No answer could reach it.
            self._count("datagram_context")
        elif any(item.context is context for item in self._waiting):
            self._count("datagram_busy")  # the mailbox holds one answer: a program sends one command at a time
        else:
            self._command(context, sequence, body)

    def _count(self, reason: str) -> None:
        self._adapter.engine.counters["refused_" + reason] += 1

    # -- opening ------------------------------------------------------------------------------------------------

    def _open(self, name: bytes, pid: int, uid: int, gid: int, make: Callable[[int, int, int], Opening]) -> None:
        if not _OPEN_NAME.fullmatch(name):
            self._count("open")
            return
        try:
            answer = os.open(
                self._run / "ctx" / name.decode(), os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
            )
        except OSError:
            self._count("open")
            return
        try:
            status = os.fstat(answer)
            if not stat.S_ISFIFO(status.st_mode) or status.st_uid not in (uid, os.geteuid()):
                self._count("open")  # every user can write to the directory; this FIFO is not the sender's
                return
            try:
                opening = make(pid, uid, gid)
            except (OSError, VerbsError) as error:
                self._count("open")
                number = error.number if isinstance(error, VerbsError) else error.errno or errno.EIO
                os.write(answer, _OPENED.pack(number, 0, 0, LAYOUT_VERSION, b""))
                return
            os.write(answer, _OPENED.pack(0, *DEVICE_NUMBER, LAYOUT_VERSION, opening.id.encode()))
        except OSError:
            return  # the program ended while it waited; its pidfd says so, too
        finally:
            os.close(answer)

    def _identifier(self) -> str:
        step = 1
        while True:
            identifier = f"{self._adapter.number_base}-{self._counter}"
            self._counter += step
            step *= 2  # any user can make folders with the next names, and as many as there is room for
            if identifier not in self._adapter.contexts and not (self._run / "ctx" / identifier).exists():
                return identifier

    def _new_cm_file(self, pid: int, uid: int, gid: int) -> Opening:
        if self._cm is None:
            raise VerbsError(errno.ENXIO, "there is no rdma_cm here")
        return self._cm.open(self._identifier(), pid, uid, gid)

    def _new_context(self, pid: int, uid: int, gid: int) -> UserContext:
        if sum(context.pid == pid for context in self._adapter.contexts.values()) >= MAX_CONTEXTS:
            raise VerbsError(errno.EMFILE, f"process {pid} has {MAX_CONTEXTS} contexts")
        inner = inner_pid_of(pid)
        identifier = self._identifier()
        channel = FileChannel(self._run, identifier, (uid, gid))
        context = UserContext(identifier, pid, inner, channel, ProcessMemory(pid))
        self._adapter.contexts[identifier] = context
        try:
            self._opened(context)
        except OSError:
            self._adapter.forget(context)
            raise
        return context

    # -- commands -----------------------------------------------------------------------------------------------

    def _command(self, context: UserContext, sequence: int, message: bytes) -> None:
        self._before_command(context)
        started = time.monotonic()
        error, data, install = 0, b"", ""
        operation = -1
        try:
            operation, _in_words, out_words = abi.HEADER.unpack_from(message)
            if operation & ~abi.COMMAND_BITS:
                raise VerbsError(errno.EINVAL, f"command {operation:#x}")
            handler = HANDLERS.get(operation)
            if handler is None:
                raise VerbsError(errno.EOPNOTSUPP)
            body = memoryview(message)[abi.HEADER.size :]
            needed, room = abi.SIZES.get(operation, (0, 0))
            if len(body) < needed or 4 * out_words < room:
                raise VerbsError(errno.ENOSPC, f"{len(body)} bytes, {out_words} words for the response")
            if operation & abi.EXTENDED:
                _, _provider_in, provider_out, _ = abi.EX_HEADER.unpack_from(body)
                answer = handler(self._adapter, context, body[abi.EX_HEADER.size :])
                core = answer.data[: 8 * out_words].ljust(8 * out_words, b"\0")
                data = core + answer.provider[: 8 * provider_out]
            else:
                answer = handler(self._adapter, context, body)
                data = answer.data[: 4 * out_words]
            data, install = data[:MAILBOX_DATA], answer.install
        except NotYet:
            self._waiting.append(_Waiting(context, sequence, message, started + _NEIGHBOUR_TIMEOUT))
            return
        except VerbsError as fault:
            error = fault.number
            if self.trace:
                self.trace(f"{context.id} {_name(operation)}: {fault}")
        except (struct.error, IndexError):
            error = errno.ENOSPC  # a command shorter than its structure
        except OSError as fault:  # no descriptor or no memory left, or the program has replaced a file
            error = fault.errno or errno.EIO
        except Exception:  # a defect here must not end every other program's connections
            error = errno.EIO
            traceback.print_exc()
        if error:
            self._count("command_" + errno.errorcode.get(error, str(error)))
        context.channel.answer(sequence, error, data, install)
        if self.trace:
            duration = (time.monotonic() - started) * 1e6
            self.trace(f"{context.id} {_name(operation)} in={len(message)} error={error} {duration:.0f}us")

    @property
    def waiting(self) -> bool:
        """Whether commands wait for a neighbour: call `retry` every few milliseconds."""
        return bool(self._waiting)

    def retry(self, now: float) -> None:
        """Try the waiting commands again; those that waited too long are answered ETIMEDOUT."""
        waiting, self._waiting = self._waiting, []
        for item in waiting:
            if item.context.id not in self._adapter.contexts:
                continue
            if now >= item.deadline:
                item.context.channel.answer(item.sequence, errno.ETIMEDOUT)
                continue
            self._command(item.context, item.sequence, item.message)
            if self._waiting and self._waiting[-1].context is item.context:
                self._waiting[-1].deadline = item.deadline

    def fail_waiting(self, context: UserContext) -> None:
        """Answer the waiting command of `context` now (a checkpoint must not find one in progress)."""
        for item in [item for item in self._waiting if item.context is context]:
            self._waiting.remove(item)
            context.channel.answer(item.sequence, errno.ETIMEDOUT)

    def close(self) -> None:
        """Close and remove the socket."""
        self._socket.close()
        self.path.unlink(missing_ok=True)


def _name(operation: int) -> str:
    try:
        return abi.Command(operation).name
    except ValueError:
        return f"command {operation:#x}"
