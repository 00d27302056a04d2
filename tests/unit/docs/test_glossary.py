"""docs/glossary.md defines each of its terms once, and has those that a reader meets everywhere else."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

TEXT = (Path(__file__).resolve().parents[3] / "docs" / "glossary.md").read_text(encoding="utf-8")
FIRST_CELLS = re.findall(r"^\| (\*\*.+?) \|", TEXT, re.MULTILINE)
TERMS = [term for cell in FIRST_CELLS for term in re.findall(r"\*\*(.+?)\*\*", cell)]
EXPECTED = {
    "GSI", "NIC", "Paused", "Resuming", "Running", "Stopped", "agent", "blackout", "doorbell", "freeze",
    "hold", "image", "impair", "node address", "opening", "peer", "phase", "queue pair", "queue-pair state",
    "record", "resume", "ring", "room", "session", "stop", "testbed", "thaw", "trace", "unhold",
    "user context", "user queue pair",
}  # fmt: skip


def test_each_term_is_defined_once() -> None:
    assert [term for term, times in Counter(TERMS).items() if times > 1] == []


def test_the_expected_terms_are_defined() -> None:
    assert set(TERMS) >= EXPECTED
