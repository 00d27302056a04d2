"""`testbed clean`: remove everything that killed runs left behind, and nothing else."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer


def clean(
    run_ids: Annotated[list[str] | None, typer.Argument(metavar="[RUN…]", help="only these runs")] = None,
    force: Annotated[bool, typer.Option("--force", help="end live runs too")] = False,
) -> int:
    """Remove what killed runs left. Processes, links, bridges, mounts, files; live runs are left alone."""
    from testbed.base.errors import BadInput, EnvironmentProblem, Exit
    from testbed.cleanup import clean as cleanup
    from testbed.cleanup import state
    from testbed.network import fixtures

    runs = state.runs()
    for run_id in run_ids or []:
        if run_id not in {run.run_id for run in runs}:
            raise BadInput("no such run", where=run_id, hint="testbed status lists them")
    if runs and os.geteuid() != 0:
        raise EnvironmentProblem("cannot remove what root has made", hint=f"sudo {sys.executable} -m testbed clean")
    failed = False
    for run in runs:
        if run_ids and run.run_id not in run_ids:
            continue
        if run.alive and not force:
            typer.echo(f"{run.run_id}: live (pid {run.owner_pid}), left alone (--force ends it)")
            continue
        lines = cleanup.clean(run)
        for line in lines:
            typer.echo(f"{run.run_id}: removed {line}" if "NOT removed" not in line else f"{run.run_id}: {line}")
        failed |= any("NOT removed" in line for line in lines)
        if not lines:
            typer.echo(f"{run.run_id}: nothing was left")
    if os.geteuid() == 0:
        fixtures.clean()
    if not runs:
        typer.echo("nothing to clean")
    return Exit.ENVIRONMENT if failed else Exit.OK
