"""`testbed clean`: removes everything that killed runs left behind, and nothing else."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from testbed.cleanup.state import Run


def clean(
    run_ids: Annotated[list[str] | None, typer.Argument(metavar="[RUN…]", help="clean only these runs")] = None,
    force: Annotated[bool, typer.Option("--force", help="also end live runs")] = False,
) -> int:
    """Remove what killed runs left behind: processes, links, bridges, mounts and files. Live runs are left alone."""
    from testbed.base.errors import BadInput, EnvironmentProblem, Exit
    from testbed.cleanup import state
    from testbed.network import fixtures

    runs = state.runs()
    for run_id in run_ids or []:
        if run_id not in {run.run_id for run in runs}:
            raise BadInput("no such run", where=run_id, hint="testbed status lists the runs")
    if runs and os.geteuid() != 0:
        raise EnvironmentProblem("removing runs needs root", hint=f"sudo {sys.executable} -m testbed clean")
    chosen = [run for run in runs if not run_ids or run.run_id in run_ids]
    failed = [run.run_id for run in chosen if not _clean_one(run, force)]
    if os.geteuid() == 0:
        fixtures.clean()
    if not runs:
        typer.echo("nothing to clean")
    return Exit.ENVIRONMENT if failed else Exit.OK


def _clean_one(run: Run, force: bool) -> bool:
    """Clean up after one run, unless it is live; False when something could not be removed."""
    from testbed.cleanup import clean as cleanup

    if run.alive and not force:
        typer.echo(f"{run.run_id}: live (pid {run.owner_pid}), left alone (--force ends it)")
        return True
    removals = cleanup.clean(run)
    for removal in removals:
        typer.echo(f"{run.run_id}: {'removed ' if removal.problem is None else ''}{removal}")
    if not removals:
        typer.echo(f"{run.run_id}: nothing left to remove")
    return all(removal.problem is None for removal in removals)
