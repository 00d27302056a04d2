"""The testbed's side of the northbound interface: one method per call, which returns the answer unchanged."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from testbed.base.errors import RunFailed


class ControllerClient:
    """A connection to the controller of one run, opened by the first call. Not thread-safe: use one per thread.

    Every method raises RunFailed with the controller's message if it refuses, or if the controller has died.
    """

    def __init__(self, path: Path, timeout: float = 30.0) -> None:
        self.path = path
        self.timeout = timeout
        self._socket: socket.socket | None = None
        self._lines: Any = None

    def call(self, op: str, **arguments: str) -> dict[str, Any]:
        """Send one request and return the answer, without its `ok`."""
        try:
            if self._socket is None:
                connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                connection.settimeout(self.timeout)
                connection.connect(str(self.path))
                self._socket, self._lines = connection, connection.makefile("rb")
            self._socket.sendall(json.dumps({"op": op, **arguments}).encode() + b"\n")
            line = self._lines.readline()
            if not line:
                raise ConnectionError("connection closed")
            answer = json.loads(line)
        except (OSError, ValueError) as error:
            self.close()
            raise RunFailed(
                f"the controller does not answer: {error}",
                where=f"controller, {op}",
                hint="see its log, network/controller.log in the run's folder",
            ) from error
        if not answer.pop("ok"):
            raise RunFailed(answer["error"], where=f"controller, {op}", hint=answer.get("hint"))
        return dict(answer)

    def status(self) -> dict[str, Any]:
        """Return framework, ready, switches (name → connected), missing, flows (count) and arp_answered."""
        return self.call("status")

    def topology(self) -> dict[str, Any]:
        """Return hosts (addresses, mac, switch, port), switches, links and ports."""
        return self.call("topology")

    def path_of(self, from_host: str, ip: str) -> list[str]:
        """Names of the nodes from `from_host` to the host that receives a packet for `ip`, both included."""
        return list(self.call("path", from_host=from_host, ip=ip)["path"])

    def prepare_move(self, ip: str, to_host: str) -> dict[str, Any]:
        """Prepare a move, without affecting traffic.

        Returns prepared_at and flows [{switch, action, match, priority, out, t}].
        """
        return self.call("prepare_move", ip=ip, to_host=to_host)

    def move(self, ip: str, to_host: str) -> dict[str, Any]:
        """Move an address. Returns begun_at, confirmed_at and flows [{switch, action, match, priority, out, t}].

        Times are those of time.monotonic(). By `confirmed_at` every switch has replied to its barrier (each flow's `t`)
        and no cached flow leads to the old host, so packets take the new path.
        """
        return self.call("move", ip=ip, to_host=to_host)

    def undo_move(self, ip: str) -> dict[str, Any]:
        """Undo the last preparation or move; returns what `move` does.

        Before the move, this withdraws the preparation; after it, the address returns to its old host.
        """
        return self.call("undo_move", ip=ip)

    def add_address(self, ip: str, host: str) -> dict[str, Any]:
        """Make another address reachable at `host`. Returns confirmed_at and flows."""
        return self.call("add_address", ip=ip, host=host)

    def wait_ready(self, timeout: float = 30.0) -> dict[str, Any]:
        """Wait until all switches have confirmed the first paths, and return the status.

        Raises RunFailed after `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while not (status := self.status())["ready"]:
            if time.monotonic() > deadline:
                missing = ", ".join(status["missing"]) or "confirmation of the first paths"
                raise RunFailed(
                    f"not ready after {timeout:g} s; missing: {missing}",
                    where="controller",
                    hint="see its log, network/controller.log in the run's folder",
                )
            time.sleep(0.02)
        return status

    def close(self) -> None:
        """Close the connection; the next call opens a new one."""
        if self._socket is not None:
            self._lines.close()
            self._socket.close()
            self._socket = self._lines = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
