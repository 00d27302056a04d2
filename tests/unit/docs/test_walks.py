"""The walks of docs/architecture.md: each name in a step is defined in the step's files.

test_paths.py checks that the files exist; this module checks the functions, classes and control commands.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import NamedTuple

import pytest

from softroce_ext.process.management import COMMANDS

ROOT = Path(__file__).resolve().parents[3]
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
IMPORTS = (ast.Import, ast.ImportFrom)
OUTSIDE = {"process_vm_readv", "process_vm_writev", "criu restore"}
"""Names of the system, which no file of the project defines."""


class Step(NamedTuple):
    """A row of a walk."""

    walk: str
    number: int
    files: list[Path]
    names: list[str]


def steps() -> list[Step]:
    """Every row of every walk."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    walks = text.partition("## In five minutes")[2].partition("\n## ")[0].split("\n### ")[1:]
    found = []
    for walk in walks:
        title = walk.partition("\n")[0]
        for number, files, what in re.findall(r"^\| (\d+) \| ([^|]+) \| ([^|]+) \| [^|]+ \|$", walk, re.MULTILINE):
            paths = [path for name in re.findall(r"`([^`]+)`", files) if (path := located(name))]
            names = [name for name in re.findall(r"`([^`]+)`", what) if "/" not in name]
            found.append(Step(title, int(number), paths, names))
    return found


def located(name: str) -> Path | None:
    """The file that a walk writes as `name`: from the repository, or from `softroce_ext/`."""
    return next((base / name for base in (ROOT, ROOT / "softroce_ext") if (base / name).is_file()), None)


def defined(path: Path) -> set[str]:
    """What a file defines (methods as `name` and `Class.name`), what it imports, and the modules beside it."""
    names = {sibling.stem for sibling in path.parent.glob("*.py")}
    if path.suffix != ".py":
        return names
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef):
            names |= {node.name, *(f"{node.name}.{item.name}" for item in node.body if isinstance(item, FUNCTIONS))}
        elif isinstance(node, FUNCTIONS):
            names.add(node.name)
        elif isinstance(node, IMPORTS):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


STEPS = steps()


def test_the_walks_are_found() -> None:
    """Three walks, their steps numbered without a gap."""
    walks: dict[str, list[int]] = {}
    for step in STEPS:
        walks.setdefault(step.walk, []).append(step.number)
    assert len(walks) == 3
    assert all(numbers == list(range(1, len(numbers) + 1)) for numbers in walks.values())


@pytest.mark.parametrize("step", STEPS, ids=lambda step: f"{step.walk}, step {step.number}")
def test_a_step_names_what_its_files_define(step: Step) -> None:
    known = set().union(*map(defined, step.files)) | OUTSIDE | set(COMMANDS)
    assert step.files
    missing = [name for name in step.names if name not in known]
    assert not missing, f"step {step.number} of {step.walk!r} names {', '.join(missing)}, not in its files"
