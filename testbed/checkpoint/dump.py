"""One checkpoint of a running process tree: `criu dump`, held at the two points where the caller has to act.

    Dump(...)            CRIU starts while the program still runs
    wait_frozen()        the tree is frozen and no page is copied: stop everything that writes into its memory
    copy()               CRIU copies memory and state
    wait_copied()        the images are complete, the tree is still frozen: transfer them, restore them elsewhere
    commit()             CRIU kills the tree            — or —
    roll_back()          CRIU thaws the tree, open TCP connections included; possible at every moment before `commit`

CRIU locks established TCP connections (nftables) before it copies: the peer's segments are dropped, so that none is
answered by a reset. After a commit the lock stays, deliberately, until `network_lock.remove`.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path

from testbed.checkpoint import criu_log
from testbed.checkpoint.hooks import Call, CriuFailed, Hooks, action_script, plugin_directory

COMMON_OPTIONS = (
    "--tcp-established",
    "--manage-cgroups=ignore",
    "--file-locks",
    "--ext-unix-sk",
    "--no-default-config",
    "--network-lock",
    "nftables",
    "-v3",
)
"""Options that dump and restore must share. CRIU leaves cgroups alone, because a virtual host has none of its own."""
NICE = -10
"""Nice value of CRIU (the restored program gets its own back): what runs meanwhile prolongs the blackout."""
FREEZE_SECONDS = 30.0
COPY_SECONDS = 300.0
END_SECONDS = 60.0
"""Generous bounds on CRIU's steps: a dump that takes 0.1 s was seen to take 12 s on a busy virtual machine."""


def start(command: list[str], variables: dict[str, str], errors: Path) -> subprocess.Popen[bytes]:
    """Start CRIU in a session of its own, with its output in the file `errors`. Raises CriuFailed."""
    try:
        with errors.open("wb") as stream:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                env={**os.environ, **variables, "LD_PRELOAD": ""},
                start_new_session=True,
            )
    except OSError as error:
        raise CriuFailed(f"cannot start {command[0]}: {error.strerror}") from error
    with contextlib.suppress(OSError):  # not allowed on every machine
        os.setpriority(os.PRIO_PROCESS, process.pid, NICE)
    return process


class Dump:
    """A checkpoint in progress. `images` is an existing, empty folder on a tmpfs; `work` holds log and socket."""

    def __init__(self, criu: list[str], pid: int, images: Path, work: Path) -> None:
        """Start to dump the tree below `pid`. Raises BuildError, or CriuFailed if CRIU cannot be started."""
        self.images = images
        self.log = work / "dump.log"
        self._hooks = Hooks(work / "dump.sock")
        self._copied: Call | None = None
        self._frozen: Call | None = None
        self._ended = False
        command = [
            *criu,
            "dump",
            *("--tree", str(pid)),
            *("--images-dir", str(images)),
            *("--work-dir", str(work)),
            *("--log-file", self.log.name),
            *("--libdir", plugin_directory()),
            *("--action-script", action_script()),
            *COMMON_OPTIONS,
        ]
        try:
            self.process = start(command, self._hooks.environment("post-dump"), work / "dump.err")
        except CriuFailed:
            self._hooks.close()
            raise

    def _wait(self, name: str, timeout: float) -> Call:
        try:
            return self._hooks.wait(name, self.process, timeout)
        except CriuFailed as failure:
            error = self._failed(str(failure))
            self.roll_back()
            raise error from failure

    def wait_freezing(self, timeout: float = FREEZE_SECONDS) -> float:
        """Wait until CRIU starts to freeze the tree; return the time.monotonic(). After CriuFailed the tree runs."""
        return self._wait("pause", timeout).at

    def wait_frozen(self, timeout: float = FREEZE_SECONDS) -> float:
        """Wait until the tree is frozen; return the time.monotonic(). After CriuFailed the tree runs."""
        self._frozen = self._wait("checkpoint", timeout)
        return self._frozen.at

    def copy(self) -> None:
        """Let CRIU copy memory and state, without waiting for it."""
        if self._frozen is not None:
            self._frozen.answer(True)

    def wait_copied(self, timeout: float = COPY_SECONDS) -> float:
        """Wait until the images are complete; return the time.monotonic(). After CriuFailed the tree runs."""
        self._copied = self._wait("post-dump", timeout)
        return self._copied.at

    def commit(self, timeout: float = END_SECONDS) -> None:
        """Let CRIU kill the tree. Raises CriuFailed if CRIU does not end successfully."""
        if self._copied is None:
            raise CriuFailed("nothing to commit: the images are not complete")
        self._copied.answer(True)
        code = self._end(timeout)
        if code != 0:
            raise self._failed(f"ended with code {code} after it was to kill the program")

    def _failed(self, fallback: str) -> CriuFailed:
        errors = criu_log.errors(self.log)
        return CriuFailed(f"criu dump: {criu_log.summary(errors, fallback)}", errors)

    def roll_back(self, timeout: float = END_SECONDS) -> None:
        """Let CRIU thaw the tree and end. Idempotent; afterwards nothing of the checkpoint affects the program."""
        if self._ended:
            return
        for call in (self._frozen, self._copied):
            if call is not None:
                call.answer(False)
        self._hooks.close()  # a hook that is still to come finds no listener, which is a "no"
        self._end(timeout)

    def _end(self, timeout: float) -> int:
        """Wait for CRIU's exit status; terminate it only after `timeout`: a killed CRIU leaves the tree traced."""
        if self._ended:
            return self.process.wait()
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.terminate()
            code = self.process.wait()
        self._ended = True
        self._hooks.close()
        return code

    @property
    def image_bytes(self) -> int:
        """Size of all images so far, in bytes."""
        return sum(entry.stat().st_size for entry in os.scandir(self.images) if entry.is_file())
