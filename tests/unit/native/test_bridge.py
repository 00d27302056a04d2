"""Invariants: a child of a program with threads can use the device whatever these were doing at the fork; a descriptor
that another thread is closing is a bad one (EBADF) and no crash."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

from softroce_ext.native import build
from softroce_ext.uverbs.channel import LAYOUT_VERSION, FileChannel

HERE = Path(__file__).parent
PATIENCE = 30.0
"""Seconds after which a program that says nothing is taken for one that hangs."""
OPEN, COMMAND = 1, 2


class PlayedNic:
    """Receives what the bridge sends, and answers a command only on request."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.channels: dict[str, FileChannel] = {}
        (run / "ctx").mkdir()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.settimeout(PATIENCE)
        self._socket.bind(str(run / "uverbs.sock"))

    def receive(self, expected: int) -> tuple[int, str]:
        """Return (sequence, name) of the next datagram, which must be of the kind `expected`. Raises TimeoutError."""
        _, _, kind, sequence, _, name = struct.unpack_from("<IHHII48s", self._socket.recv(4096))
        assert kind == expected
        return sequence, name.rstrip(b"\0").decode()

    def serve_open(self) -> str:
        """Wait for an open and grant it; return the context's id."""
        _, fifo = self.receive(OPEN)
        identifier = str(len(self.channels) + 1)
        self.channels[identifier] = FileChannel(self.run, identifier, (os.geteuid(), os.getegid()))
        (self.run / "ctx" / fifo).write_bytes(struct.pack("<iIII48s", 0, 231, 192, LAYOUT_VERSION, identifier.encode()))
        return identifier

    def close(self) -> None:
        """Remove every channel."""
        for channel in self.channels.values():
            channel.close()
        self._socket.close()


@pytest.fixture
def nic(tmp_path: Path) -> Generator[PlayedNic]:
    played = PlayedNic(tmp_path)
    yield played
    played.close()


def test_fork(nic: PlayedNic) -> None:
    """The record of the inherited device, whose lock a thread of the parent holds, serves the child's own open."""
    environment = {**os.environ, "LD_PRELOAD": str(build.path("bridge")), "SOFTROCE_RUN": str(nic.run)}
    program = subprocess.Popen(
        [sys.executable, "-W", "ignore", HERE / "forking.py"],
        env=environment,
        stdin=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert program.stdin is not None
    try:
        parents = nic.serve_open()
        unanswered, name = nic.receive(COMMAND)
        assert name == parents
        program.stdin.write("\n")
        program.stdin.flush()
        childs = nic.serve_open()
        sequence, name = nic.receive(COMMAND)
        assert name == childs
        nic.channels[childs].answer(sequence, 0)
        nic.channels[parents].answer(unanswered, 0)
        assert program.wait(PATIENCE) == 0
    finally:
        if program.poll() is None:  # with its child, which may wait with all signals blocked
            os.killpg(program.pid, signal.SIGKILL)
        program.communicate()


@pytest.fixture(scope="module")
def closing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bridge's parts and closing.c as one program."""
    output = tmp_path_factory.mktemp("closing") / "closing"
    parts = map(str, [HERE / "closing.c", *build.sources("bridge")])
    flags = [*build.COMMON_FLAGS, "-Werror", f"-I{build.SOURCES / 'bridge'}"]
    words = [build.compiler(), *flags, "-o", str(output), *parts, *build.LINK["bridge"]]
    subprocess.run(words, check=True)
    return output


@pytest.mark.parametrize("call", ["write", "fstat", "dup", "dup2", "fcntl", "dup2 onto a hidden one"])
def test_a_descriptor_that_is_being_closed(closing: Path, call: str) -> None:
    assert subprocess.run([closing, call], check=False).returncode == 0
