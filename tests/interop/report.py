"""What a run of the matrix leaves: a line for each case while it runs, a summary to paste, and JSON with everything."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.interop.matrix import DIRECTIONS, KNOWN, Result


def record(result: Result) -> dict[str, Any]:
    """A result as JSON has it."""
    case = result.case
    return {
        "program": case.row.name, "transport": case.row.transport, "size": case.size, "mtu": case.mtu,
        "family": case.family, "direction": case.direction, "link": case.link, "ok": result.ok,
        "seconds": round(result.seconds, 3), "frames": result.frames, "impaired": result.impaired,
        "reason": result.reason, "first_try": result.before,
        "known": KNOWN.get((case.row.name, case.direction, case.family), ""), "server_output": result.outputs[0],
        "client_output": result.outputs[1],
    }  # fmt: skip


def line(console: Console, number: int, total: int, entry: dict[str, Any]) -> None:
    """One case."""
    mark = "[green]ok[/]    " if entry["ok"] else "[red]failed[/]"
    impaired = f"{entry['impaired']}/{entry['frames']}" if entry["link"] != "clean" else str(entry["frames"])
    console.print(
        f"{number:4}/{total} {mark} {entry['program']:32} {entry['size']:6} {entry['mtu']:5} IPv{entry['family']} "
        f"{entry['direction']:9} {entry['link']:9} {entry['seconds']:5.1f} s {impaired:>9} frames",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    if not entry["ok"]:
        console.print(f"               {entry['reason']}", style="red", highlight=False, markup=False)
    elif entry["first_try"]:
        console.print(f"               a later try; the first: {entry['first_try']}", highlight=False, markup=False)


def _cell(entries: Iterable[dict[str, Any]]) -> str:
    results = [entry["ok"] for entry in entries]
    if not results:
        return "–"
    return f"{sum(results)}/{len(results)}"


def summary(entries: list[dict[str, Any]]) -> Table:
    """A line for each program: passed/run for each direction on a clean link, then on bad ones."""
    table = Table(box=None, pad_edge=False)
    table.add_column("program")
    columns = [(direction, clean) for clean in (True, False) for direction in DIRECTIONS]
    for direction, clean in columns:
        table.add_column(f"{direction}\n{'clean' if clean else 'bad link'}", justify="right")
    for name in [*dict.fromkeys(entry["program"] for entry in entries), ""]:
        chosen = [entry for entry in entries if not name or entry["program"] == name]
        cells = [
            _cell(e for e in chosen if e["direction"] == direction and (e["link"] == "clean") == clean)
            for direction, clean in columns
        ]
        failed = not all(entry["ok"] for entry in chosen)
        table.add_row(name or "all", *cells, style="red" if failed else None)
    return table


def write(path: Path, entries: list[dict[str, Any]], **more: Any) -> None:
    """Everything, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**more, "cases": entries}, indent=1, ensure_ascii=False) + "\n")
