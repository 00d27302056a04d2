"""Documents are wrapped at 100 characters, so that a change of a sentence is a small diff."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_prose_is_wrapped(document: Path) -> None:
    """Tables, code and pictures cannot be wrapped."""
    long, code = [], False
    for number, line in enumerate(document.read_text(encoding="utf-8").splitlines(), 1):
        code ^= line.startswith("```")
        if not code and not line.startswith(("|", "    ", "![")) and len(line) > 100:
            long.append(f"{number}: {line[:60]}…")
    assert long == []
