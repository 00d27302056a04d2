"""The agent's end of CRIU's hooks: a Unix socket to which the plugin and the action script connect, report and wait.

Both are C programs of `softroce_ext.native` (`criu_hook.c`, `criu_notify.c`, where the lines are described). A caller
waits for one named call at a time. CRIU is blocked until the call is answered, and takes the end of the agent, whose
socket the kernel closes, for a "no". Thus an agent that dies leaves no program frozen.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from softroce_ext.native import build
from testbed.checkpoint.criu_log import LogError

ENVIRONMENT = "TESTBED_CRIU_SOCKET"
STAGES = "TESTBED_CRIU_STAGES"
MAX_SOCKET_PATH = 107
"""Longest path of a Unix socket, in bytes (unix(7): sun_path without its terminating zero)."""


class CriuFailed(Exception):
    """CRIU failed, ended early or did not call in time. The message has CRIU's own reason if it logged one."""

    def __init__(self, message: str, errors: Sequence[LogError] = ()) -> None:
        super().__init__(message)
        self.errors = tuple(errors)
        """The errors that CRIU logged."""

    def has(self, number: int) -> bool:
        """Whether one of CRIU's errors was this errno."""
        return any(error.number == number for error in self.errors)


@dataclass(slots=True)
class Call:
    """One call of CRIU, which may wait for an answer."""

    name: str
    """"pause", "checkpoint" (the plugin) or an action script's stage, such as "post-dump"."""
    pid: int
    """The process that CRIU names, as this process numbers it; 0 if it names none."""
    at: float
    """time.monotonic() when it was read."""
    _connection: socket.socket

    def answer(self, go: bool) -> None:
        """Let CRIU continue, or refuse. It is no error here if CRIU has ended; its exit status says so."""
        with contextlib.suppress(OSError):
            self._connection.sendall(b"go\n" if go else b"abort\n")


class Hooks:
    """A socket that listens at `path` from construction to `close`. Used by one thread at a time."""

    def __init__(self, path: Path) -> None:
        if len(os.fsencode(path)) > MAX_SOCKET_PATH:
            raise CriuFailed(f"the socket's path is longer than {MAX_SOCKET_PATH} bytes: {path}")
        self.path = path
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(8)
        self._connections: dict[int, tuple[socket.socket, bytearray]] = {}
        self._calls: list[Call] = []

    def environment(self, *stages: str) -> dict[str, str]:
        """The environment variables that tell CRIU's hooks where to call and at which stages to wait."""
        return {ENVIRONMENT: str(self.path), STAGES: ",".join(stages)}

    def wait(self, name: str, process: subprocess.Popen[bytes], timeout: float) -> Call:
        """Wait for the next call `name`. Raises CriuFailed if CRIU (`process`) ends first or the time is up."""
        deadline = time.monotonic() + timeout
        watch = os.pidfd_open(process.pid) if process.returncode is None else -1
        try:
            while True:
                for index, call in enumerate(self._calls):
                    if call.name == name:
                        return self._calls.pop(index)
                left = deadline - time.monotonic()
                if left <= 0:
                    raise CriuFailed(f"CRIU did not reach {name!r} within {timeout:g} s")
                sources: list[int] = [self._listener.fileno(), *self._connections]
                if watch >= 0:
                    sources.append(watch)
                ready = select.select(sources, [], [], left)[0]
                self._take(ready)
                if (watch < 0 or watch in ready) and not any(call.name == name for call in self._calls):
                    raise CriuFailed(f"CRIU ended with code {process.wait()} before {name!r}")
        finally:
            if watch >= 0:
                os.close(watch)

    def _take(self, ready: list[int]) -> None:
        """Accept connections and split what has arrived into calls."""
        now = time.monotonic()
        if self._listener.fileno() in ready:
            connection, _ = self._listener.accept()
            self._connections[connection.fileno()] = (connection, bytearray())
            # The call has usually arrived with the connection.
            if select.select([connection], [], [], 0)[0]:
                ready = [*ready, connection.fileno()]
        for descriptor in ready:
            if descriptor not in self._connections:
                continue
            connection, rest = self._connections[descriptor]
            data = connection.recv(4096)
            if not data:
                del self._connections[descriptor]
                connection.close()
                continue
            rest += data
            while (end := rest.find(b"\n")) >= 0:
                words = rest[:end].decode("ascii", "replace").split()
                del rest[: end + 1]
                if words and words[0] == "script":
                    words = words[1:]
                if words:
                    pid = int(words[1]) if len(words) > 1 and words[1].isdigit() else 0
                    self._calls.append(Call(words[0], pid, now, connection))

    def close(self) -> None:
        """Stop listening and close every connection, which is a "no" for a hook that waits."""
        for connection, _ in self._connections.values():
            connection.close()
        self._connections.clear()
        self._listener.close()
        self.path.unlink(missing_ok=True)


def action_script() -> str:
    """The path of the compiled action script. Raises BuildError."""
    return str(build.path("criu_notify"))


def plugin_directory() -> str:
    """The folder that contains the compiled plugin and no other library. Raises BuildError."""
    return str(build.path("criu_hook").parent)
