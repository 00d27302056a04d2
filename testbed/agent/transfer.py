"""Files from one agent to another, over TCP between node addresses.

These are checkpoint images, the NIC's image and an application's folder. They cross the emulated data network, so that
the transfer takes as long as the topology makes it.

    sender                                             receiver
    {"token"}\\n                                    →   wrong token: closed without an answer
    {"entries", "bytes"}\\n                        →
    for each entry:
      {"name", "kind", "mode", "uid", "gid", "size", "target"}\\n
      size bytes, CRC-32 (u32 little-endian)         →   written below the folder that the name's first part stands for
                                                    ←  {"ok": true, "bytes"}\\n or {"ok": false, "error"}\\n

`kind` is "file", "dir" or "link" (with `target` and no bytes). A receiver that cannot store an entry answers with the
reason and reads on for a moment, so that the answer is not lost in a reset; the sender reports that answer rather than
the broken connection.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import secrets
import select
import socket
import stat
import struct
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

try:
    from isal.isal_zlib import crc32  # ten times as fast as zlib, where it is installed
except ImportError:
    from zlib import crc32

CONNECT_SECONDS = 10.0
STALL_SECONDS = 20.0
"""Longest wait for the other side to send or take a byte."""
_CHUNK = 1 << 20
_MAX_LINE = 1 << 16
_CRC = struct.Struct("<I")


class TransferFailed(Exception):
    """The files did not arrive. The message says which side failed, and why."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One file, folder or symbolic link to send."""

    name: str
    """Name at the destination, such as "images/core-1.img"; its first part names a folder of the receiver."""
    path: Path
    """Its path on this host."""


@dataclass(slots=True)
class Received:
    """What a transfer has brought."""

    size: int = 0
    """Bytes of all files."""
    kept: dict[str, bytes] = field(default_factory=dict)
    """The files that the receiver asked to keep in memory instead, by name."""
    began: float = 0.0
    """time.monotonic() at which the first byte arrived."""


def below(folder: Path, label: str) -> list[Entry]:
    """List every file, folder and symbolic link below `folder` as `label`/…, folders before their content.

    Sockets, FIFOs and devices are passed over, because they have no meaning on another host.
    """
    entries = []
    for place, folders, files in os.walk(folder):
        for name in sorted([*folders, *files]):
            path = Path(place, name)
            kind = stat.S_IFMT(path.lstat().st_mode)
            if kind in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK):
                entries.append(Entry(f"{label}/{path.relative_to(folder).as_posix()}", path))
    return entries


class Sender:
    """A connection to a waiting `Receiver`, made ahead of time, so that it is not set up during the blackout."""

    def __init__(self, address: str, port: int, token: str, source: str | None = None) -> None:
        """Connect, from this host's address `source` if given, which decides the path. Raises TransferFailed."""
        try:
            self._connection = socket.create_connection(
                (address, port), CONNECT_SECONDS, source_address=(source, 0) if source else None
            )
        except OSError as error:
            why = error.strerror or error
            raise TransferFailed(f"the destination at {address}:{port} cannot be reached: {why}") from error
        self._connection.settimeout(STALL_SECONDS)
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            self._connection.sendall(json.dumps({"token": token}).encode() + b"\n")
        except OSError as error:
            self.close()
            raise TransferFailed(f"the connection to the destination broke: {error.strerror or error}") from error

    def send(self, entries: Iterable[Entry]) -> int:
        """Send the entries and return their size in bytes once all of them are stored. Raises TransferFailed."""
        listed = list(entries)
        heads = [_describe(entry) for entry in listed]
        total = sum(int(head["size"]) for head in heads)
        with self._connection as connection:
            try:
                _send_line(connection, {"entries": len(heads), "bytes": total})
                for entry, head in zip(listed, heads, strict=True):
                    _send_entry(connection, entry, head)
            except OSError as error:
                why = _complaint(connection) or f"the connection to the destination broke: {error.strerror or error}"
                raise TransferFailed(why) from error
            complaint = _complaint(connection)
            if complaint is not None:
                raise TransferFailed(complaint)
        return total

    def close(self) -> None:
        """Close the connection, which makes the receiver's `receive` fail. Idempotent."""
        self._connection.close()


def _describe(entry: Entry) -> dict[str, Any]:
    try:
        status = entry.path.lstat()
        head = {"name": entry.name, "mode": stat.S_IMODE(status.st_mode), "uid": status.st_uid, "gid": status.st_gid}
        if stat.S_ISDIR(status.st_mode):
            return head | {"kind": "dir", "size": 0}
        if stat.S_ISLNK(status.st_mode):
            return head | {"kind": "link", "size": 0, "target": os.readlink(entry.path)}
        return head | {"kind": "file", "size": status.st_size}
    except OSError as error:
        raise TransferFailed(f"the source cannot read {entry.path}: {error.strerror}") from error


def _send_line(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message, separators=(",", ":")).encode() + b"\n", socket.MSG_MORE)


def _send_entry(connection: socket.socket, entry: Entry, head: dict[str, Any]) -> None:
    size = head["size"]
    _send_line(connection, head)
    if head["kind"] != "file":
        return
    checksum = 0
    if size:
        with entry.path.open("rb") as file, mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as content:
            checksum = crc32(content)
            if connection.sendfile(file, 0, size) != size:
                raise OSError(errno.EIO, f"{entry.path} became shorter while it was sent")
    connection.sendall(_CRC.pack(checksum), socket.MSG_MORE)


def _complaint(connection: socket.socket) -> str | None:
    """Read the receiver's answer: None if everything is stored, else what failed, also if there is no answer."""
    line = b""
    try:
        connection.shutdown(socket.SHUT_WR)
        while not line.endswith(b"\n") and len(line) < _MAX_LINE:
            data = connection.recv(4096)
            if not data:
                break
            line += data
        answer = json.loads(line)
        return None if answer.get("ok") else f"the destination refused: {answer.get('error')}"
    except TimeoutError:
        return f"the destination did not answer within {STALL_SECONDS:g} s"
    except (OSError, ValueError):
        return "the destination ended before it had stored everything"


class Receiver:
    """One expected transfer: it listens from construction on and accepts the first sender that knows the token."""

    def __init__(self, address: str) -> None:
        """Listen on `address`, at a port that the kernel chooses. Raises TransferFailed."""
        try:
            self._listener = socket.create_server((address, 0), backlog=4)
        except OSError as error:
            raise TransferFailed(f"cannot listen on {address}: {error.strerror}") from error
        self.port: int = self._listener.getsockname()[1]
        self.token = secrets.token_hex(16)
        self._wake_read, self._wake_write = os.pipe()
        self._connection: socket.socket | None = None

    def close(self) -> None:
        """Stop listening; a `receive` that waits ends with TransferFailed. Idempotent."""
        if self._wake_write >= 0:
            os.close(self._wake_write)
            self._wake_write = -1
        if self._connection is not None:
            with contextlib.suppress(OSError):  # the connection may have ended by itself
                self._connection.shutdown(socket.SHUT_RDWR)

    def receive(
        self,
        folders: dict[str, Path],
        keep: Iterable[str] = (),
        timeout: float = 600.0,
        on_start: Callable[[], None] = lambda: None,
    ) -> Received:
        """Wait for the sender and store what it sends. Raises TransferFailed after sending the reason to the sender.

        `folders`: first part of a name → existing folder; other names are refused. `keep`: names that are returned
        instead of stored. `on_start` is called when the first byte arrives.
        """
        try:
            connection, stream = self._accept(timeout)
            self._connection = connection
            with connection:
                connection.settimeout(timeout)  # the sender connects ahead of time
                head = stream.line()
                connection.settimeout(STALL_SECONDS)
                received = Received(began=time.monotonic())
                on_start()
                try:
                    for _ in range(int(head["entries"])):
                        _store(stream, folders, frozenset(keep), received)
                except TransferFailed as failure:
                    _refuse(connection, str(failure))
                    raise
                connection.sendall(json.dumps({"ok": True, "bytes": received.size}).encode() + b"\n")
                return received
        except (OSError, ValueError, KeyError) as error:
            raise TransferFailed(f"the connection to the source broke: {error}") from error
        finally:
            self._listener.close()
            os.close(self._wake_read)
            self._wake_read = -1

    def _accept(self, timeout: float) -> tuple[socket.socket, _Stream]:
        deadline = time.monotonic() + timeout
        while True:
            left = max(0.0, deadline - time.monotonic())
            ready = select.select([self._listener.fileno(), self._wake_read], [], [], left)[0]
            if not ready:
                raise TransferFailed(f"no image arrived within {timeout:g} s")
            if self._wake_read in ready:
                raise TransferFailed("the transfer was cancelled")
            connection, _ = self._listener.accept()
            connection.settimeout(STALL_SECONDS)
            stream = _Stream(connection)
            try:
                if secrets.compare_digest(str(stream.line().get("token")), self.token):
                    return connection, stream
            except (OSError, TransferFailed):
                pass
            connection.close()  # it does not know the token


class _Stream:
    """Reads lines and blocks from a socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._buffer = bytearray(_CHUNK)
        self._view = memoryview(self._buffer)
        self._from = self._to = 0

    def _fill(self) -> None:
        if self._from == self._to:
            self._from = self._to = 0
        elif self._to == _CHUNK:
            kept = bytes(self._view[self._from : self._to])
            self._view[: len(kept)] = kept
            self._from, self._to = 0, len(kept)
        try:
            got = self._connection.recv_into(self._view[self._to :])
        except OSError as error:
            raise TransferFailed(f"the connection to the source broke: {error}") from error
        if not got:
            raise TransferFailed("the source closed the connection before everything had arrived")
        self._to += got

    def line(self) -> dict[str, Any]:
        """Read the next line, a JSON object."""
        while (end := self._buffer.find(b"\n", self._from, self._to)) < 0:
            if self._to - self._from > _MAX_LINE:
                raise TransferFailed("the source does not speak this protocol")
            self._fill()
        text = bytes(self._view[self._from : end])
        self._from = end + 1
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise TransferFailed("the source does not speak this protocol")
        return value

    def block(self, size: int, take: Callable[[memoryview], object]) -> None:
        """Pass the next `size` bytes to `take`, in pieces that are valid only during the call."""
        while size:
            if self._from == self._to:
                self._fill()
            piece = self._view[self._from : min(self._to, self._from + size)]
            take(piece)
            self._from += len(piece)
            size -= len(piece)


def _store(stream: _Stream, folders: dict[str, Path], keep: frozenset[str], received: Received) -> None:
    """Store one entry from the stream."""
    head = stream.line()
    name, kind, size = str(head["name"]), head["kind"], int(head["size"])
    parts = PurePosixPath(name).parts
    if len(parts) < 2 or parts[0] not in folders or ".." in parts:
        raise TransferFailed(f"unexpected name {name!r}; allowed: below {', '.join(folders)}")
    path = folders[parts[0]].joinpath(*parts[1:])
    try:
        if kind == "dir":
            path.mkdir(exist_ok=True)
        elif kind == "link":
            path.unlink(missing_ok=True)
            path.symlink_to(str(head["target"]))
        elif name in keep:
            received.kept[name] = _content(stream, size)
        else:
            _write(stream, path, size)
        if kind != "link" and name not in keep:
            os.chmod(path, int(head["mode"]))
            os.chown(path, int(head["uid"]), int(head["gid"]))
    except OSError as error:
        raise TransferFailed(f"{path}: {error.strerror or error}") from error
    received.size += size


def _verify(stream: _Stream, checksum: int, what: str) -> None:
    sent = bytearray()
    stream.block(_CRC.size, sent.extend)
    if _CRC.unpack(sent)[0] != checksum:
        raise TransferFailed(f"{what} arrived damaged (wrong checksum)")


def _content(stream: _Stream, size: int) -> bytes:
    content = bytearray()
    stream.block(size, content.extend)
    _verify(stream, crc32(content), "a file kept in memory")
    return bytes(content)


def _write(stream: _Stream, path: Path, size: int) -> None:
    checksum = 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

    def take(piece: memoryview) -> None:
        nonlocal checksum
        checksum = crc32(piece, checksum)
        while piece:
            piece = piece[os.write(descriptor, piece) :]

    try:
        stream.block(size, take)
    finally:
        os.close(descriptor)
    _verify(stream, checksum, str(path))


def _refuse(connection: socket.socket, why: str) -> None:
    """Send the reason, and read on for a moment: closing at once would reset the connection and lose the answer."""
    try:
        connection.sendall(json.dumps({"ok": False, "error": why}).encode() + b"\n")
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(2.0)
        until = time.monotonic() + 2.0
        while connection.recv(_CHUNK) and time.monotonic() < until:
            pass
    except OSError:
        pass
