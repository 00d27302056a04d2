"""The NIC's end of the management socket, driven by the NIC's event loop."""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

_MAX_LINE: Final = 1 << 22
_MAX_UNSENT: Final = 1 << 26
"""Bytes of answers that may wait for a reader before the next one costs it the connection."""

Respond = Callable[[dict[str, Any]], None]
"""Sends the answer to one command; may be called later than the handler returns, and once."""


class ControlServer:
    """The listening side, driven by the NIC's loop through an epoll-like register/unregister pair."""

    def __init__(
        self,
        path: Path,
        handle: Callable[[dict[str, Any], Respond], None],
        watch: Callable[[int, Callable[[int], None]], None],
        unwatch: Callable[[int], None],
        wait_for: Callable[[Callable[[float], bool]], None],
    ) -> None:
        """handle: gets each request and answers through `Respond`; watch: call back when a descriptor is readable;
        wait_for: call a function every few milliseconds until it returns True.
        """
        self.path = path
        self._handle = handle
        self._watch = watch
        self._unwatch = unwatch
        self._wait_for = wait_for
        self._connections: dict[int, tuple[socket.socket, bytearray]] = {}
        self._unsent: dict[socket.socket, bytearray] = {}
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        before = os.umask(0o177)
        try:
            self._listener.bind(str(path))
        finally:
            os.umask(before)
        self._listener.listen(16)
        watch(self._listener.fileno(), self._accept)

    def _accept(self, _events: int) -> None:
        if not self._take():
            # No descriptor is left: try again later. The listener stays readable, so epoll would report it forever.
            self._unwatch(self._listener.fileno())
            self._wait_for(self._listen_again)

    def _listen_again(self, _now: float) -> bool:
        if self._listener.fileno() >= 0:
            if not self._take():
                return False
            self._watch(self._listener.fileno(), self._accept)
        return True

    def _take(self) -> bool:
        """Accept a connection, if there is one; False: it has to wait."""
        try:
            connection, _ = self._listener.accept()
        except OSError as error:
            return error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
        connection.setblocking(False)
        self._connections[connection.fileno()] = (connection, bytearray())
        self._watch(connection.fileno(), partial(self._readable, connection.fileno()))
        return True

    def _readable(self, fd: int, _events: int) -> None:
        connection, buffer = self._connections[fd]
        try:
            data = connection.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data or len(buffer) > _MAX_LINE:
            self._drop(fd)
            return
        buffer += data
        while (end := buffer.find(b"\n")) >= 0:
            line = bytes(buffer[:end])
            del buffer[: end + 1]
            self._line(connection, line)

    def _line(self, connection: socket.socket, line: bytes) -> None:
        def respond(answer: dict[str, Any]) -> None:
            # A long answer (thousands of queue pairs) goes out as its reader takes it; the NIC does not wait.
            waiting = self._unsent.setdefault(connection, bytearray())
            idle = not waiting
            if len(waiting) > _MAX_UNSENT:
                self._drop(connection.fileno())  # the client sends commands and never reads
                return
            waiting += json.dumps(answer).encode() + b"\n"
            if idle and not self._flush(connection):
                self._wait_for(lambda _: self._flush(connection))

        try:
            request = json.loads(line)
        except (ValueError, RecursionError) as error:
            respond({"ok": False, "error": f"not a JSON line: {error}", "hint": 'send {"command": "status"}'})
            return
        if not isinstance(request, dict) or not isinstance(request.get("command"), str):
            respond(
                {"ok": False, "error": "a request is an object with a command", "hint": 'send {"command": "status"}'}
            )
            return
        self._handle(request, respond)

    def _flush(self, connection: socket.socket) -> bool:
        """Send what the socket takes; whether nothing is left to send."""
        waiting = self._unsent.get(connection)
        if waiting is None:
            return True  # dropped meanwhile
        try:
            while waiting:
                del waiting[: connection.send(waiting)]
        except BlockingIOError:
            return False
        except OSError:
            self._drop(connection.fileno())
        self._unsent.pop(connection, None)
        return True

    def _drop(self, fd: int) -> None:
        found = self._connections.pop(fd, None)
        if found is not None:
            self._unwatch(fd)
            self._unsent.pop(found[0], None)
            found[0].close()

    def close(self) -> None:
        """Close every connection and remove the socket."""
        for fd in list(self._connections):
            self._drop(fd)
        self._unwatch(self._listener.fileno())
        self._listener.close()
        self.path.unlink(missing_ok=True)
