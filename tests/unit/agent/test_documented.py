"""docs/agent.md names every operation, and none that is not there."""

from __future__ import annotations

import re
from pathlib import Path

from testbed.agent.table import OPS

TEXT = (Path(__file__).resolve().parents[3] / "docs" / "agent.md").read_text()


def test_operations() -> None:
    rows = [line.split("|")[1] for line in TEXT.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`(\w+…?)`", row)}
    real = {name for name in OPS if not name.startswith("migrate_")}
    assert named == real | {"migrate_…", "shutdown"}
