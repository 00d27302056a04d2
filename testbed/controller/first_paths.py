"""When the first paths go in: once nothing is missing, and again if a switch is late to confirm them.

Knows no OpenFlow: the application says what is missing, and how the paths are installed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Final

from testbed.controller.northbound import Unready

ATTEMPTS: Final = 6
"""In a row; each takes up to the barriers' timeout (10 s), and the harness waits for a minute."""
PAUSE: Final = 0.5
"""Seconds between two attempts: a switch that refuses answers at once."""

log = logging.getLogger("testbed.controller")


class FirstPaths:
    """Readiness of the application. `hub` is the framework's: its `spawn` and `sleep` let the event loop go on."""

    def __init__(self, install: Callable[[], object], missing: Callable[[], list[str]], hub: Any) -> None:
        self.ready_at: float | None = None
        """time.monotonic() at which all switches had confirmed the first paths."""
        self._install = install
        """Sends what is not confirmed yet and waits. Raises Unready. One call at a time is its own business."""
        self._missing = missing
        self._hub = hub
        self._newest = 0
        """Number of the last change of the topology after which nothing was missing."""

    def look(self) -> None:
        """A switch has told of its ports: install if that was the last thing missing."""
        if self.ready_at is None and not self._missing():
            self._newest += 1
            self._hub.spawn(self._bring_in, self._newest)

    def _bring_in(self, change: int) -> None:
        """Try until confirmed; a later change has an installation of its own, and what is missing will be one."""
        for attempt in range(ATTEMPTS):
            if attempt:
                self._hub.sleep(PAUSE)
            if self.ready_at is not None or change != self._newest or self._missing():
                return
            try:
                self._install()
            except Unready as error:
                log.error("first paths, attempt %d of %d: %s", attempt + 1, ATTEMPTS, error)
                continue
            if self.ready_at is None:
                self.ready_at = time.monotonic()
                log.info("all switches connected, paths installed")
            return
