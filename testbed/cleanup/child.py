"""A long-lived child process of a run that is recorded in the state file."""

from __future__ import annotations

import subprocess
from typing import Any

from testbed.cleanup.state import RunState


class Child:
    """One child process, from its start to its removal from the state file."""

    def __init__(self, state: RunState, argv: list[str], *, popen: dict[str, Any], **about: Any) -> None:
        """Start `argv` in a session of its own, so that Ctrl-C on the terminal does not reach it, and record it.

        popen: further arguments of subprocess.Popen; about: further fields of the state file's entry.
        """
        self._state = state
        self.process: subprocess.Popen[Any] = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, start_new_session=True, **popen
        )
        try:
            self._token = state.record("process", pid=self.process.pid, **about)
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise

    @property
    def alive(self) -> bool:
        """Whether the process has not ended."""
        return self.process.poll() is None

    def stop(self, patience: float) -> None:
        """End it by SIGTERM, after `patience` seconds by SIGKILL, and forget it. It may be called again."""
        if self.alive:
            self.process.terminate()
            try:
                self.process.wait(patience)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self._state.forget(self._token)
