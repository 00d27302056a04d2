"""Every file and every Python name that a document mentions exists, so that no rename leaves a document behind.

A path is written from the root of the repository, or from `softroce_ext/` or `testbed/` where a page says so.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
DOCUMENTS = [
    *(path for name in ("README.md", "CONTRIBUTING.md") if (path := ROOT / name).exists()),
    *sorted((ROOT / "docs").glob("*.md")),
]
PACKAGES = ("softroce_ext", "testbed")

FULL_PATH = re.compile(r"(?<![\w./-])(?:softroce_ext|testbed|tests|docs)/[\w./-]*\w")
SHORT_PATH = re.compile(r"`((?!rdma/)[\w-]+(?:/[\w.-]+)+\.(?:py|c|h))`")
"""Not `rdma/…`: those are the kernel's headers."""
DOTTED = re.compile(r"(?<![\w./-])(?:softroce_ext|testbed|tests)(?:\.[A-Za-z_]\w*)+")


def missing_paths(text: str) -> list[str]:
    """The paths in `text` that lead nowhere."""
    full = [name for name in FULL_PATH.findall(text) if not (ROOT / name).exists()]
    bases = (ROOT, *(ROOT / package for package in PACKAGES))
    short = [name for name in SHORT_PATH.findall(text) if not any((base / name).exists() for base in bases)]
    return sorted({*full, *short})


def missing_names(text: str) -> list[str]:
    """The dotted names in `text` that are neither a module nor defined in one."""
    return sorted({name for name in DOTTED.findall(text) if not defined(name)})


@cache
def defined(name: str) -> bool:
    """Whether a dotted name is a module, a package, or something at the top of one or in a class of it."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        base = ROOT.joinpath(*parts[:length])
        file = base.with_suffix(".py") if base.with_suffix(".py").exists() else base / "__init__.py"
        if file.exists():
            return _has(ast.parse(file.read_text(encoding="utf-8")).body, parts[length:])
    return False


def _has(body: list[ast.stmt], names: list[str]) -> bool:
    if not names:
        return True
    for node in body:
        if isinstance(node, ast.ClassDef) and node.name == names[0]:
            return _has(node.body, names[1:])
        if names[1:]:
            continue
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == names[0]:
            return True
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            if names[0] in {alias.asname or alias.name for alias in node.names}:
                return True
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        if names[0] in {ast.unparse(target) for target in targets}:
            return True
    return False


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_exist(document: Path) -> None:
    missing = missing_paths(document.read_text(encoding="utf-8"))
    assert not missing, f"{document.name} names files that do not exist: {', '.join(missing)}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_names_exist(document: Path) -> None:
    missing = missing_names(document.read_text(encoding="utf-8"))
    assert not missing, f"{document.name} names what does not exist: {', '.join(missing)}"


def test_what_does_not_exist_is_found() -> None:
    text = "see `testbed/cli/nowhere.py`, `process/nowhere.py`, testbed.cli.nowhere and `softroce_ext.control.Nothing`"
    assert missing_paths(text) == ["process/nowhere.py", "testbed/cli/nowhere.py"]
    assert missing_names(text) == ["softroce_ext.control.Nothing", "testbed.cli.nowhere"]


def test_what_exists_is_not_found() -> None:
    text = (
        "`process/loop.py` in `softroce_ext/`, tests/unit/test_layers.py, `native/bridge/bridge.h`; "
        "`python -m softroce_ext.simulation`, `softroce_ext.control.ControlClient(path).call('status')`, "
        "testbed.migration.move.Move.run, tests.support.layers.MAY_IMPORT"
    )
    assert missing_paths(text) == missing_names(text) == []
