"""Files from one agent to another, over TCP between node addresses.

Checkpoint images, the NIC's image, an application's folder. The bytes cross the emulated data network, so that their
time is the topology's.

    sender                                             receiver
    {"token"}\\n                                    →   wrong token: closed without a word
    {"entries", "bytes"}\\n                        →
    for each entry:
      {"name", "kind", "mode", "uid", "gid", "size", "target"}\\n
      size bytes, CRC-32 (u32 little-endian)         →   written below the folder that the name's first part stands for
                                                    ←  {"ok": true, "bytes"}\\n or {"ok": false, "error"}\\n

`kind` is "file", "dir" or "link" (then `target`, no bytes). A receiver that cannot store says why and reads on for a
moment, so that its answer is not lost in a reset; the sender reports that answer rather than the broken connection.
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
    from isal.isal_zlib import crc32  # ten times zlib's speed, where it is installed
except ImportError:
    from zlib import crc32

CONNECT_SECONDS = 10.0
STALL_SECONDS = 20.0
"""Longest wait for the other side to take or give a byte."""
_CHUNK = 1 << 20
_MAX_LINE = 1 << 16
_CRC = struct.Struct("<I")


class TransferFailed(Exception):
    """The files did not arrive. The text says which side failed and why."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing to send."""

    name: str
    """Name at the destination, "images/core-1.img": its first part says which folder."""
    path: Path
    """Where it lies here."""


@dataclass(slots=True)
class Received:
    """What has arrived."""

    size: int = 0
    """Bytes of all files."""
    kept: dict[str, bytes] = field(default_factory=dict)
    """Files that the receiver wanted in memory instead, by name."""
    began: float = 0.0
    """time.monotonic() at which the first of it came."""


def below(folder: Path, label: str) -> list[Entry]:
    """Every file, folder and symbolic link below `folder`, folders before what they hold, named `label`/…

    Sockets, FIFOs and devices are passed over: they mean something only where they are.
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
    """A connection to a waiting `Receiver`, made ahead of time: nothing is left to be set up in the blackout."""

    def __init__(self, address: str, port: int, token: str, source: str | None = None) -> None:
        """Connect, from the own address `source` so that the path is the one meant. Raises TransferFailed."""
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
            raise TransferFailed(f"the destination broke off: {error.strerror or error}") from error

    def send(self, entries: Iterable[Entry]) -> int:
        """Send the entries; returns the bytes of content once all are stored there. Raises TransferFailed."""
        listed = list(entries)
        heads = [_describe(entry) for entry in listed]
        total = sum(int(head["size"]) for head in heads)
        with self._connection as connection:
            try:
                _send_line(connection, {"entries": len(heads), "bytes": total})
                for entry, head in zip(listed, heads, strict=True):
                    _send_entry(connection, entry, head)
            except OSError as error:
                why = _told(connection) or f"the destination broke off: {error.strerror or error}"
                raise TransferFailed(why) from error
            told = _told(connection)
            if told is not None:
                raise TransferFailed(told)
        return total

    def close(self) -> None:
        """Break off; the receiver's `receive` fails. Idempotent."""
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


def _told(connection: socket.socket) -> str | None:
    """The receiver's complaint, None if it is content; "…" if it says nothing."""
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
    """One expected transfer: listens from construction on, takes the first sender that knows the token."""

    def __init__(self, address: str) -> None:
        """Listen on `address`, a port of the kernel's choice. Raises TransferFailed."""
        try:
            self._listener = socket.create_server((address, 0), backlog=4)
        except OSError as error:
            raise TransferFailed(f"cannot listen on {address}: {error.strerror}") from error
        self.port: int = self._listener.getsockname()[1]
        self.token = secrets.token_hex(16)
        self._wake_read, self._wake_write = os.pipe()
        self._connection: socket.socket | None = None

    def close(self) -> None:
        """End listening; a `receive` that waits ends with TransferFailed. Idempotent."""
        if self._wake_write >= 0:
            os.close(self._wake_write)
            self._wake_write = -1
        if self._connection is not None:
            with contextlib.suppress(OSError):  # it may have ended by itself
                self._connection.shutdown(socket.SHUT_RDWR)

    def receive(
        self,
        folders: dict[str, Path],
        keep: Iterable[str] = (),
        timeout: float = 600.0,
        begun: Callable[[], None] = lambda: None,
    ) -> Received:
        """Wait for the sender and store what it sends. Raises TransferFailed, after telling the sender why.

        `folders`: first part of a name → existing folder; a name elsewhere is refused. `keep`: names that are returned
        instead of stored. `begun` is called when the first of it comes.
        """
        try:
            connection, stream = self._accept(timeout)
            self._connection = connection
            with connection:
                connection.settimeout(timeout)  # the sender has connected ahead of time
                head = stream.line()
                connection.settimeout(STALL_SECONDS)
                received = Received(began=time.monotonic())
                begun()
                try:
                    for _ in range(int(head["entries"])):
                        _store(stream, folders, frozenset(keep), received)
                except TransferFailed as failure:
                    _refuse(connection, str(failure))
                    raise
                connection.sendall(json.dumps({"ok": True, "bytes": received.size}).encode() + b"\n")
                return received
        except (OSError, ValueError, KeyError) as error:
            raise TransferFailed(f"the source broke off: {error}") from error
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
                raise TransferFailed(f"no image came within {timeout:g} s")
            if self._wake_read in ready:
                raise TransferFailed("the transfer was called off")
            connection, _ = self._listener.accept()
            connection.settimeout(STALL_SECONDS)
            stream = _Stream(connection)
            try:
                if secrets.compare_digest(str(stream.line().get("token")), self.token):
                    return connection, stream
            except (OSError, TransferFailed):
                pass
            connection.close()  # a stranger


class _Stream:
    """Lines and blocks from a socket."""

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
            raise TransferFailed(f"the source broke off: {error}") from error
        if not got:
            raise TransferFailed("the source ended in mid-transfer")
        self._to += got

    def line(self) -> dict[str, Any]:
        """The next line, a JSON object."""
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
        """Hand the next `size` bytes to `take`, in pieces that are valid during the call only."""
        while size:
            if self._from == self._to:
                self._fill()
            piece = self._view[self._from : min(self._to, self._from + size)]
            take(piece)
            self._from += len(piece)
            size -= len(piece)


def _store(stream: _Stream, folders: dict[str, Path], keep: frozenset[str], received: Received) -> None:
    """Take one entry from the stream."""
    head = stream.line()
    name, kind, size = str(head["name"]), head["kind"], int(head["size"])
    parts = PurePosixPath(name).parts
    if len(parts) < 2 or parts[0] not in folders or ".." in parts:
        raise TransferFailed(f"{name!r} belongs nowhere here")
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
        raise TransferFailed(f"{what} arrived damaged (checksum)")


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
    """Tell the sender and let it finish its sentence: closing at once would reset and lose the answer."""
    try:
        connection.sendall(json.dumps({"ok": False, "error": why}).encode() + b"\n")
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(2.0)
        until = time.monotonic() + 2.0
        while connection.recv(_CHUNK) and time.monotonic() < until:
            pass
    except OSError:
        pass
