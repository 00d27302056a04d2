"""The agent itself: it answers requests, sends events, and ends everything that it started."""

from __future__ import annotations

import contextlib
import os
import platform
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from testbed.agent.channel import Channel, ChannelClosed
from testbed.agent.operations import Operation, OperationError
from testbed.agent.processes import ProcessWatch
from testbed.agent.records import App, Incoming, Nic, Outgoing


class Agent:
    """The state of one host's agent; every operation gets it as its first argument."""

    def __init__(self, host: str, channel: Channel, root: Path, interface: str) -> None:
        self.host = host
        """Name of the host in the topology."""
        self.root = root
        """The host's private folder, /run/migros, with nic/ and apps/<name>/ in it."""
        self.interface = interface
        """The data interface."""
        self.watch = ProcessWatch()
        self.apps: dict[str, App] = {}
        """The applications that this host runs or ran, by name."""
        self.nic: Nic | None = None
        self.outgoing: dict[str, Outgoing] = {}
        """Migrations in progress from this host, by name; one that is over is not kept."""
        self.incoming: dict[str, Incoming] = {}
        """Migrations in progress to this host, by name; one that is over is not kept."""
        self._channel = channel
        self._endings: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._closing = False
        self._operations: Mapping[str, Operation] = {}

    @property
    def nic_directory(self) -> Path:
        """The run folder of the NIC process."""
        return self.root / "nic"

    @property
    def apps_directory(self) -> Path:
        """The parent of every application's folder."""
        return self.root / "apps"

    def event(self, name: str, **fields: Any) -> None:
        """Report to the testbed that something happened; `t` is this machine's time.monotonic()."""
        if self._closing:
            return
        with contextlib.suppress(ChannelClosed):  # the reading side notices it, too, and ends the agent
            self._channel.send({"event": name, "host": self.host, "t": time.monotonic(), **fields})

    def at_end(self, ending: Callable[[], None]) -> Callable[[], None]:
        """Call `ending()` when the agent ends, newest first. Returns a function that withdraws it."""
        with self._lock:
            self._endings.append(ending)

        def withdraw() -> None:
            with self._lock:
                if ending in self._endings:
                    self._endings.remove(ending)

        return withdraw

    def serve(self, operations: Mapping[str, Operation]) -> None:
        """Answer requests until the channel closes or `shutdown` is requested, then end everything."""
        self._operations = operations
        try:
            self._channel.send({"event": "hello", "host": self.host, "t": time.monotonic(), **_about()})
            for request in self._channel.messages():
                if request.get("op") == "shutdown":
                    self.end_everything()
                    self._channel.send({"id": request.get("id"), "ok": True, "result": {}})
                    return
                threading.Thread(target=self._answer, args=(request,), name=str(request.get("op")), daemon=True).start()
        except ChannelClosed:
            pass
        finally:
            self.end_everything()

    def end_everything(self) -> None:
        """End everything that the agent started, newest first. Idempotent; continues after a failure."""
        self._closing = True
        while True:
            with self._lock:
                if not self._endings:
                    return
                ending = self._endings.pop()
            try:
                ending()
            except Exception:
                traceback.print_exc()

    def _answer(self, request: dict[str, Any]) -> None:
        answer: dict[str, Any] = {"id": request.get("id")}
        try:
            function = self._operations.get(str(request.get("op")))
            if function is None:
                raise OperationError(
                    f"unknown operation {request.get('op')!r}; known: {', '.join(sorted(self._operations))}"
                )
            answer |= {"ok": True, "result": function(self, **request.get("args", {})) or {}}
        except OperationError as error:
            answer |= {"ok": False, "error": error.message, "blame": error.blame, "hint": error.hint}
        except Exception as error:
            # A defect, or an error that the operation does not handle: the testbed shows it, the log has the trace.
            traceback.print_exc()
            answer |= {"ok": False, "error": f"{type(error).__name__}: {error}", "blame": "run", "hint": None}
        with contextlib.suppress(ChannelClosed):
            self._channel.send(answer)


def _about() -> dict[str, Any]:
    return {"pid": os.getpid(), "python": platform.python_version(), "kernel": platform.release()}
