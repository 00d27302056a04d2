"""Every verb of the command line is shown in a document."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from testbed.cli.main import _app

ROOT = Path(__file__).resolve().parents[3]
TEXT = "\n".join(path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
VERBS = sorted(typer.main.get_command(_app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_is_shown(verb: str) -> None:
    assert re.search(rf"\btestbed {verb}\b", TEXT), f"no document shows how `testbed {verb}` is called"
