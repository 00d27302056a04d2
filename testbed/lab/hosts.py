"""A host as the testbed drives it: requests to its agent, answers and events from it.

`Host.call(op, **arguments)` asks the agent (`testbed.agent.table` lists the operations) and waits for the answer.
Events reach the listeners in the host's reader thread. `testbed.lab.transport` provides the connection.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from testbed.agent.channel import ChannelClosed, LineReader, encode
from testbed.base.errors import BadInput, EnvironmentProblem, RunFailed, TestbedError
from testbed.lab.transport import Address, SshTransport, Transport

EventListener = Callable[[str, Mapping[str, Any]], None]
"""Called with the host's name and the event as the agent sent it, `event` and `t` included."""

_BLAME: dict[str, type[TestbedError]] = {"input": BadInput, "environment": EnvironmentProblem, "run": RunFailed}


class Host:
    """One host and its agent. Thread-safe."""

    def __init__(self, name: str, transport: Transport, listener: EventListener | None = None) -> None:
        """Take over a transport to an agent that is starting; `ready` waits until it has started."""
        self.name = name
        self.about: dict[str, Any] = {}
        """What the agent reports about itself: pid, python, kernel."""
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
        """Log in, start the agent and wait for its `hello`. Raises EnvironmentProblem."""
        started = time.monotonic()
        host = cls(address.name, SshTransport(address, timeout), listener)
        try:
            host.ready(max(5.0, timeout - (time.monotonic() - started)))
        except BaseException:
            host.close()
            raise
        return host

    def subscribe(self, listener: EventListener) -> None:
        """Call `listener(host name, event)` for every later event, in the reader thread: it must not use `call`."""
        self._listeners.append(listener)

    @property
    def alive(self) -> bool:
        """Whether the agent can still answer."""
        return self._closed is None

    def ready(self, timeout: float) -> None:
        """Wait for the agent's `hello`. Raises EnvironmentProblem, with the agent's error output as the hint."""
        deadline = time.monotonic() + timeout
        while not self._hello.wait(0.05):
            if self._closed is None and time.monotonic() < deadline:
                continue
            reason = self._closed or f"no answer within {timeout:g} s"
            raise EnvironmentProblem(
                f"the agent did not start: {reason}",
                where=self.name,
                hint=self._transport.complaints().strip() or "try the command by hand: python -m testbed.agent --help",
            )

    def call(self, op: str, *, timeout: float | None = 60.0, **arguments: Any) -> dict[str, Any]:
        """Ask the agent for operation `op` and wait `timeout` seconds (None: without a limit) for its result.

        No operation has an argument called `timeout`. Raises BadInput, EnvironmentProblem or RunFailed by the blame in
        the agent's answer; RunFailed also when the agent has gone or the time is up.
        """
        return self.result(self.begin(op, **arguments), op, timeout)

    def begin(self, op: str, **arguments: Any) -> concurrent.futures.Future[dict[str, Any]]:
        """Send a request without waiting; the future's result is the agent's raw answer. See `result`."""
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
        """Wait for the answer to a request that `begin` sent; raises the same errors as `call`."""
        try:
            answer = future.result(timeout)
        except concurrent.futures.TimeoutError as error:
            raise RunFailed(f"{op}: no answer within {timeout:g} s", where=self.name) from error
        if answer.get("ok"):
            result: dict[str, Any] = answer.get("result") or {}
            return result
        kind = _BLAME.get(answer.get("blame", "run"), RunFailed)
        raise kind(str(answer.get("error", "failed")), where=self.name, hint=answer.get("hint"))

    def close(self, timeout: float = 10.0) -> None:
        """Let the agent end everything that it started, then close the connection. Idempotent; never raises."""
        self._closing = True
        try:
            if self._closed is None:
                self.call("shutdown", timeout=timeout)
        except TestbedError:
            pass  # closing the channel ends the agent just as well
        self._end("the connection was closed")
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
            if self._closing:
                reason = "the connection was closed"
            self._closed = reason
            waiting, self._waiting = list(self._waiting.values()), {}
        for future in waiting:
            future.set_result({"ok": False, "error": f"the agent has gone: {reason}", "blame": "run"})
        for listener in self._listeners:
            gone = {"event": "agent_gone", "reason": reason, "expected": self._closing, "t": time.monotonic()}
            listener(self.name, gone)


def connect_all(
    addresses: Iterable[Address], listener: EventListener | None = None, timeout: float = 20.0
) -> dict[str, Host]:
    """Connect to every host at once; all or none. Raises the EnvironmentProblem of the first host that has one."""
    wanted = list(addresses)
    pool = concurrent.futures.ThreadPoolExecutor(max_workers=max(1, min(32, len(wanted))))
    futures = [pool.submit(Host.connect, address, listener, timeout) for address in wanted]
    try:
        return {host.name: host for host in [future.result() for future in futures]}
    except BaseException:  # Ctrl-C too: every host that has connected, or still does, must be closed
        pool.shutdown(cancel_futures=True)
        for future in futures:
            if not future.cancelled() and future.exception() is None:
                future.result().close()
        raise
    finally:
        pool.shutdown()
