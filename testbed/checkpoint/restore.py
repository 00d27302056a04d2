"""One restore of a process tree: `criu restore`, started ahead of time and held before the program runs.

    Restore(...)         CRIU starts, probes the kernel and then waits for the first image that it reads
    begin(inventory)     all other images are in `images`: CRIU gets the first one and restores
    wait_restored()      memory, descriptors and sockets are restored, the program is frozen: reroute, resume the NIC
    thaw()               the program runs                — or —
    abort()              CRIU kills what it restored; possible at every moment before `thaw`

CRIU's start and its probing of the kernel (tens of milliseconds) are not part of the blackout, because the first image
that `criu restore` reads, inventory.img, is a FIFO here: CRIU blocks in read(2) until the agent writes the content and
closes it. The agent holds both ends open, so that its death is the end of the file, and CRIU fails.
"""

from __future__ import annotations

import array
import fcntl
import os
import subprocess
import termios
import time
from pathlib import Path

from testbed.checkpoint import criu_log
from testbed.checkpoint.dump import COMMON_OPTIONS, start
from testbed.checkpoint.hooks import Call, CriuFailed, Hooks, action_script

FIRST_IMAGE = "inventory.img"
RESTORE_SECONDS = 300.0
END_SECONDS = 60.0
_POLL_SECONDS = 0.0002


def _unread(fifo: int) -> int:
    """The number of bytes in a FIFO that have not been read."""
    count = array.array("i", [0])
    fcntl.ioctl(fifo, termios.FIONREAD, count)
    return count[0]


class Restore:
    """A restore in progress. `images` and `work` are existing folders on a tmpfs.

    The calling process must be in the network and mount namespaces in which the tree is to be restored.
    """

    def __init__(self, criu: list[str], images: Path, work: Path) -> None:
        """Start CRIU up to its first image. Raises BuildError, or CriuFailed if it cannot be started."""
        self.images = images
        self.log = work / "restore.log"
        self._restored: Call | None = None
        self._fifo = -1
        os.mkfifo(images / FIRST_IMAGE, 0o600)
        self._hooks = Hooks(work / "restore.sock")
        self._fifo = os.open(images / FIRST_IMAGE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        command = [
            *criu,
            "restore",
            *("--images-dir", str(images)),
            *("--work-dir", str(work)),
            *("--log-file", self.log.name),
            *("--action-script", action_script()),
            "--restore-detached",
            *COMMON_OPTIONS,
        ]
        try:
            self.process = start(command, self._hooks.environment("post-restore"), work / "restore.err")
        except CriuFailed:
            self.abort()
            raise

    def begin(self, inventory: bytes) -> None:
        """Give CRIU its first image. Raises CriuFailed if CRIU has ended."""
        if self.process.poll() is not None:
            raise self._failed(f"ended with code {self.process.returncode} before its images arrived")
        try:
            os.write(self._fifo, inventory)  # far below a FIFO's capacity
            # If it were closed before CRIU has read it, the content would be lost; if left open, CRIU would see no end.
            while _unread(self._fifo):
                if self.process.poll() is not None:
                    raise self._failed(f"ended with code {self.process.returncode} before it read its images")
                time.sleep(_POLL_SECONDS)
        finally:
            os.close(self._fifo)
            self._fifo = -1

    def wait_restored(self, timeout: float = RESTORE_SECONDS) -> float:
        """Wait until the tree is complete and frozen; return the time.monotonic(). After CriuFailed nothing is left."""
        try:
            self._restored = self._hooks.wait("post-restore", self.process, timeout)
        except CriuFailed as failure:
            error = self._failed(str(failure))
            self.abort()
            raise error from failure
        return self._restored.at

    @property
    def root_pid(self) -> int:
        """The root of the restored tree, as this process numbers it. Valid after `wait_restored`."""
        if self._restored is None or self._restored.pid <= 0:
            raise CriuFailed("criu restore did not name the restored process")
        return self._restored.pid

    def thaw(self, timeout: float = END_SECONDS) -> None:
        """Let the program run, and wait until CRIU has ended. Raises CriuFailed."""
        if self._restored is None:
            raise CriuFailed("nothing has been restored")
        self._restored.answer(True)
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise self._failed(f"did not let the program run within {timeout:g} s") from None
        self._hooks.close()
        if code != 0:
            raise self._failed(f"ended with code {code} while it let the program run")

    def abort(self, timeout: float = END_SECONDS) -> None:
        """Let CRIU kill what it has restored, and end. Idempotent."""
        if self._fifo >= 0:
            # A CRIU that has not opened it yet would wait in open(2) for a writer.
            (self.images / FIRST_IMAGE).unlink(missing_ok=True)
            os.close(self._fifo)
            self._fifo = -1
        if self._restored is not None:
            self._restored.answer(False)
        self._hooks.close()
        process = getattr(self, "process", None)
        if process is not None and process.returncode is None:
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _failed(self, fallback: str) -> CriuFailed:
        errors = criu_log.errors(self.log)
        return CriuFailed(f"criu restore: {criu_log.summary(errors, fallback)}", errors)
