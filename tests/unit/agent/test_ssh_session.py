"""The SSH session for an agent. Invariant: without one, EnvironmentProblem is raised and nothing stays connected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import paramiko
import pytest

from testbed.base.errors import EnvironmentProblem
from testbed.lab import transport


class FakeClient:
    """A connection as paramiko's client, transport and channel at once, on which one call fails."""

    def __init__(self, call: str, error: BaseException | None) -> None:
        self.call = call
        self.error = error
        self.closed = False

    def _step(self, call: str) -> FakeClient | None:
        if call == self.call and self.error is not None:
            raise self.error
        return None if call == self.call else self

    def get_transport(self) -> Any:
        return self._step("get_transport")

    def set_keepalive(self, seconds: int) -> None:
        self._step("set_keepalive")

    def open_session(self, timeout: float) -> Any:
        return self._step("open_session")

    def exec_command(self, command: str) -> None:
        self._step("exec_command")

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        ("get_transport", None, "broke off"),
        ("open_session", paramiko.SSHException("Timeout opening channel."), "Timeout opening channel"),
        ("open_session", paramiko.ChannelException(2, "Connect failed"), "Connect failed"),
        ("exec_command", paramiko.SSHException("Channel closed."), "Channel closed"),
        ("exec_command", EOFError(), "EOFError"),
        ("exec_command", OSError("Socket is closed"), "Socket is closed"),
    ],
)
def test_a_session_that_cannot_be_had(
    monkeypatch: pytest.MonkeyPatch, call: str, error: BaseException | None, text: str
) -> None:
    client = FakeClient(call, error)
    monkeypatch.setattr(transport, "_connect", lambda address, timeout: client)
    address = transport.Address(name="h1", address="100.65.0.1", interface="h1-eth0", key_file=Path("key"))
    with pytest.raises(EnvironmentProblem, match=text) as caught:
        transport.SshTransport(address)
    assert caught.value.where == "h1" and client.closed
