"""Write the rooms' diagram and table into docs/architecture.md, from `tests.support.layers.MAY_IMPORT`.

Run `PYTHONPATH=. python docs/make_layers.py` after the table or the first line of a package's docstring changed;
tests/unit/docs/test_layers_drawn.py compares the document with it.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path

from tests.support.layers import MAY_IMPORT

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "architecture.md"
BEGIN = "<!-- begin: written by docs/make_layers.py, do not edit -->"
END = "<!-- end: written by docs/make_layers.py -->"

Table = Mapping[str, tuple[str, ...]]

PROGRAMS = {"softroce_ext": "the NIC (softroce_ext)", "testbed": "the testbed (testbed)"}
"""The two top packages, in the order in which they are drawn, and their captions."""


def direct(table: Table) -> list[tuple[str, str]]:
    """Return the imports (importer, imported) that do not follow from a longer chain of others."""
    below: dict[str, set[str]] = {}

    def reached(room: str) -> set[str]:
        if room not in below:
            below[room] = set(table[room]).union(*(reached(lower) for lower in table[room]))
        return below[room]

    return [
        (room, lower)
        for room, row in table.items()
        for lower in row
        if not any(lower in reached(other) for other in row if other != lower)
    ]


def diagram(table: Table) -> str:
    """Return a Mermaid flowchart of the rooms, importers above what they import."""
    lines = ["```mermaid", "flowchart TB"]
    for package, caption in PROGRAMS.items():
        lines.append(f'    subgraph {package}_rooms["{caption}"]')
        lines += [f'        {_node(room)}["{room.partition(".")[2]}"]' for room in table if _package(room) == package]
        lines.append("    end")
    lines += [f"    {_node(room)} --> {_node(lower)}" for room, lower in direct(table)]
    return "\n".join([*lines, "```"])


def rows(table: Table) -> str:
    """Return a Markdown table: each room, the first line of its docstring, and what it may import."""
    lines = ["| room | what it is | may import |", "| --- | --- | --- |"]
    for room, row in table.items():
        allowed = ", ".join(f"`{name}`" for name in row) or "–"
        lines.append(f"| `{room.replace('.', '/')}/` | {_summary(room)} | {allowed} |")
    return "\n".join(lines)


def _package(room: str) -> str:
    return room.partition(".")[0]


def _node(room: str) -> str:
    return room.replace(".", "_")


def _summary(room: str) -> str:
    source = (ROOT / room.replace(".", "/") / "__init__.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0].rstrip(".").replace("|", "\\|")


def document(text: str) -> str:
    """Return `text` with everything between the two markers written again. Raises SystemExit without markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{TARGET}: the markers are missing; expected a line {BEGIN!r} and a line {END!r} after it")
    return f"{before}{BEGIN}\n\n{diagram(MAY_IMPORT)}\n\n{rows(MAY_IMPORT)}\n\n{END}{after}"


if __name__ == "__main__":
    TARGET.write_text(document(TARGET.read_text(encoding="utf-8")), encoding="utf-8")
    print(TARGET)
