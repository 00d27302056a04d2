"""What a program runs on: one end of the link. `OwnEnd` is a host with our NIC, `guest.boot.Guest` one with Linux rxe.

Both are used through `End`; a started program is a `Program` whichever end it runs on.
"""

from __future__ import annotations

import os
import queue
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from testbed.base.errors import EnvironmentProblem
from tests.support.nic.nic_host import RUN, NicHost, Space

__all__ = ["End", "NicHost", "OwnEnd", "OwnProgram", "Program", "Space"]


class Program(ABC):
    """A started program. Output comes in pieces as the program writes it; `feed` is for those who deliver it."""

    def __init__(self) -> None:
        self.output = ""
        self.code: int | None = None
        self._news: queue.Queue[str | int] = queue.Queue()
        self._read = 0

    def feed(self, piece: str | int) -> None:
        """A piece of output, or the exit code at the end."""
        self._news.put(piece)

    def _step(self, seconds: float) -> bool:
        """Take one piece; False if none comes in time."""
        try:
            piece = self._news.get(timeout=max(seconds, 0.0))
        except queue.Empty:
            return False
        if isinstance(piece, str):
            self.output += piece
        else:
            self.code = piece
        return True

    def wait(self, timeout: float) -> int | None:
        """The exit code, or None if it still runs after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while self.code is None and self._step(deadline - time.monotonic()):
            pass
        return self.code

    def line(self, timeout: float) -> str | None:
        """The next whole line of output; None at the end or after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while "\n" not in self.output[self._read :]:
            if self.code is not None or not self._step(deadline - time.monotonic()):
                return None
        end = self.output.index("\n", self._read)
        line, self._read = self.output[self._read : end], end + 1
        return line

    def finish(self, timeout: float) -> tuple[int, str]:
        """(exit code, output); kills it after `timeout` seconds, then the code is -1."""
        if self.wait(timeout) is None:
            self.kill()
            self.wait(5)
            return -1, f"{self.output}\n(killed after {timeout:g} s)"
        assert self.code is not None
        return self.code, self.output

    @abstractmethod
    def write(self, text: str) -> None:
        """To its standard input."""

    @abstractmethod
    def kill(self) -> None:
        """End it by force."""


class End(ABC):
    """One end of the link."""

    name: str
    """`ours` or `rxe`."""
    ip4: str
    ip6: str
    mtu: int
    """Of the interface, in bytes."""

    @abstractmethod
    def start(self, *words: str) -> Program:
        """Start a program with the environment that an RDMA program needs."""

    @abstractmethod
    def read(self, path: str) -> str:
        """The text of a file there; empty if there is none."""

    def run(self, *words: str, timeout: float = 30) -> tuple[int, str]:
        """Run to the end."""
        return self.start(*words).finish(timeout)

    def ip(self, family: int) -> str:
        """The address for a family, 4 or 6."""
        return self.ip4 if family == 4 else self.ip6

    @abstractmethod
    def listens_cm(self) -> bool:
        """Whether a program listens by rdma_cm."""

    @abstractmethod
    def sysfs(self) -> str:
        """The folder that stands for /sys there."""

    def gid_index(self, family: int) -> int:
        """Where the address stands in the device's GID table. Raises EnvironmentProblem if it is not there."""
        from ipaddress import IPv6Address

        wanted = int(IPv6Address(self.ip6 if family == 6 else f"::ffff:{self.ip4}"))
        for index in range(16):
            text = self.read(f"{self.sysfs()}/class/infiniband/rxe0/ports/1/gids/{index}").strip()
            if text and int(IPv6Address(text)) == wanted:
                return index
        raise EnvironmentProblem(f"{self.name}: {self.ip(family)} is not in the GID table")

    def listens(self, port: int, timeout: float = 15) -> bool:
        """Wait until something listens on TCP `port`."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            for line in (self.read("/proc/net/tcp") + self.read("/proc/net/tcp6")).splitlines():
                fields = line.split()
                if len(fields) > 3 and fields[1].endswith(f":{port:04X}") and fields[3] == "0A":
                    return True
            time.sleep(0.03)
        return False


class OwnProgram(Program):
    """A program in a namespace of this machine."""

    def __init__(self, words: list[str], environment: dict[str, str]) -> None:
        super().__init__()
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
        )
        threading.Thread(target=self._follow, daemon=True).start()

    def _follow(self) -> None:
        assert self._process.stdout is not None
        while piece := os.read(self._process.stdout.fileno(), 65536):
            self.feed(piece.decode(errors="replace"))
        self.feed(self._process.wait())

    def write(self, text: str) -> None:
        """To its standard input."""
        assert self._process.stdin is not None
        self._process.stdin.write(text.encode())
        self._process.stdin.flush()

    def kill(self) -> None:
        """End it by force."""
        self._process.kill()


class OwnEnd(End):
    """A host with our NIC. `number` k gives the addresses 10.9.0.k and fd09::k on eth0."""

    def __init__(self, number: int) -> None:
        self.name = "ours"
        self.space = NicHost(number)
        self.ip4, self.ip6, self.mtu = self.space.ip, self.space.ip6, 1500

    def configure(self) -> None:
        """Addresses and offloads of eth0, which must be there."""
        for what in ("all", "default", "eth0"):
            self.space.do("sysctl", "-qw", f"net.ipv6.conf.{what}.accept_dad=0", f"net.ipv6.conf.{what}.accept_ra=0")
        self.space.configure()

    def start_nic(self, mtu: int, *options: str) -> None:
        """(Re)start the NIC on an interface with this MTU, and wait until it is ready."""
        self.stop_nic()
        self.mtu = mtu
        self.space.do("ip", "link", "set", "eth0", "mtu", str(mtu))
        self.space.start_nic(*options)

    def stop_nic(self) -> None:
        """End the NIC, if there is one."""
        if self.space.nic is not None:
            self.space.stop_nic()

    def alive(self) -> bool:
        """Whether the NIC still runs."""
        return self.space.nic is not None and self.space.nic.poll() is None

    def counters(self) -> dict[str, Any]:
        """The NIC's counters."""
        with self.space.control() as control:
            answer: dict[str, Any] = control.call("counters")["counters"]
            return answer

    def contexts(self) -> list[str]:
        """What programs have open, of verbs and of rdma_cm."""
        with self.space.control() as control:
            status = control.call("status")
        return [str(item["id"]) for item in (*status["contexts"], *status["rdma_cm"])]

    def listens_cm(self) -> bool:
        """Whether a program listens by rdma_cm."""
        with self.space.control() as control:
            return any(item["state"] == "LISTEN" for open in control.call("status")["rdma_cm"] for item in open["ids"])

    def start(self, *words: str) -> Program:
        """Start a program with the environment that an RDMA program needs."""
        return OwnProgram(self.space.enter(*words), self.space.environment())

    def read(self, path: str) -> str:
        """The text of a file there."""
        if path.startswith("/proc/net/"):
            outside = Path(f"/proc/{self.space.pid}/net/{path.removeprefix('/proc/net/')}")
        else:
            outside = self.space.path(path)
        try:
            return outside.read_text()
        except OSError:
            return ""

    def sysfs(self) -> str:
        """The picture of /sys that the NIC keeps."""
        return f"{RUN}/sys"

    def close(self) -> None:
        """End the NIC and let the namespaces go."""
        self.space.close()
