"""Open vSwitch's flow cache: when does the datapath really follow a changed flow table?

A barrier reply says that the OpenFlow tables have changed. Packets, however, are forwarded by cached flows, which the
revalidator threads bring in line a little later: one to three milliseconds on an idle machine, more on a busy one. A
packet sent after the barrier may so still reach the old host, whose NIC has stopped and would pause the sender again.
So a move counts as confirmed only when no cached flow for the address leads out of a port that its flow has left.

`ovs-appctl revalidator/wait` would be the obvious call, but it waits for the next round to end, which is half a second
later if the round in question is over already. Reading the cached flows takes 0.2 ms and touches nothing.
"""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path
from typing import Any, Final

DATAPATHS: Final = {"userspace": "netdev@ovs-netdev", "kernel": "system@ovs-system"}
"""What Open vSwitch calls the datapath that all bridges of one kind share."""
ANSWER_TIMEOUT: Final = 10.0
_ACTIONS: Final = re.compile(r"actions:(.*)$")


class FlowCacheError(RuntimeError):
    """Open vSwitch does not answer, or refuses."""


def control_socket(run_directory: Path | None = None) -> Path:
    """Where ovs-vswitchd listens for `ovs-appctl`. Raises FlowCacheError if it does not run."""
    directory = run_directory or Path(os.environ.get("OVS_RUNDIR", "/run/openvswitch"))
    try:
        pid = int((directory / "ovs-vswitchd.pid").read_text())
    except (OSError, ValueError) as error:
        raise FlowCacheError(f"ovs-vswitchd does not run: {error}") from error
    return directory / f"ovs-vswitchd.{pid}.ctl"


class FlowCache:
    """A connection to ovs-vswitchd's control socket (JSON-RPC 1.0, as `ovs-appctl` speaks it)."""

    def __init__(self, path: Path, datapath: str) -> None:
        self.path = path
        self.datapath = datapath
        self._socket: socket.socket | None = None

    def outputs(self, address: str) -> set[str]:
        """Interfaces that cached flows for packets to `address` lead to. Raises FlowCacheError."""
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
        """Answers follow each other without a delimiter: read until it is a whole JSON object."""
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
    """Interfaces in the actions of `ovs-appctl dpctl/dump-flows --names`: the words outside of any parentheses."""
    found: set[str] = set()
    for line in listing.splitlines():
        if match := _ACTIONS.search(line):
            actions = match[1]
            while (flat := re.sub(r"[\w.-]*\([^()]*\)", "", actions)) != actions:
                actions = flat
            found |= {word for word in (part.strip() for part in actions.split(",")) if word and word != "drop"}
    return found
