"""Reading files of this host, such as logs and captures, for the results folder."""

from __future__ import annotations

import base64
import os
from typing import Any

from testbed.agent.apps import app_directory
from testbed.agent.operations import OperationError
from testbed.agent.service import Agent

CHUNK = 8 << 20
"""Most bytes in one answer of `read_file`."""


def read_log(agent: Agent, *, name: str, stream: str = "stdout", limit: int = 1 << 20) -> dict[str, Any]:
    """Return the last `limit` bytes of an application's stream as text: {"text", "size"}; empty if there is none."""
    if stream not in ("stdout", "stderr"):
        raise OperationError(f"no stream {stream!r}; allowed: stdout, stderr", blame="input")
    return _tail(str(app_directory(agent, name) / stream), limit)


def read_nic_log(agent: Agent, *, limit: int = 1 << 20) -> dict[str, Any]:
    """Return the last `limit` bytes of the NIC's log: {"text", "size"}."""
    return _tail(str(agent.root / "nic.log"), limit)


def _tail(path: str, limit: int) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - limit))
            return {"text": file.read().decode(errors="replace"), "size": size}
    except FileNotFoundError:
        return {"text": "", "size": 0}


def read_file(agent: Agent, *, path: str, offset: int = 0) -> dict[str, Any]:
    """Return up to CHUNK bytes of any file from `offset` on: {"base64", "size"}."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(offset)
            return {"base64": base64.b64encode(file.read(CHUNK)).decode(), "size": size}
    except OSError as error:
        raise OperationError(f"{path}: {error.strerror}") from error
