"""Open vSwitch's flow cache: when does the datapath actually follow a changed flow table?

A barrier reply confirms that the OpenFlow tables have changed. Packets, however, are forwarded by cached flows, which
the revalidator threads update a little later: after one to three milliseconds on an idle machine, later on a busy one.
Until then, a packet may still reach the old host, whose NIC has stopped and would pause the sender again. A move
therefore counts as confirmed only when no cached flow for the address leads out of a port that its flow has left.

`ovs-appctl revalidator/wait` would be the obvious call, but it waits for the next round to end, which is half a second
later if the round in question is already over. Reading the cached flows takes 0.2 ms and has no side effects.
"""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path
from typing import Any, Final

DATAPATHS: Final = {"userspace": "netdev@ovs-netdev", "kernel": "system@ovs-system"}
"""Open vSwitch's name of the datapath that all bridges of one kind share."""
ANSWER_TIMEOUT: Final = 10.0
_ACTIONS: Final = re.compile(r"actions:(.*)$")


class FlowCacheError(RuntimeError):
    """Open vSwitch does not answer, or refuses the request."""


def control_socket(run_directory: Path | None = None) -> Path:
    """Path of the socket on which ovs-vswitchd serves `ovs-appctl`. Raises FlowCacheError if it is not running."""
    directory = run_directory or Path(os.environ.get("OVS_RUNDIR", "/run/openvswitch"))
    try:
        pid = int((directory / "ovs-vswitchd.pid").read_text())
    except (OSError, ValueError) as error:
        raise FlowCacheError(f"ovs-vswitchd is not running: {error}") from error
    return directory / f"ovs-vswitchd.{pid}.ctl"


class FlowCache:
    """A connection to ovs-vswitchd's control socket (JSON-RPC 1.0, as `ovs-appctl` speaks it)."""

    def __init__(self, path: Path, datapath: str) -> None:
        self.path = path
        self.datapath = datapath
        self._socket: socket.socket | None = None

    def outputs(self, address: str) -> set[str]:
        """Names of the interfaces that cached flows send packets for `address` to. Raises FlowCacheError."""
        what = f"ipv6,ipv6_dst={address}" if ":" in address else f"ip,nw_dst={address}"
        listing = self._call("dpctl/dump-flows", "--names", self.datapath, f"filter={what}")
        return outputs(listing)

    def _call(self, method: str, *parameters: str) -> str:
        try:
            if self._socket is None:
                self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                self._socket.settimeout(ANSWER_TIMEOUT)
                self._socket.connect(str(self.path))
            self._socket.sendall(json.dumps({"id": 0, "method": method, "params": parameters}).encode())
            answer = self._answer()
        except (OSError, ValueError) as error:
            if self._socket is not None:
                self._socket.close()
                self._socket = None
            raise FlowCacheError(f"{self.path}: {error}") from error
        if answer.get("error"):
            raise FlowCacheError(f"{method}: {answer['error']}")
        return str(answer.get("result") or "")

    def _answer(self) -> dict[str, Any]:
        """Read one answer. There is no delimiter, so read until the text is a complete JSON object."""
        assert self._socket is not None
        text = b""
        while True:
            part = self._socket.recv(1 << 16)
            if not part:
                raise ConnectionError("connection closed")
            text += part
            try:
                return dict(json.loads(text))
            except ValueError:
                continue


def outputs(listing: str) -> set[str]:
    """Interfaces in the actions of `ovs-appctl dpctl/dump-flows --names`: the words outside all parentheses."""
    found: set[str] = set()
    for line in listing.splitlines():
        if match := _ACTIONS.search(line):
            actions = match[1]
            while (flat := re.sub(r"[\w.-]*\([^()]*\)", "", actions)) != actions:
                actions = flat
            found |= {word for word in (part.strip() for part in actions.split(",")) if word and word != "drop"}
    return found
