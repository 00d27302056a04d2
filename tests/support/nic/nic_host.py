"""A virtual host with our NIC: network and mount namespaces of its own, found by the pid of a process that holds them.

What tests/system and tests/interop have in common. Nothing has a machine-wide name, and each host has a private tmpfs
at /run/migros.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from softroce_ext.control import ControlClient
from softroce_ext.native import build
from testbed.base.errors import EnvironmentProblem

RUN = "/run/migros/nic"
WITH_US = ("setpriv", "--pdeathsig", "KILL")
"""Prefix of what must not outlive the thread that starts it, however that ends."""
_STOP = 20.0
"""Seconds in which a NIC must have ended."""


class Space:
    """Network and mount namespaces of their own, held by a process of ours."""

    def __init__(self, setup: str = "true", prefix: tuple[str, ...] = WITH_US) -> None:
        """prefix: of the holder's command line and of each that is run inside."""
        self._prefix = prefix
        hold = f"{setup} && echo up && exec sleep infinity"
        self._holder = subprocess.Popen(
            [*prefix, "unshare", "--net", "--mount", "sh", "-c", hold], stdout=subprocess.PIPE, text=True
        )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != "up\n":
            raise EnvironmentProblem("no namespaces could be made", hint="run it as root")

    @property
    def pid(self) -> int:
        """The holder's."""
        return self._holder.pid

    def enter(self, *words: str) -> list[str]:
        """A command line that runs `words` inside."""
        return [*self._prefix, "nsenter", "-t", str(self.pid), "-n", "-m", f"--wd={os.getcwd()}", *words]

    def do(self, *words: str) -> None:
        """Run a command that must not fail. Raises EnvironmentProblem."""
        answer = subprocess.run(self.enter(*words), capture_output=True, text=True, check=False)
        if answer.returncode != 0:
            raise EnvironmentProblem(f"{' '.join(words)}: {answer.stderr.strip() or answer.stdout.strip()}")

    def close(self) -> None:
        """Let the namespaces go."""
        self._holder.kill()
        self._holder.wait()
        if self._holder.stdout is not None:
            self._holder.stdout.close()


class NicHost(Space):
    """One host: `number` k has addresses 10.9.0.k (GID index 1) and fd09::k (index 2) on interface eth0."""

    def __init__(self, number: int, prefix: tuple[str, ...] = WITH_US) -> None:
        super().__init__("mkdir -p /run/migros && mount -t tmpfs tmpfs /run/migros", prefix)
        self.number = number
        self.ip = f"10.9.0.{number}"
        self.ip6 = f"fd09::{number}"
        self.nic: subprocess.Popen[str] | None = None

    def configure(self, mtu: int = 9000) -> None:
        """Addresses and offloads of eth0, which must be there."""
        self.do("ip", "link", "set", "lo", "up")
        # What leaves the host must be whole frames with finished checksums: what is between passes on what it sees.
        self.do("ethtool", "-K", "eth0", "tx", "off", "gso", "off", "gro", "off", "tso", "off")
        self.do("ip", "link", "set", "eth0", "mtu", str(mtu), "up")
        self.do("ip", "address", "add", f"{self.ip}/24", "dev", "eth0")
        self.do("ip", "-6", "address", "add", f"{self.ip6}/64", "dev", "eth0", "nodad")

    def environment(self) -> dict[str, str]:
        """What makes stock rdma-core find the NIC."""
        return {**os.environ, "LD_PRELOAD": str(build.path("bridge")), "SYSFS_PATH": f"{RUN}/sys"}

    def start_nic(self, *options: str) -> None:
        """Start this host's NIC and wait until it is ready. Raises EnvironmentProblem."""
        words = [sys.executable, "-m", "softroce_ext", "--interface", "eth0"]
        words += ["--address", self.ip, "--address", self.ip6]
        words += ["--run-dir", RUN, "--number-base", str(self.number), *options]
        self.nic = subprocess.Popen(self.enter(*words), stdout=subprocess.PIPE, text=True)
        assert self.nic.stdout is not None
        line = self.nic.stdout.readline()
        if line != "ready\n":
            raise EnvironmentProblem(f"our NIC did not start: {line!r}")

    def stop_nic(self, kill: bool = False) -> int:
        """End the NIC; returns its exit code: -9 too if it does not end by itself."""
        assert self.nic is not None
        (self.nic.kill if kill else self.nic.terminate)()
        try:
            code = self.nic.wait(timeout=_STOP)
        except subprocess.TimeoutExpired:
            self.nic.kill()
            code = self.nic.wait()
        if self.nic.stdout is not None:
            self.nic.stdout.close()
        self.nic = None
        return code

    def path(self, inside: str) -> Path:
        """The path outside of a file inside."""
        return Path(f"/proc/{self.pid}/root{inside}")

    def control(self) -> ControlClient:
        """The NIC's management socket."""
        return ControlClient(self.path(f"{RUN}/control.sock"))

    def close(self) -> None:
        """End the NIC and the namespaces."""
        if self.nic is not None:
            self.stop_nic()
        super().close()
