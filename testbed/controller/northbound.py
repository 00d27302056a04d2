"""The northbound interface: JSON lines on a Unix socket that only its owner may open (mode 0600).

Each request is one line, `{"op": "move", "ip": "10.0.0.2", "to_host": "h3"}`, and so is each answer, `{"ok": true, …}`
or `{"ok": false, "error": …, "hint": …}`; docs/controller.md describes them for users. This module handles sockets and
JSON and is independent of OpenFlow: the application passes the calls that it offers.
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
    """The request is valid, but the network is not ready: a switch is missing, or did not confirm in time."""


def answer(calls: dict[str, Call], line: bytes) -> dict[str, Any]:
    """Answer one request line. Never raises because of the request's content."""
    try:
        request = json.loads(line)
    except ValueError as error:
        return _refusal(f"not JSON: {error}", 'send one object per line, such as {"op": "status"}')
    if not isinstance(request, dict) or not isinstance(request.get("op"), str):
        return _refusal("no op in the request", 'send one object per line, such as {"op": "status"}')
    op = request.pop("op")
    call = calls.get(op)
    if call is None:
        return _refusal(f"unknown op {op!r}", f"available: {', '.join(calls)}")
    try:
        inspect.signature(call).bind(**request)
    except TypeError as error:
        return _refusal(f"{op}: {error}", f"{op}{inspect.signature(call)}")
    if wrong := [key for key, value in request.items() if not isinstance(value, str)]:
        return _refusal(f"{op}: {', '.join(wrong)} must be text")
    try:
        return {"ok": True, **call(**request)}
    except RouteError as error:
        return _refusal(str(error))
    except Unready as error:
        return _refusal(str(error), "see the controller's log; `status` shows which switches are connected")


def _refusal(error: str, hint: str | None = None) -> dict[str, Any]:
    return {"ok": False, "error": error, **({"hint": hint} if hint else {})}


def listen(path: Path) -> socket.socket:
    """Create the listening socket, which is accessible only to its owner from the start."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(mask)
    listener.listen(16)
    return listener


def serve(listener: socket.socket, calls: dict[str, Call], spawn: Callable[..., Any]) -> None:
    """Accept connections until the process ends; `spawn` is the framework's function that starts a thread."""
    while True:
        connection, _ = listener.accept()
        spawn(_serve_connection, connection, calls)


def _serve_connection(connection: socket.socket, calls: dict[str, Call]) -> None:
    with connection, connection.makefile("rb") as lines:
        try:
            while line := lines.readline(LONGEST_LINE):
                connection.sendall(json.dumps(answer(calls, line)).encode() + b"\n")
        except OSError:
            pass  # The client has gone; `status` shows whether its request has been carried out.
