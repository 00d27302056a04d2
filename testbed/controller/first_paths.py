"""Installing the first paths: once nothing is missing, and again if a switch is late to confirm them.

This module is independent of OpenFlow: the application tells it what is missing and how to install the paths.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Final

from testbed.controller.northbound import Unready

ATTEMPTS: Final = 6
"""Number of attempts; each takes up to the barriers' timeout (10 s), and the testbed waits for a minute."""
PAUSE: Final = 0.5
"""Seconds between two attempts, because a switch that refuses answers at once."""

log = logging.getLogger("testbed.controller")


class FirstPaths:
    """Readiness of the application. `hub` is the framework's: its `spawn` and `sleep` do not block the event loop."""

    def __init__(self, install: Callable[[], object], missing: Callable[[], list[str]], hub: Any) -> None:
        self.ready_at: float | None = None
        """time.monotonic() when all switches had confirmed the first paths; None before that."""
        self._install = install
        """Sends what is not confirmed yet and waits. Raises Unready. It allows one call at a time by itself."""
        self._missing = missing
        self._hub = hub
        self._latest_change = 0
        """Number of the last change of the topology after which nothing was missing."""

    def check(self) -> None:
        """Install the paths if nothing is missing any more. To be called when a switch has announced ports."""
        if self.ready_at is None and not self._missing():
            self._latest_change += 1
            self._hub.spawn(self._install_for, self._latest_change)

    def _install_for(self, change: int) -> None:
        """Try until confirmed. Stops after a later change, or if something is missing: `check` then starts it again."""
        for attempt in range(ATTEMPTS):
            if attempt:
                self._hub.sleep(PAUSE)
            if self.ready_at is not None or change != self._latest_change or self._missing():
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
