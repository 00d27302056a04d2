"""Processes of this host: waiting for their end without being their parent, signals, and pid namespaces.

A restored application is not a child of the agent, so every watch is a pidfd (pidfd_open(2), Linux 5.3).
"""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Callable, Iterator

Watcher = Callable[[], None]


class ProcessWatch:
    """One thread that waits for the end of any number of processes and calls back once for each."""

    def __init__(self) -> None:
        self._poll = select.epoll()
        self._lock = threading.Lock()
        self._watched: dict[int, tuple[int, Watcher]] = {}  # pidfd → pid, callback
        self._thread = threading.Thread(target=self._run, name="process-watch", daemon=True)
        self._thread.start()

    def watch(self, pid: int, ended: Watcher) -> None:
        """Call `ended()` in the watch's thread when `pid` ends. Raises ProcessLookupError if it has ended already."""
        descriptor = os.pidfd_open(pid)
        with self._lock:
            self._watched[descriptor] = (pid, ended)
            self._poll.register(descriptor, select.EPOLLIN)

    def unwatch(self, pid: int) -> None:
        """Stop watching `pid`."""
        with self._lock:
            for descriptor, (watched, _) in list(self._watched.items()):
                if watched == pid:
                    self._drop(descriptor)

    def _drop(self, descriptor: int) -> None:
        del self._watched[descriptor]
        self._poll.unregister(descriptor)
        os.close(descriptor)

    def _run(self) -> None:
        while True:
            for descriptor, _ in self._poll.poll():
                with self._lock:
                    # Since the poll, the descriptor may have been closed and its number reused for a live process.
                    if descriptor not in self._watched or not select.select([descriptor], [], [], 0)[0]:
                        continue
                    ended = self._watched[descriptor][1]
                    self._drop(descriptor)
                ended()


def wait_ended(pid: int, timeout: float) -> bool:
    """Wait up to `timeout` seconds for the end of `pid`, which need not be a child. Returns whether it has ended."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], timeout)[0])
    finally:
        os.close(descriptor)


def send_signal(pid: int, number: int) -> bool:
    """Send a signal. Returns False if there is no such process."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def end(pid: int, patience: float = 2.0) -> None:
    """SIGTERM, then SIGKILL after `patience` seconds."""
    if send_signal(pid, signal.SIGTERM) and not wait_ended(pid, patience):
        send_signal(pid, signal.SIGKILL)
        wait_ended(pid, patience)


def namespace_members(init_pid: int) -> Iterator[int]:
    """Yield every process in the pid namespace whose pid 1 is `init_pid`, by its number in this process's namespace."""
    try:
        space = os.readlink(f"/proc/{init_pid}/ns/pid")
    except OSError:
        return
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                if os.readlink(f"/proc/{name}/ns/pid") == space:
                    yield int(name)
            except OSError:
                continue


def inner_pid(pid: int) -> int | None:
    """The number of `pid` in its innermost pid namespace (NSpid of proc_pid_status(5)); None if it has ended."""
    try:
        with open(f"/proc/{pid}/status") as status:
            for line in status:
                if line.startswith("NSpid:"):
                    return int(line.split()[-1])
    except OSError:
        pass
    return None


def command_name(pid: int) -> str:
    """The name of a process (proc(5), comm); empty if it has ended."""
    try:
        with open(f"/proc/{pid}/comm") as file:
            return file.read().strip()
    except OSError:
        return ""
