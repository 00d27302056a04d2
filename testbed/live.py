"""The live view of a run: stages, applications, packets and bytes per NIC with rates, the migration's phases.

It only listens to events (testbed.events). On a terminal it is a rich view that is redrawn; elsewhere plain lines, one
per thing that happens, so that a log stays readable.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, TextIO


class LiveView:
    """Follow a run. Use: `with LiveView() as view: folder.subscribe(view.on_event); …`.

    Writes to `stream` (default standard error, so that `--json` keeps standard output clean). `quiet` shows nothing.
    """

    def __init__(self, stream: TextIO | None = None, *, plain: bool | None = None, quiet: bool = False) -> None:
        """`plain`: lines in place of the redrawn view; default: when `stream` is no terminal."""

    def on_event(self, event: Mapping[str, Any]) -> None:
        """Take in one event; may be called from any thread."""

    def __enter__(self) -> LiveView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass
