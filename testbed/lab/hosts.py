"""A host as the harness drives it: an agent at the other end of an SSH connection, Mininet host or real machine.

`Host.call(op, **arguments)` asks the agent (testbed.agent.operations has the table) and waits for the answer; events
reach the listeners in the host's reader thread. The transport is SSH by paramiko; tests may put a local process there.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from testbed.agent.channel import ChannelClosed, LineReader, encode
from testbed.base.errors import BadInput, EnvironmentProblem, RunFailed, TestbedError
from testbed.cleanup.state import RUN_VARIABLE

if TYPE_CHECKING:
    import paramiko

    from testbed.network import VirtualHost

EventListener = Callable[[str, Mapping[str, Any]], None]
"""Called with the host's name and the event (as the agent sent it, `event` and `t` included)."""

PASSED_ON = ("PATH", "LANG", "LC_ALL", "TESTBED_CRIU", "CC")
"""Variables of the harness that the agents of virtual hosts need too; an SSH session begins with almost none."""

_BLAME: dict[str, type[TestbedError]] = {"input": BadInput, "environment": EnvironmentProblem, "run": RunFailed}


class Transport(Protocol):
    """A byte stream to a started agent."""

    def read(self) -> bytes:
        """Whatever has arrived, at least one byte; empty at the end."""

    def write(self, data: bytes) -> None:
        """Send all of `data`. Raises ChannelClosed."""

    def complaints(self) -> str:
        """What the far side said on standard error, as far as known."""

    def close(self) -> None:
        """Close; the agent then ends all that it started. Idempotent."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a host's sshd is and how its agent is started there."""

    name: str
    """The host's name in the topology."""
    address: str
    """IP address or name of its sshd, on the management network."""
    interface: str
    """Its data interface, as the host calls it."""
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
    sudo: bool = False
    """Start the agent through `sudo -n` (a real machine where `user` is not root)."""

    @classmethod
    def of_virtual(cls, host: VirtualHost, run_id: str) -> Address:
        """A Mininet host of this machine: same interpreter, same source, the run's key and mark."""
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
        """The shell command that becomes the agent."""
        variables = dict(self.environment)
        if self.source is not None:
            variables["PYTHONPATH"] = self.source
        words = [f"{name}={value}" for name, value in variables.items()]
        words += [self.python, "-m", "testbed.agent", "--host", self.name, "--root", self.root]
        words += ["--interface", self.interface]
        prefix = "sudo -n env" if self.sudo else "env"
        return f"cd / && exec {prefix} {shlex.join(words)}"


class SshTransport:
    """The agent's standard streams through one SSH session; keep-alives notice a dead host."""

    def __init__(self, address: Address, timeout: float = 20.0) -> None:
        """Connect; sshd may just be starting, so try for `timeout` seconds. Raises EnvironmentProblem."""
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
                hint="is that host overloaded? its sshd's log says more",
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
    import paramiko  # 0.2 s: only whoever connects pays

    deadline = time.monotonic() + timeout
    where = f"{address.name} ({address.user}@{address.address}:{address.port})"
    while True:
        client = paramiko.SSHClient()
        client.set_missing_host_key_policy(paramiko.RejectPolicy())
        if address.host_key is None:
            client.load_system_host_keys()
        else:
            kind, data = address.host_key.split()[:2]
            key = paramiko.PKey.from_type_string(kind, _decode(data))
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
                f"SSH login refused: {error}", where=where, hint="sshd's log is among the run's logs"
            ) from error
        except (OSError, paramiko.SSHException, EOFError) as error:
            client.close()
            if time.monotonic() >= deadline:
                raise EnvironmentProblem(
                    f"no SSH connection within {timeout:g} s: {error}",
                    where=where,
                    hint="is sshd running there, and reachable over the management network?",
                ) from error
            time.sleep(0.03)


def _decode(data: str) -> bytes:
    import base64

    return base64.b64decode(data)


class Host:
    """One host and its agent. Thread-safe."""

    def __init__(self, name: str, transport: Transport, listener: EventListener | None = None) -> None:
        """Take over a transport to an agent that is starting; `ready` waits for it."""
        self.name = name
        self.about: dict[str, Any] = {}
        """What the agent said of itself: pid, python, kernel."""
        self._transport = transport
        self._listeners: list[EventListener] = [listener] if listener is not None else []
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self._waiting: dict[int, concurrent.futures.Future[dict[str, Any]]] = {}
        self._hello = threading.Event()
        self._closed: str | None = None
        self._closing = False
        self._reader = threading.Thread(target=self._read, name=f"host-{name}", daemon=True)
        self._reader.start()

    @classmethod
    def connect(cls, address: Address, listener: EventListener | None = None, timeout: float = 20.0) -> Host:
        """Log in, start the agent, wait for its first word. Raises EnvironmentProblem."""
        started = time.monotonic()
        host = cls(address.name, SshTransport(address, timeout), listener)
        try:
            host.ready(max(5.0, timeout - (time.monotonic() - started)))
        except BaseException:
            host.close()
            raise
        return host

    def subscribe(self, listener: EventListener) -> None:
        """Call `listener(host name, event)` for every event from now on. It must not use `call`: its thread reads."""
        self._listeners.append(listener)

    @property
    def alive(self) -> bool:
        """Whether the agent can still be asked."""
        return self._closed is None

    def ready(self, timeout: float) -> None:
        """Wait for the agent's `hello`. Raises EnvironmentProblem with what the far side said instead."""
        deadline = time.monotonic() + timeout
        while not self._hello.wait(0.05):
            if self._closed is None and time.monotonic() < deadline:
                continue
            reason = self._closed or f"no sign of it within {timeout:g} s"
            raise EnvironmentProblem(
                f"the agent did not start: {reason}",
                where=self.name,
                hint=self._transport.complaints().strip() or "try the command by hand: python -m testbed.agent --help",
            )

    def call(self, op: str, *, timeout: float | None = 60.0, **arguments: Any) -> dict[str, Any]:
        """Ask the agent for operation `op` and wait for its result. (`timeout` is how long to wait here; no operation
        has an argument of that name.)

        Raises BadInput, EnvironmentProblem or RunFailed as the agent lays the blame; RunFailed when the agent has gone
        or `timeout` seconds have passed (None: wait for ever).
        """
        return self.result(self.begin(op, **arguments), op, timeout)

    def begin(self, op: str, **arguments: Any) -> concurrent.futures.Future[dict[str, Any]]:
        """As `call`, without waiting: the future's result is the agent's raw answer. See `result`."""
        future: concurrent.futures.Future[dict[str, Any]] = concurrent.futures.Future()
        with self._lock:
            if self._closed is not None:
                raise RunFailed(f"the agent has gone: {self._closed}", where=self.name)
            number = next(self._ids)
            self._waiting[number] = future
        try:
            self._transport.write(encode({"id": number, "op": op, "args": arguments}))
        except ChannelClosed as error:
            self._end(str(error) or "the connection is closed")
        return future

    def result(
        self, future: concurrent.futures.Future[dict[str, Any]], op: str, timeout: float | None = 60.0
    ) -> dict[str, Any]:
        """Wait for what `begin` began; same errors as `call`."""
        try:
            answer = future.result(timeout)
        except concurrent.futures.TimeoutError as error:
            raise RunFailed(f"{op}: no answer within {timeout:g} s", where=self.name) from error
        if answer.get("ok"):
            result: dict[str, Any] = answer.get("result") or {}
            return result
        kind = _BLAME.get(answer.get("blame", "run"), RunFailed)
        raise kind(str(answer.get("error", "failed")), where=self.name, hint=answer.get("hint"))

    def fetch(self, remote: str, local: Path) -> int:
        """Copy a file of the host; its size in bytes."""
        import base64

        offset = 0
        with local.open("wb") as file:
            while True:
                answer = self.call("read_file", path=remote, offset=offset)
                data = base64.b64decode(answer["base64"])
                file.write(data)
                offset += len(data)
                if not data or offset >= answer["size"]:
                    return offset

    def close(self, timeout: float = 10.0) -> None:
        """Let the agent end all that it started, then close the connection. Idempotent, never raises."""
        self._closing = True
        try:
            if self._closed is None:
                self.call("shutdown", timeout=timeout)
        except TestbedError:
            pass  # closing the channel ends the agent just as well
        self._end("closed")
        self._transport.close()

    # ---- the reader thread -------------------------------------------------------------------------------------------

    def _read(self) -> None:
        reader = LineReader()
        reason = "its process ended"
        try:
            while data := self._transport.read():
                for message in reader.feed(data):
                    self._take(message)
        except ChannelClosed as error:
            reason = str(error)
        self._end(reason)

    def _take(self, message: dict[str, Any]) -> None:
        name = message.get("event")
        if name is None:
            with self._lock:
                future = self._waiting.pop(int(message.get("id") or 0), None)
            if future is not None:
                future.set_result(message)
            return
        if name == "hello":
            self.about = message
            self._hello.set()
        for listener in self._listeners:
            listener(self.name, message)

    def _end(self, reason: str) -> None:
        with self._lock:
            if self._closed is not None:
                return
            reason = "closed" if self._closing else reason
            self._closed = reason
            waiting, self._waiting = list(self._waiting.values()), {}
        for future in waiting:
            future.set_result({"ok": False, "error": f"the agent has gone: {reason}", "blame": "run"})
        for listener in self._listeners:
            listener(self.name, {"event": "agent_gone", "reason": reason, "t": time.monotonic()})


def connect_all(
    addresses: Iterable[Address], listener: EventListener | None = None, timeout: float = 20.0
) -> dict[str, Host]:
    """Connect to every host at once; all or none. Raises EnvironmentProblem, the first host's that has one."""
    wanted = list(addresses)
    pool = concurrent.futures.ThreadPoolExecutor(max_workers=max(1, min(32, len(wanted))))
    futures = [pool.submit(Host.connect, address, listener, timeout) for address in wanted]
    try:
        return {host.name: host for host in [future.result() for future in futures]}
    except BaseException:  # Ctrl-C too: whatever has connected, or does so yet, must be closed
        pool.shutdown(cancel_futures=True)
        for future in futures:
            if not future.cancelled() and future.exception() is None:
                future.result().close()
        raise
    finally:
        pool.shutdown()
