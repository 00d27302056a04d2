"""The documents agree with the code: generated files are up to date, links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from testbed.migration.phases import TABLE
from testbed.record.summary import PHASES

ROOT = Path(__file__).parent.parent.parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def script(name: str) -> Any:
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_state_diagram_is_the_table() -> None:
    """If this fails: `PYTHONPATH=. python docs/make_state_diagrams.py`."""
    assert (ROOT / "docs" / "qp-states.md").read_text() == script("make_state_diagrams").document()


def test_phases_are_the_table() -> None:
    """If this fails: `PYTHONPATH=. python docs/make_phase_table.py`."""
    text = (ROOT / "docs" / "migration.md").read_text()
    assert text == script("make_phase_table").document(text)
    assert tuple(row.name for row in TABLE) == PHASES


def test_every_control_command_is_documented() -> None:
    from softroce_ext.process.management import COMMANDS

    rows = re.findall(r"^\| (`[^|]+`) \|", (ROOT / "docs" / "nic-control.md").read_text(), re.MULTILINE)
    documented = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert documented == set(COMMANDS)


def test_every_option_of_the_nic_is_documented() -> None:
    from softroce_ext.__main__ import parser

    text = (ROOT / "docs" / "nic-control.md").read_text()
    options = [option for action in parser()._actions for option in action.option_strings if option.startswith("--")]
    assert [option for option in options if option != "--help" and f"`{option}" not in text] == []


def test_no_option_is_documented_that_the_nic_lacks() -> None:
    from softroce_ext.__main__ import parser

    table = (ROOT / "docs" / "nic-control.md").read_text().partition("## Its run folder")[0]
    rows = re.findall(r"^\| (`--[^|]+`) \|", table, re.MULTILINE)
    documented = {option for row in rows for option in re.findall(r"--[a-z-]+", row)}
    assert documented - {option for action in parser()._actions for option in action.option_strings} == set()


def anchors(document: Path) -> set[str]:
    """The anchors that GitHub makes of a document's headings."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        path = document.parent / file if file else document
        assert path.exists(), f"{document.name}: {target}"
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path), f"{document.name}: {target}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_are_named_exist(document: Path) -> None:
    """`softroce_ext/…`, `testbed/…` and so on in backquotes are paths in this repository."""
    pattern = r"`((?:softroce_ext|testbed|topologies|experiments|benchmarks|tests|docs)/[\w./-]+)`"
    missing = [name for name in re.findall(pattern, document.read_text()) if not (ROOT / name).exists()]
    assert missing == []
