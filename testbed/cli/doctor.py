"""`testbed doctor`: reports what this machine can and cannot do."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from testbed.cli.probe import Finding

_STYLE = {"ok": "green", "limited": "yellow", "missing": "bold red", "unknown": "dim"}


def doctor(as_json: Annotated[bool, typer.Option("--json", help="print the findings as JSON")] = False) -> int:
    """Examine this machine. Reports what works, what is limited, what is missing, and how to fix it."""
    import dataclasses

    from testbed.base.errors import Exit
    from testbed.cli import probe

    findings = probe.examine()
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2, ensure_ascii=False))
    else:
        _print(findings)
    return Exit.ENVIRONMENT if any(finding.verdict == "missing" for finding in findings) else Exit.OK


def _print(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False)
    for finding in findings:
        detail = Text(finding.detail)
        if finding.hint and finding.verdict != "ok":
            detail.append(f"\n→ {finding.hint}", style="dim")
        table.add_row(finding.name, Text(finding.verdict, style=_STYLE[finding.verdict]), detail)
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(table)
    missing = [finding.name for finding in findings if finding.verdict == "missing"]
    if missing:
        console.print(f"\nThe testbed cannot run here; missing: {', '.join(missing)}.")
    else:
        console.print("\nThe testbed can run here.")
