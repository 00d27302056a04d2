"""`testbed validate FILE…`: reports every mistake in topology files at once. Does not need root."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def validate(
    files: Annotated[list[Path], typer.Argument(metavar="FILE…", help="topology files, or names of shipped ones")],
    as_json: Annotated[bool, typer.Option("--json", help="print the problems as JSON, for editors")] = False,
) -> int:
    """Check topology files. Reports every problem with its place, its reason and a hint. Does not need root."""
    from testbed import topology
    from testbed.base.errors import BadInput, Exit, TopologyError

    found: list[dict[str, object]] = []
    for file in files:
        try:
            checked = topology.load(file)
        except TopologyError as error:
            found += [
                {
                    "file": str(file),
                    "path": problem.path,
                    "line": problem.line,
                    "value": problem.value,
                    "message": problem.message,
                    "hint": problem.hint,
                }
                for problem in error.problems
            ]
            if not as_json:
                typer.echo(str(error), err=True)
        except BadInput as error:
            found.append({"file": str(file), "path": "", "message": error.message, "hint": error.hint})
            if not as_json:
                typer.echo(str(error), err=True)
        else:
            if not as_json:
                typer.echo(f"{file}: fine ({_summary(checked)})")
    if as_json:
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
    return Exit.BAD_INPUT if found else Exit.OK


def _summary(checked: object) -> str:
    counted = [
        ("host", "hosts"),
        ("switch", "switches"),
        ("link", "links"),
        ("app", "apps"),
        ("migration", "migrations"),
    ]
    parts = []
    for one, many in counted:
        number = len(getattr(checked, many))
        parts.append(f"{number} {one if number == 1 else many}")
    return ", ".join(parts)
