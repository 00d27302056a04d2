"""Documents use the words of the glossary, and ordinary English where a translation suggests another word."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
AVOIDED = re.compile(
    r"\b(?:harness|partner|card|nobody|whoever|anew|begun|spoilt|spoiled|mended|stands still|goes on|deaf|is told)\b"
    r"|\bfor ever\b",
    re.IGNORECASE,
)
"""Words for which docs/glossary.md or ordinary English has another."""


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_words_are_those_of_the_glossary(document: Path) -> None:
    """Names of fields in backquotes may keep an old word, and so may the messages in the changelog's table."""
    found = [
        f"{number}: {word}"
        for number, line in enumerate(document.read_text(encoding="utf-8").splitlines(), 1)
        if not (document.name == "CHANGELOG.md" and line.startswith("|"))
        for word in AVOIDED.findall(re.sub(r"`[^`]*`", "", line))
    ]
    assert found == []
