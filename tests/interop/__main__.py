"""`python -m tests.interop`: runs the matrix.

Exit codes: 0 all passed, 1 a case failed, 2 wrong call, 3 the machine cannot do it.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import typer
from rich.console import Console

from testbed.base.errors import Exit, TestbedError
from tests.interop import report
from tests.interop.guest.image import image
from tests.interop.lab import lab
from tests.interop.matrix import Case, Result, full, quick, run_all

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
console = Console()


def _only(cases: Iterable[Case], patterns: list[str]) -> list[Case]:
    return [case for case in cases if all(re.search(pattern, str(case)) for pattern in patterns)]


@app.command()
def run(
    quickly: bool = typer.Option(False, "--quick", help="the part that CI runs"),
    only: list[str] = typer.Option([], help="cases whose text matches; all of several"),
    output: Path = typer.Option(Path("results/interop.json"), "--json", help="where everything is written"),
    seed: int = typer.Option(1, help="of the link"),
    managed: bool = typer.Option(True, "--cm/--no-cm", help="with the programs that need rdma_cm"),
    listing: bool = typer.Option(False, "--list", help="print the cases and run none"),
) -> None:
    """Run every program of the table between our NIC and Linux rxe, and between two NICs of ours."""
    cases = _only(quick(managed) if quickly else full(managed), only)
    if listing:
        for case in cases:
            console.print(str(case), highlight=False)
        console.print(f"{len(cases)} cases")
        return
    begin = time.monotonic()
    entries: list[dict[str, object]] = []

    def tell(result: Result) -> None:
        entries.append(report.record(result))
        report.line(console, len(entries), len(cases), entries[-1])
        report.write(output, entries, seed=seed, seconds=round(time.monotonic() - begin, 1))

    for own in (False, True):
        chosen = [case for case in cases if (case.direction == "ours>ours") == own]
        if chosen:
            with lab(None if own else image()) as place:
                run_all(place, sorted(chosen, key=lambda case: case.mtu), seed, tell)
    seconds = time.monotonic() - begin
    _end(entries, f"{seconds:.0f} s")


@app.command()
def summary(files: list[Path]) -> None:
    """Print one summary of several runs' JSON files; a case that was run again counts as it was last."""
    newest: dict[tuple[object, ...], dict[str, object]] = {}
    for file in files:
        for entry in json.loads(file.read_text())["cases"]:
            newest[tuple(entry[key] for key in ("program", "size", "mtu", "family", "direction", "link"))] = entry
    _end(list(newest.values()), f"{len(files)} runs")


def _end(entries: list[dict[str, object]], note: str) -> None:
    console.print()
    console.print(report.summary(entries))
    failed = [entry for entry in entries if not entry["ok"]]
    again = sum(bool(entry["ok"] and entry.get("first_try")) for entry in entries)
    tries = f", {again} at a later try" if again else ""
    console.print(f"\n{len(entries) - len(failed)} of {len(entries)} cases passed{tries} ({note})", highlight=False)
    known = [entry for entry in failed if entry["known"]]
    for text in dict.fromkeys(f"known: {entry['program']} {entry['direction']}: {entry['known']}" for entry in known):
        console.print(text, highlight=False)
    if len(failed) > len(known) or not entries:
        raise typer.Exit(Exit.CHECK_FAILED)


if __name__ == "__main__":
    try:
        app()
    except TestbedError as error:
        print(f"interop: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
