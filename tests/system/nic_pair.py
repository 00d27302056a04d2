"""Two virtual hosts for tests of the NIC alone, joined by a veth pair."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.nic.nic_host import RUN, NicHost

__all__ = ["PORT", "RUN", "TOO_EARLY", "Host", "finish", "hosts", "nics", "pair", "until"]

PORT = 18515
"""TCP port of perftest and of libibverbs' examples, where none is given."""
TOO_EARLY = "RDMA_CM_EVENT_REJECTED; error: 8"
"""What a client of perftest -R says that has met its server between two listeners. The server closes the one by which
they have agreed on the test and opens one for the test itself, and does not say when: a race of perftest's own."""


class Host(NicHost):
    """One virtual host (`NicHost`), and programs in it."""

    def __init__(self, number: int) -> None:
        super().__init__(number, prefix=())
        self._programs: list[subprocess.Popen[str]] = []

    def run(self, *words: str, timeout: float = 60, program: bool = False) -> subprocess.CompletedProcess[str]:
        """Run to the end; program: with the environment that an RDMA program needs."""
        environment = self.environment() if program else None
        return subprocess.run(
            self.enter(*words), capture_output=True, text=True, timeout=timeout, env=environment, check=False
        )

    def start(self, *words: str, stdin: int | None = None) -> subprocess.Popen[str]:
        """Start an RDMA program; its output is collected."""
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        program = subprocess.Popen(self.enter(*words), stdin=stdin, **output, text=True, env=self.environment())
        self._programs.append(program)
        return program

    def close(self) -> None:
        """End what a failed test has left running, which would take the processor from those after it, and the host."""
        for program in self._programs:
            if program.poll() is None:
                program.kill()
                program.wait()
        super().close()

    def received(self) -> int:
        """Frames that the NIC has received."""
        with self.control() as control:
            return int(control.call("counters")["counters"]["rx_packets"])

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

    def wait_for_cm_listener(self, program: subprocess.Popen[str], timeout: float = 30) -> None:
        """The same for a program that listens by rdma_cm, whose ports are in no table of the kernel's."""
        deadline = time.monotonic() + timeout
        with self.control() as control:
            while program.poll() is None and time.monotonic() < deadline:
                files = control.call("status")["rdma_cm"]
                if any(i["state"] == "LISTEN" for file in files if file["pid"] == program.pid for i in file["ids"]):
                    return
                time.sleep(0.01)


@contextmanager
def hosts(mtu: int = 9000) -> Iterator[tuple[Host, Host]]:
    """Two hosts on one cable, without NICs."""
    first, second = Host(1), Host(2)
    try:
        cable = f"ip link add eth0 netns {first.pid} type veth peer name eth0 netns {second.pid}"
        subprocess.run(cable.split(), check=True)
        for host in (first, second):
            host.configure(mtu)
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


def until(true: Callable[[], Any], what: str, timeout: float = 20) -> None:
    """Wait for a state of the world."""
    deadline = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < deadline, f"still not: {what}"
        time.sleep(0.02)
