"""Two virtual hosts for tests of the NIC alone: network and mount namespaces joined by a veth pair.

Each host has a private tmpfs at /run/migros, an address, and (after `start_nic`) a NIC. Everything is found by the
process ids of two holders that this module starts and ends; nothing has a machine-wide name.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from softroce_ext.control import ControlClient
from softroce_ext.native import build

RUN = "/run/migros/nic"
PORT = 18515
"""TCP port of perftest and of libibverbs' examples, where none is given."""
HOLD = "mkdir -p /run/migros && mount -t tmpfs tmpfs /run/migros && echo up && exec sleep infinity"


class Host:
    """One virtual host: `number` k has addresses 10.9.0.k (GID index 1) and fd09::k (index 2) on interface eth0."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.ip = f"10.9.0.{number}"
        self.ip6 = f"fd09::{number}"
        self.nic: subprocess.Popen[str] | None = None
        self._holder = subprocess.Popen(
            ["unshare", "--net", "--mount", "sh", "-c", HOLD], stdout=subprocess.PIPE, text=True
        )
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == "up\n", "the namespaces could not be made (root is needed)"

    @property
    def pid(self) -> int:
        """The holder's process id."""
        return self._holder.pid

    def enter(self, *words: str) -> list[str]:
        """A command line that runs `words` inside."""
        return ["nsenter", "-t", str(self.pid), "-n", "-m", f"--wd={os.getcwd()}", *words]

    def run(self, *words: str, timeout: float = 60, program: bool = False) -> subprocess.CompletedProcess[str]:
        """Run to the end; program: with the environment that an RDMA program needs."""
        environment = self.environment() if program else None
        return subprocess.run(
            self.enter(*words), capture_output=True, text=True, timeout=timeout, env=environment, check=False
        )

    def environment(self) -> dict[str, str]:
        """What makes stock rdma-core find the NIC."""
        return {**os.environ, "LD_PRELOAD": str(build.path("bridge")), "SYSFS_PATH": f"{RUN}/sys"}

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Start an RDMA program; its output is collected."""
        return subprocess.Popen(
            self.enter(*words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=self.environment()
        )

    def wait_for_listener(self, port: int, program: subprocess.Popen[str], timeout: float = 30) -> None:
        """Until something listens on TCP `port`, or `program` has ended: these programs do not say when they listen."""
        deadline = time.monotonic() + timeout
        while program.poll() is None and time.monotonic() < deadline:
            for table in ("tcp", "tcp6"):
                for line in Path(f"/proc/{self.pid}/net/{table}").read_text().splitlines()[1:]:
                    fields = line.split()
                    if fields[1].endswith(f":{port:04X}") and fields[3] == "0A":
                        return
            time.sleep(0.01)

    def start_nic(self, *options: str) -> None:
        """Start this host's NIC and wait until it is ready."""
        words = [
            sys.executable,
            "-m",
            "softroce_ext",
            "--interface",
            "eth0",
            "--address",
            self.ip,
            "--address",
            self.ip6,
        ]
        words += ["--run-dir", RUN, "--number-base", str(self.number), *options]
        self.nic = subprocess.Popen(self.enter(*words), stdout=subprocess.PIPE, text=True)
        assert self.nic.stdout is not None
        line = self.nic.stdout.readline()
        assert line == "ready\n", f"the NIC did not start: {line!r}"

    def path(self, inside: str) -> Path:
        """The path outside of a file inside."""
        return Path(f"/proc/{self.pid}/root{inside}")

    def control(self) -> ControlClient:
        """The NIC's management socket."""
        return ControlClient(self.path(f"{RUN}/control.sock"))

    def stop_nic(self, kill: bool = False) -> int:
        """End the NIC; returns its exit code."""
        assert self.nic is not None
        (self.nic.kill if kill else self.nic.terminate)()
        code = self.nic.wait(timeout=20)
        if self.nic.stdout is not None:
            self.nic.stdout.close()
        self.nic = None
        return code

    def close(self) -> None:
        """End the NIC and the namespaces."""
        if self.nic is not None:
            self.stop_nic()
        self._holder.kill()
        self._holder.wait()
        if self._holder.stdout is not None:
            self._holder.stdout.close()


@contextmanager
def hosts(mtu: int = 9000) -> Iterator[tuple[Host, Host]]:
    """Two hosts on one cable, without NICs."""
    first, second = Host(1), Host(2)
    try:
        cable = f"ip link add eth0 netns {first.pid} type veth peer name eth0 netns {second.pid}"
        subprocess.run(cable.split(), check=True)
        for host in (first, second):
            for words in (
                ["ip", "link", "set", "lo", "up"],
                ["ip", "link", "set", "eth0", "mtu", str(mtu), "up"],
                ["ip", "address", "add", f"{host.ip}/24", "dev", "eth0"],
                ["ip", "address", "add", f"{host.ip6}/64", "dev", "eth0", "nodad"],
                ["ethtool", "-K", "eth0", "tx", "off", "gso", "off", "gro", "off"],
            ):
                subprocess.run(host.enter(*words), check=True, stdout=subprocess.DEVNULL)
        yield first, second
    finally:
        first.close()
        second.close()


@contextmanager
def nics(*options: str, mtu: int = 9000) -> Iterator[tuple[Host, Host]]:
    """Two hosts with NICs."""
    with hosts(mtu) as (first, second):
        first.start_nic(*options)
        second.start_nic(*options)
        yield first, second


def finish(process: subprocess.Popen[str], timeout: float = 60) -> tuple[int, str]:
    """Wait for a program of `Host.start`; returns (exit code, output). Kills it after `timeout` seconds."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        return -1, f"{output}\n(killed after {timeout} s)"
    return process.returncode, output


def pair(
    server: Host, client: Host, words: list[str], timeout: float = 60, wait: bool = True
) -> tuple[tuple[int, str], tuple[int, str]]:
    """Run the same program as server and, with the server's address appended, as client; both (exit code, output).

    `wait`: the client cannot wait for the server itself, so it is started when the server listens.
    """
    listening = server.start(*words)
    if wait:
        server.wait_for_listener(int(words[words.index("-p") + 1]) if "-p" in words else PORT, listening)
    calling = client.start(*words, server.ip)
    try:
        result = finish(calling, timeout)
        return finish(listening, timeout if result[0] == 0 else 3), result
    finally:
        for process in (listening, calling):
            if process.poll() is None:
                process.kill()
                process.wait()
