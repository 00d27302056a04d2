"""`testbed status`: which runs are live on this machine, and which were killed and left something."""

from __future__ import annotations

import json
from collections import Counter
from typing import Annotated

import typer


def status(as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False) -> int:
    """List the runs on this machine. Live ones, and killed ones that `testbed clean` would remove."""
    from testbed import state

    runs = state.runs()
    if as_json:
        rows = [
            {"run_id": run.run_id, "pid": run.owner_pid, "alive": run.alive, "recorded": run.entries} for run in runs
        ]
        typer.echo(json.dumps(rows, indent=2))
        return 0
    for run in runs:
        kinds = Counter(entry["kind"].replace("_", " ") for entry in run.entries)
        things = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "nothing recorded"
        how = f"live (pid {run.owner_pid})" if run.alive else "killed: testbed clean removes it"
        typer.echo(f"{run.run_id}: {how}; {things}")
    if not runs:
        typer.echo("no runs")
    return 0
