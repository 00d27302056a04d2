"""`testbed status`: shows the live runs on this machine, the state of their NICs, and the remains of killed runs."""

from __future__ import annotations

import json
import os
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from testbed.cleanup.state import Run


def status(as_json: Annotated[bool, typer.Option("--json", help="print the runs as JSON")] = False) -> int:
    """Show runs and their NICs. Lists programs, queue pairs, counters, and killed runs to remove with testbed clean."""
    from testbed.cleanup import state

    runs = state.runs(state.BASE)
    nics, problems = _nics(runs)
    if as_json:
        rows = [
            {
                "run_id": run.run_id,
                "pid": run.owner_pid,
                "alive": run.alive,
                "recorded": run.entries,
                "nics": [nic for nic in nics if nic["run_id"] == run.run_id],
            }
            for run in runs
        ]
        typer.echo(json.dumps(rows, indent=2))
    else:
        for run in runs:
            typer.echo(_line(run))
        if not runs:
            typer.echo("no runs on this machine")
        elif nics:
            _print(nics)
        elif os.geteuid() == 0 and any(run.alive for run in runs):
            typer.echo("no NIC is running")
    for problem in problems:
        typer.echo(problem, err=True)
    return 0


def _line(run: Run) -> str:
    kinds = Counter(entry["kind"].replace("_", " ") for entry in run.entries)
    things = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "nothing recorded"
    how = f"live (pid {run.owner_pid})" if run.alive else "killed (testbed clean removes it)"
    return f"{run.run_id}: {how}; {things}"


def _nics(runs: list[Run]) -> tuple[list[dict[str, Any]], list[str]]:
    """Reports of all running NICs, and why some are missing. A NIC that ends meanwhile does not make the verb fail."""
    from testbed.base.errors import TestbedError
    from testbed.cleanup import state
    from testbed.lab import nics

    if not any(run.alive for run in runs):
        return [], []
    reports, problems = [], []
    try:
        for nic in nics.running(state.BASE):
            try:
                reports.append(nics.report(nic))
            except TestbedError as error:
                problems.append(str(error))
    except TestbedError as error:
        problems.append(str(error))
    return reports, problems


def _print(reports: list[dict[str, Any]]) -> None:
    from rich.console import Console

    from testbed.view import nic_tables

    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 132
    for report in reports:
        with console.capture() as capture:
            console.print(nic_tables.render(report))
        typer.echo()
        typer.echo("\n".join(line.rstrip() for line in capture.get().splitlines()))
