"""Write the table of phases in docs/migration.md from `testbed.migration.phases`.

Run `PYTHONPATH=. python docs/make_phase_table.py` after the table has changed; a unit test compares them.
"""

from __future__ import annotations

from pathlib import Path

from testbed.migration.phases import TABLE

TARGET = Path(__file__).parent / "migration.md"
BEGIN, END = "<!-- phases: written by docs/make_phase_table.py -->\n", "<!-- end of phases -->\n"


def table() -> str:
    """The table in Markdown."""
    rows = ["| phase | who | what | undone by |", "| --- | --- | --- | --- |"]
    rows += [f"| {row.name} | {row.who} | {row.what} | {row.undo or '–'} |" for row in TABLE]
    return "\n".join(rows) + "\n"


def document(text: str) -> str:
    """The whole file, with the table between its two marks replaced."""
    before, _, rest = text.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise SystemExit(f"{TARGET.name} has no marks for the table: {BEGIN}{END}")
    return before + BEGIN + "\n" + table() + "\n" + END + after


if __name__ == "__main__":
    TARGET.write_text(document(TARGET.read_text()))
    print(TARGET)
