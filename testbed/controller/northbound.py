"""The northbound interface: JSON lines on a Unix socket that only its owner may open (mode 0600).

One request per line, `{"op": "move", "ip": "10.0.0.2", "to_host": "h3"}`, one answer per line, `{"ok": true, …}` or
`{"ok": false, "error": …, "hint": …}`. Described for users in docs/controller.md. This module knows sockets and JSON,
not OpenFlow: `Calls` is what the application offers.
"""

from __future__ import annotations

import inspect
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from testbed.controller.routes import RouteError

LONGEST_LINE: Final = 1 << 20
Call = Callable[..., dict[str, Any]]


class Unready(RuntimeError):
    """The request is right, the network is not (yet): a switch is missing, or did not confirm in time."""


def answer(calls: dict[str, Call], line: bytes) -> dict[str, Any]:
    """One request line to one answer. Never raises for what comes from outside."""
    try:
        request = json.loads(line)
    except ValueError as error:
        return _no(f"not JSON: {error}", 'one object per line: {"op": "status"}')
    if not isinstance(request, dict) or not isinstance(request.get("op"), str):
        return _no("no op", 'one object per line: {"op": "status"}')
    op = request.pop("op")
    call = calls.get(op)
    if call is None:
        return _no(f"unknown op {op!r}", f"there are: {', '.join(calls)}")
    try:
        inspect.signature(call).bind(**request)
    except TypeError as error:
        return _no(f"{op}: {error}", f"{op}{inspect.signature(call)}")
    if wrong := [key for key, value in request.items() if not isinstance(value, str)]:
        return _no(f"{op}: {', '.join(wrong)} must be text")
    try:
        return {"ok": True, **call(**request)}
    except RouteError as error:
        return _no(str(error))
    except Unready as error:
        return _no(str(error), "see the controller's log; `status` tells which switches are connected")


def _no(error: str, hint: str | None = None) -> dict[str, Any]:
    return {"ok": False, "error": error, **({"hint": hint} if hint else {})}


def listen(path: Path) -> socket.socket:
    """The listening socket, readable and writable by its owner only from its first instant."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(mask)
    listener.listen(16)
    return listener


def serve(listener: socket.socket, calls: dict[str, Call], spawn: Callable[..., Any]) -> None:
    """Accept for ever; `spawn` is the framework's way to start a thread."""
    while True:
        connection, _ = listener.accept()
        spawn(_converse, connection, calls)


def _converse(connection: socket.socket, calls: dict[str, Call]) -> None:
    with connection, connection.makefile("rb") as lines:
        try:
            while line := lines.readline(LONGEST_LINE):
                connection.sendall(json.dumps(answer(calls, line)).encode() + b"\n")
        except OSError:
            pass  # the asker has gone; its request has been carried out or not, as `status` will tell
