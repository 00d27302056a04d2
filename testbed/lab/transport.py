"""How the testbed reaches an agent: where a host is, and a byte stream to the agent that is started there.

The stream is an SSH session by paramiko. Tests put a local process in its place.
"""

from __future__ import annotations

import base64
import os
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from testbed.agent.channel import ChannelClosed
from testbed.base.errors import EnvironmentProblem
from testbed.cleanup.state import RUN_VARIABLE

if TYPE_CHECKING:
    import paramiko

    from testbed.network import VirtualHost

PASSED_ON = ("PATH", "LANG", "LC_ALL", "TESTBED_CRIU", "CC")
"""Variables of the testbed that the agents of virtual hosts need too; an SSH session starts with almost none."""


class Transport(Protocol):
    """A byte stream to an agent that has been started."""

    def read(self) -> bytes:
        """Return what has arrived, at least one byte; empty at the end of the stream."""

    def write(self, data: bytes) -> None:
        """Send all of `data`. Raises ChannelClosed."""

    def complaints(self) -> str:
        """Return what the agent has written to standard error, as far as it has arrived."""

    def close(self) -> None:
        """Close the stream; the agent then ends everything that it started. Idempotent."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a host's sshd listens and how its agent is started there."""

    name: str
    """The host's name in the topology."""
    address: str
    """IP address or name of its sshd, on the management network."""
    interface: str
    """Name of its data interface on the host."""
    key_file: Path
    """Private key to log in with."""
    host_key: str | None = None
    """The one public host key to accept ("ssh-ed25519 AAAA…"); None: the user's known_hosts file decides."""
    port: int = 22
    user: str = "root"
    root: str = "/run/migros"
    """The host's private folder."""
    python: str = "python3"
    """Interpreter on the host that runs the agent."""
    source: str | None = None
    """Folder on the host that holds the packages `testbed` and `softroce_ext`; None if they are installed there."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables for the agent and all that it starts (the run's mark)."""

    @classmethod
    def of_virtual(cls, host: VirtualHost, run_id: str) -> Address:
        """The address of a Mininet host on this machine: same interpreter, same source, the run's key and mark."""
        passed = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        return cls(
            name=host.name,
            address=host.mgmt_ip,
            port=host.access.port,
            user=host.access.user,
            interface=host.interface,
            key_file=host.access.key,
            host_key=host.access.host_key,
            python=sys.executable,
            source=str(Path(__file__).resolve().parents[2]),
            environment={**passed, RUN_VARIABLE: run_id, "PYTHONUNBUFFERED": "1"},
        )

    def command(self) -> str:
        """Return the shell command that becomes the agent."""
        variables = dict(self.environment)
        if self.source is not None:
            variables["PYTHONPATH"] = self.source
        words = [f"{name}={value}" for name, value in variables.items()]
        words += [self.python, "-m", "testbed.agent", "--host", self.name, "--root", self.root]
        words += ["--interface", self.interface]
        return f"cd / && exec env {shlex.join(words)}"


class SshTransport:
    """The agent's standard streams through one SSH session; keep-alives notice a dead host."""

    def __init__(self, address: Address, timeout: float = 20.0) -> None:
        """Connect, retrying for `timeout` seconds because sshd may just be starting. Raises EnvironmentProblem."""
        import paramiko  # as in `_connect`

        self._client = _connect(address, timeout)
        try:
            transport = self._client.get_transport()
            if transport is None:
                raise paramiko.SSHException("the connection broke off")
            transport.set_keepalive(10)
            self._channel = transport.open_session(timeout=timeout)
            self._channel.exec_command(address.command())
        except (OSError, paramiko.SSHException, EOFError) as error:
            self._client.close()
            raise EnvironmentProblem(
                f"no SSH session for the agent: {str(error) or type(error).__name__}",
                where=address.name,
                hint="is the host overloaded? see its sshd's log",
            ) from error

    def read(self) -> bytes:
        """As Transport.read."""
        try:
            return self._channel.recv(1 << 16)
        except OSError:
            return b""

    def write(self, data: bytes) -> None:
        """As Transport.write."""
        try:
            self._channel.sendall(data)
        except OSError as error:
            raise ChannelClosed(str(error)) from error

    def complaints(self) -> str:
        """As Transport.complaints."""
        text = b""
        while self._channel.recv_stderr_ready() and (data := self._channel.recv_stderr(1 << 16)):
            text += data
        return text.decode(errors="replace").strip()

    def close(self) -> None:
        """As Transport.close."""
        self._client.close()


def _connect(address: Address, timeout: float) -> paramiko.SSHClient:
    import paramiko  # takes 0.2 s, which only a program that connects has to wait for

    deadline = time.monotonic() + timeout
    where = f"{address.name} ({address.user}@{address.address}:{address.port})"
    while True:
        client = paramiko.SSHClient()
        client.set_missing_host_key_policy(paramiko.RejectPolicy())
        if address.host_key is None:
            client.load_system_host_keys()
        else:
            kind, data = address.host_key.split()[:2]
            key = paramiko.PKey.from_type_string(kind, base64.b64decode(data))
            name = address.address if address.port == 22 else f"[{address.address}]:{address.port}"
            client.get_host_keys().add(name, kind, key)
        left = max(deadline - time.monotonic(), 1.0)
        try:
            client.connect(
                address.address,
                port=address.port,
                username=address.user,
                key_filename=str(address.key_file),
                allow_agent=False,
                look_for_keys=False,
                timeout=left,
                banner_timeout=left,
                auth_timeout=left,
            )
            return client
        except (paramiko.AuthenticationException, paramiko.BadHostKeyException) as error:
            client.close()
            raise EnvironmentProblem(
                f"SSH login refused: {error}", where=where, hint="see sshd's log among the run's logs"
            ) from error
        except (OSError, paramiko.SSHException, EOFError) as error:
            client.close()
            if time.monotonic() >= deadline:
                raise EnvironmentProblem(
                    f"no SSH connection within {timeout:g} s: {error}",
                    where=where,
                    hint="is sshd running there and reachable over the management network?",
                ) from error
            time.sleep(0.03)
