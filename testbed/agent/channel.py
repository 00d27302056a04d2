"""JSON lines between testbed and agent: one object per line, in both directions.

    request   {"id": 7, "op": "start_app", "args": {…}}
    answer    {"id": 7, "ok": true, "result": {…}}
              {"id": 7, "ok": false, "error": "…", "blame": "input|environment|run", "hint": "…" or null}
    event     {"event": "app_exited", …}        at any time, from the agent only

The first line of an agent is the event `hello`.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from typing import Any

MAX_LINE = 64 << 20
"""Bytes of the longest line that is accepted; a longer one is a defect or an attack."""


class ChannelClosed(Exception):
    """The other side has closed the channel."""


def encode(message: dict[str, Any]) -> bytes:
    """Encode a message as one line, including the newline."""
    return json.dumps(message, separators=(",", ":"), default=str).encode() + b"\n"


class LineReader:
    """Splits a byte stream into JSON objects."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> Iterator[dict[str, Any]]:
        """Yield the objects that `data` completes. Raises ChannelClosed for a line that is none, or too long."""
        self._rest += data
        while (end := self._rest.find(b"\n")) >= 0:
            line = bytes(self._rest[:end])
            del self._rest[: end + 1]
            if not line.strip():
                continue
            try:
                message = json.loads(line)
            except ValueError as error:
                raise ChannelClosed(f"not a JSON line: {line[:200]!r}") from error
            if not isinstance(message, dict):
                raise ChannelClosed(f"not a JSON object: {line[:200]!r}")
            yield message
        if len(self._rest) > MAX_LINE:
            raise ChannelClosed(f"a line of more than {MAX_LINE} bytes")


class Channel:
    """The agent's side, on two descriptors. `send` may be called from any thread."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self._read_fd = read_fd
        self._write_fd = write_fd
        self._lock = threading.Lock()

    def messages(self) -> Iterator[dict[str, Any]]:
        """Yield the requests until the other side closes."""
        reader = LineReader()
        while data := os.read(self._read_fd, 1 << 16):
            yield from reader.feed(data)

    def send(self, message: dict[str, Any]) -> None:
        """Write one line. Raises ChannelClosed."""
        line = memoryview(encode(message))
        with self._lock:
            try:
                while line:
                    line = line[os.write(self._write_fd, line) :]
            except OSError as error:
                raise ChannelClosed(str(error)) from error
