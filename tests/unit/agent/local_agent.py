"""An agent as a local child process in place of an SSH session: the same byte stream, without network or keys."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from testbed.agent.channel import ChannelClosed


class LocalTransport:
    """`python -m testbed.agent` as a child; see testbed.lab.transport.Transport."""

    def __init__(self, argv: list[str]) -> None:
        self.process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
        )

    def read(self) -> bytes:
        assert self.process.stdout is not None
        return os.read(self.process.stdout.fileno(), 1 << 16)

    def write(self, data: bytes) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(data)
        except (OSError, ValueError) as error:  # ValueError: closed at this end, as a real channel says by OSError
            raise ChannelClosed(str(error)) from error

    def complaints(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read().decode() if self.process.poll() is not None else ""

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


def agent_argv(root: Path) -> list[str]:
    """Command of an agent whose host is this machine."""
    return [sys.executable, "-m", "testbed.agent", "--host", "h1", "--root", str(root), "--interface", "lo"]
