"""Three hosts on a Linux bridge, without Mininet, SSH or a NIC: the smallest place where CRIU can move a program.

Each host is a network and a mount namespace held by a sleeping process, with a tmpfs of its own at /run/migros and a
real agent inside. The hosts `a` and `b` may have the moving address 10.77.0.9 at the same time; which of them the
partner `p` reaches is decided by its neighbour table, as the controller's flows decide it in a run.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from testbed.agent.channel import ChannelClosed
from testbed.lab.hosts import Host

SOURCE = Path(__file__).resolve().parents[2]
ADDRESS = "10.77.0.9"
"""The address that moves."""
NODES = {"a": "10.77.1.1", "b": "10.77.1.2", "p": "10.77.1.3"}
"""Permanent addresses."""


class _Pipes:
    """A transport to an agent that is a child process."""

    def __init__(self, argv: list[str], environment: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(SOURCE), **environment},
        )

    def read(self) -> bytes:
        assert self.process.stdout is not None
        return os.read(self.process.stdout.fileno(), 1 << 16)

    def write(self, data: bytes) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(data)
            self.process.stdin.flush()
        except OSError as error:
            raise ChannelClosed(str(error)) from error

    def complaints(self) -> str:
        return ""

    def close(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def run(*argv: str) -> str:
    """Output of a command that must succeed."""
    answer = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, f"{' '.join(argv)}: {answer.stderr}"
    return answer.stdout


class Lab:
    """The three hosts. `events` collects what their agents tell."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self._told = threading.Condition()
        self.holders: dict[str, subprocess.Popen[bytes]] = {}
        self.hosts: dict[str, Host] = {}
        self.transports: dict[str, _Pipes] = {}
        Path("/run/migros").mkdir(exist_ok=True)
        self._hold("switch")
        self.inside("switch", "ip", "link", "add", "br0", "type", "bridge")
        self.inside("switch", "ip", "link", "set", "br0", "up")
        for number, (name, address) in enumerate(NODES.items(), 1):
            self._hold(name)
            self._plug(name, address, f"02:00:00:00:77:{number:02x}")
            self.start_agent(name)
        self.inside("a", "ip", "address", "add", f"{ADDRESS}/16", "dev", "eth0")
        self.route("a")

    def _hold(self, name: str) -> None:
        holder = subprocess.Popen(
            ["unshare", "--net", "--mount", "--propagation", "private", "sh", "-c",
             "mount -t tmpfs -o size=256m lab /run/migros && ip link set lo up && echo up && exec sleep 3600"],
            stdout=subprocess.PIPE,
        )  # fmt: skip
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"up\n"
        self.holders[name] = holder

    def _plug(self, name: str, address: str, mac: str) -> None:
        host, switch = str(self.holders[name].pid), str(self.holders["switch"].pid)
        port = f"p-{name}"
        run("ip", "link", "add", "eth0", "address", mac, "netns", host, "type", "veth", "peer", port, "netns", switch)
        self.inside("switch", "ip", "link", "set", port, "master", "br0", "up")
        self.inside(name, "ip", "address", "add", f"{address}/16", "dev", "eth0")
        self.inside(name, "ip", "link", "set", "eth0", "up")
        # Two hosts have the moving address for a while; neither may answer ARP for it.
        self.inside(name, "sysctl", "-qw", "net.ipv4.conf.all.arp_ignore=8")
        for other, number in zip(NODES, range(1, 9), strict=False):
            if other != name:
                neighbour = ["lladdr", f"02:00:00:00:77:{number:02x}", "dev", "eth0"]
                self.inside(name, "ip", "neigh", "replace", NODES[other], *neighbour)

    def start_agent(self, name: str, environment: Mapping[str, str] | None = None) -> None:
        """Start a host's agent, with further variables."""
        argv = ["nsenter", "-t", str(self.holders[name].pid), "-n", "-m", "--", sys.executable, "-m", "testbed.agent"]
        transport = _Pipes([*argv, "--host", name, "--interface", "eth0"], environment or {})
        self.transports[name] = transport
        self.hosts[name] = Host(name, transport, self._listen)
        self.hosts[name].ready(10)

    def _listen(self, host: str, event: Mapping[str, Any]) -> None:
        with self._told:
            self.events.append({"host": host, **event})
            self._told.notify_all()

    def wait_event(self, name: str, timeout: float = 20.0, **fields: Any) -> dict[str, Any]:
        """The first event `name` with these fields, waiting for it."""
        deadline = time.monotonic() + timeout
        with self._told:
            while True:
                for event in self.events:
                    if event["event"] == name and fields.items() <= event.items():
                        return event
                left = deadline - time.monotonic()
                assert left > 0, f"no event {name} {fields} in {json.dumps(self.events)[-2000:]}"
                self._told.wait(left)

    def inside(self, name: str, *argv: str) -> str:
        """Run a command in a host's namespaces."""
        return run("nsenter", "-t", str(self.holders[name].pid), "-n", "-m", "--", *argv)

    def route(self, name: str) -> None:
        """Let the partner's packets for the moving address go to host `name`."""
        mac = f"02:00:00:00:77:{list(NODES).index(name) + 1:02x}"
        self.inside("p", "ip", "neigh", "replace", ADDRESS, "lladdr", mac, "dev", "eth0")

    def read(self, name: str, path: str) -> str:
        """Content of a file in a host's mount namespace; empty if there is none (yet)."""
        return self.inside(name, "sh", "-c", f"cat {path} 2>/dev/null || true")

    def close(self) -> None:
        """Remove everything."""
        for host in self.hosts.values():
            host.close()
        for holder in self.holders.values():
            holder.kill()
            holder.wait()
