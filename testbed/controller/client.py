"""The harness's side of the northbound interface: one method per call, answers as they come."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from testbed.base.errors import RunFailed


class ControllerClient:
    """A connection to the controller of one run. Opened at the first call; may be shared between threads? No: one each.

    Every method raises RunFailed with the controller's own words if it says no, or if it has died.
    """

    def __init__(self, path: Path, timeout: float = 30.0) -> None:
        self.path = path
        self.timeout = timeout
        self._socket: socket.socket | None = None
        self._lines: Any = None

    def call(self, op: str, **arguments: str) -> dict[str, Any]:
        """One request, one answer (without its `ok`)."""
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
                hint="its log is controller.log in the run's folder",
            ) from error
        if not answer.pop("ok"):
            raise RunFailed(answer["error"], where=f"controller, {op}", hint=answer.get("hint"))
        return dict(answer)

    def status(self) -> dict[str, Any]:
        """framework, ready, switches (name → connected), missing, flows (count), arp_answered."""
        return self.call("status")

    def topology(self) -> dict[str, Any]:
        """hosts (addresses, mac, switch, port), switches, links, ports."""
        return self.call("topology")

    def path_of(self, from_host: str, ip: str) -> list[str]:
        """Names from `from_host` to the host where a packet for `ip` comes out, both included."""
        return list(self.call("path", from_host=from_host, ip=ip)["path"])

    def prepare_move(self, ip: str, to_host: str) -> dict[str, Any]:
        """prepared_at, flows [{switch, action, match, priority, out, t}]. Traffic is not touched."""
        return self.call("prepare_move", ip=ip, to_host=to_host)

    def move(self, ip: str, to_host: str) -> dict[str, Any]:
        """begun_at, confirmed_at, flows [{switch, action, match, priority, out, t}]; times are of time.monotonic().

        At `confirmed_at` every switch has replied to its barrier (each flow's `t`) and no cached flow leads to the old
        host any more: from here on packets take the new path.
        """
        return self.call("move", ip=ip, to_host=to_host)

    def undo_move(self, ip: str) -> dict[str, Any]:
        """As `move`, back: before the move it withdraws the preparation, after it the address returns."""
        return self.call("undo_move", ip=ip)

    def add_address(self, ip: str, host: str) -> dict[str, Any]:
        """confirmed_at, flows: a further address at `host` is reachable."""
        return self.call("add_address", ip=ip, host=host)

    def wait_ready(self, timeout: float = 30.0) -> dict[str, Any]:
        """The status once all switches have confirmed the first paths. Raises RunFailed after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not (status := self.status())["ready"]:
            if time.monotonic() > deadline:
                missing = ", ".join(status["missing"]) or "confirmation of the first paths"
                raise RunFailed(f"not ready after {timeout:g} s; missing: {missing}", where="controller")
            time.sleep(0.02)
        return status

    def close(self) -> None:
        """Ends the connection; the next call opens another."""
        if self._socket is not None:
            self._lines.close()
            self._socket.close()
            self._socket = self._lines = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
