"""`testbed diagram`: draws traces of queue pairs as a sequence diagram."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def diagram(
    traces: Annotated[list[Path], typer.Argument(help="trace files, one per end, drawn from left to right")],
    output: Annotated[Path, typer.Option("--output", "-o", help="picture to write: .png, .svg or .pdf")] = Path(
        "diagram.png"
    ),
    qpn: Annotated[int | None, typer.Option("--qpn", help="draw this queue pair (default: the busiest)")] = None,
    begin: Annotated[float | None, typer.Option("--from", help="start, in ms after the first packet")] = None,
    end: Annotated[float | None, typer.Option("--to", help="end, in ms after the first packet")] = None,
) -> int:
    """Draw traces as a sequence diagram. The default window is around the first loss, NAK or RESUME."""
    from testbed.base.errors import BadInput, EnvironmentProblem, Exit
    from testbed.diagram import trace
    from testbed.diagram.layout import layout
    from testbed.diagram.picture import draw

    if output.suffix not in (".png", ".svg", ".pdf"):
        raise BadInput(f"unknown picture format {output.suffix!r}; allowed: .png, .svg, .pdf", where=str(output))
    found = layout([trace.read(path) for path in traces], qpn, begin, end)
    numbers = " and ".join(f"{number}" for number in sorted(found.qpns))
    try:
        draw(found, output, f"Queue pairs {numbers}")
    except OSError as error:
        raise EnvironmentProblem(f"cannot write the picture: {error.strerror}", where=str(output)) from error
    typer.echo(f"{output}: {len(found.arrows)} arrows")
    return Exit.OK
