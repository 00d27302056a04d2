"""The trace of commands: one line for each that a program has sent."""

from __future__ import annotations

import contextlib
import time


class CommandTrace:
    """An open trace; lines are appended, each with its time."""

    def __init__(self, path: str) -> None:
        """Raises OSError when the file cannot be written."""
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by `close`

    def write(self, line: str) -> None:
        """Append a line. On a full disk it is lost, and the NIC continues."""
        with contextlib.suppress(OSError):
            self._file.write(f"{time.monotonic():.6f} {line}\n".encode())

    def close(self) -> None:
        """Close the file."""
        self._file.close()
