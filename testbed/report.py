"""The report of a run, for a terminal of 80 columns or more: what happened, how long it took, where everything lies."""

from __future__ import annotations

from typing import TextIO

from rich.console import Console, Group, RenderableType

from testbed.summary import Summary


def render(summary: Summary) -> RenderableType:
    """The whole report as a rich renderable."""
    return Group()


def print_report(summary: Summary, stream: TextIO | None = None, *, width: int | None = None) -> None:
    """Print the report to `stream` (default standard output); colours only on a terminal, unless FORCE_COLOR."""
    Console(file=stream, width=width).print(render(summary))
