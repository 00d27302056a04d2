"""The client's end of the management socket, for the testbed, its agents and the tests."""

from __future__ import annotations

import json
import os
import socket
from typing import Any


class ControlError(Exception):
    """The NIC refused a command, or does not answer. `hint` says what to do, if anything."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class ControlClient:
    """A connection to a NIC's control.sock. The commands and their arguments are listed in docs/nic-control.md."""

    def __init__(self, path: str | os.PathLike[str] = "/run/migros/nic/control.sock", timeout: float = 30.0) -> None:
        """timeout: seconds for each answer. Raises ControlError when no NIC listens at `path`."""
        self._path = str(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.settimeout(timeout)
        self._buffer = b""
        try:
            self._socket.connect(self._path)
        except OSError as error:
            self._socket.close()
            raise ControlError(f"no NIC answers at {self._path}: {error.strerror}", "is the NIC started?") from None

    def call(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Send one command and return its answer without `ok`. Raises ControlError."""
        line = json.dumps({"command": command, **arguments}).encode() + b"\n"
        try:
            self._socket.sendall(line)
            while b"\n" not in self._buffer:
                data = self._socket.recv(65536)
                if not data:
                    raise ControlError(f"the NIC at {self._path} closed the connection during {command}")
                self._buffer += data
        except TimeoutError:
            raise ControlError(f"the NIC at {self._path} did not answer {command} in time") from None
        except OSError as error:
            raise ControlError(
                f"the NIC at {self._path} closed the connection during {command}: {error.strerror}"
            ) from None
        answer, _, self._buffer = self._buffer.partition(b"\n")
        result: dict[str, Any] = json.loads(answer)
        if not result.pop("ok", False):
            raise ControlError(str(result.get("error", "refused")), str(result.get("hint", "")))
        return result

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def __enter__(self) -> ControlClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
