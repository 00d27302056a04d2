"""What an agent knows of its host: applications, the NIC, and the migrations that leave or arrive."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from softroce_ext.control import ControlClient, ControlError
from testbed.agent.operations import OperationError
from testbed.agent.transfer import Receiver, Sender
from testbed.checkpoint.dump import Dump
from testbed.checkpoint.restore import Restore


@dataclass
class App:
    """One application as this host knows it."""

    name: str
    directory: Path
    argv: list[str]
    env: dict[str, str]
    init: int
    """pid of its init as the host sees it, which is signalled, watched and dumped."""
    launcher: subprocess.Popen[bytes] | None = None
    """The process outside the namespace; None for an application that came by migration."""
    ended: dict[str, Any] | None = None
    """How it ended: {"code": N} or {"signal": N}, with `at` in UNIX seconds; None while it runs."""
    uses_nic: bool = False
    """Whether the NIC was seen to have a user context of it."""
    longest_gap: float | None = None
    """Longest time between two completions, in seconds, as last read from the NIC (`poll_nic`)."""


class Nic:
    """A running `python -m softroce_ext`."""

    def __init__(self, process: subprocess.Popen[bytes], directory: Path, log: Path) -> None:
        self.process = process
        self.directory = directory
        self.log = log
        self.expected_end = False

    def command(self, command: str, arguments: dict[str, Any], timeout: float) -> dict[str, Any]:
        """Send a command to the control socket and return its answer; `timeout` in seconds. Raises OperationError."""
        try:
            with ControlClient(self.directory / "control.sock", timeout) as client:
                return client.call(command, **arguments)
        except ControlError as error:
            gone = self.process.poll() is not None
            raise OperationError(str(error), hint=(self.why() if gone else None) or error.hint or None) from error

    def why(self) -> str | None:
        """The end of the NIC's log, as a hint; None if the log is empty."""
        tail = log_tail(self.log)
        return f"the NIC's log ends with: {tail}" if tail else None


def log_tail(path: Path, limit: int = 400) -> str:
    """The last `limit` characters of a log, on one line."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 4 * limit))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return " | ".join(line.strip() for line in text.splitlines() if line.strip())[-limit:]


@dataclass
class Outgoing:
    """A migration of an application that leaves this host."""

    migration: str
    app: App
    folder: Path
    lock: threading.Lock = field(default_factory=threading.Lock)
    sender: Sender | None = None
    dump: Dump | None = None
    contexts: list[str] = field(default_factory=list)
    """Openings of the device that the NIC holds for it."""
    policy: int | None = None
    """Scheduling policy that the program had before the agent changed it; None: unchanged."""
    gid: str | None = None
    """Address that was removed from the NIC's GID table for it."""
    held: bool = False
    done: bool = False
    """Committed or rolled back."""


@dataclass
class Incoming:
    """A migration of an application that arrives at this host."""

    migration: str
    app: str
    argv: list[str]
    env: dict[str, str]
    policy: int
    folder: Path
    receiver: Receiver
    longest_gap: float | None = None
    """Longest time between two completions before it left, seconds."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    restore: Restore | None = None
    contexts: list[str] = field(default_factory=list)
    """Openings of the device that the NIC has restored for it."""
    address: str | None = None
    """Address that was added for it."""
    gid: str | None = None
    """Address that was entered in the NIC's GID table for it."""
    withdraw_end: Callable[[], None] = lambda: None
    """Withdraws what the agent would do about it at its own end."""
    done: bool = False
    """Taken over or aborted."""
