"""`testbed trace`: records the behaviour of a running host's queue pairs as JSON lines."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Annotated

import typer


def trace(
    host: Annotated[str, typer.Argument(help="host of a running topology")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="file to write (default: HOST.jsonl)")] = None,
    run: Annotated[str | None, typer.Option("--run", help="run id, if several runs have this host")] = None,
    qpn: Annotated[list[int] | None, typer.Option("--qpn", help="trace only this queue pair; may be repeated")] = None,
    seconds: Annotated[float | None, typer.Option("--seconds", min=0, help="stop after this many seconds")] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="record at most this many lines")] = 2_000_000,
) -> int:
    """Trace queue pairs of a running host. Stops after --seconds or on Ctrl-C; testbed diagram draws the trace."""
    from testbed.base.errors import Exit
    from testbed.lab import nics

    nic = nics.one(host, run)
    path = (output or Path(f"{host}.jsonl")).absolute()
    nic.call("trace_qp", file=str(path), qpns=qpn or None, limit=limit)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if seconds is None:
            typer.echo(f"tracing {host} to {path}; press Ctrl-C to stop", err=True)
        time.sleep(seconds if seconds is not None else 1e9)
    except KeyboardInterrupt:
        pass  # The user has stopped the trace.
    lines = nic.call("trace_qp", file=None)["lines"]
    typer.echo(f"{path}: {lines} lines")
    return Exit.OK
