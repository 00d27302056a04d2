"""docs/index.md lists every page of docs/, and each page says in its first line what it is about."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[3] / "docs"
INDEX = (DOCS / "index.md").read_text(encoding="utf-8")
PAGES = {path.name for path in DOCS.glob("*.md")} - {"index.md"}


def test_no_page_is_missing() -> None:
    listed = set(re.findall(r"^\| \[([\w-]+\.md)\]\(\1\) \|", INDEX, re.MULTILINE))
    assert listed >= PAGES, f"docs/index.md does not list {', '.join(sorted(PAGES - listed))}"


def test_every_page_is_in_a_reading_order() -> None:
    orders, _, _ = INDEX.partition("## Every page")
    linked = set(re.findall(r"\]\(([\w-]+\.md)\)", orders))
    assert linked >= PAGES, f"no reading order of docs/index.md has {', '.join(sorted(PAGES - linked))}"


def test_every_page_has_a_title() -> None:
    assert [name for name in sorted(PAGES) if not (DOCS / name).read_text(encoding="utf-8").startswith("# ")] == []
