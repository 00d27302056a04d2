"""Invariant: the core is sans-IO: it imports nothing that reads a clock or opens a socket or a process."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import softroce_ext

PACKAGE = Path(softroce_ext.__file__).parent
FORBIDDEN = {
    "asyncio", "ctypes", "fcntl", "io", "mmap", "multiprocessing", "os", "pathlib", "random", "secrets", "select",
    "selectors", "signal", "socket", "subprocess", "sys", "threading", "time",
}  # fmt: skip
ALLOWED_OURS = {"wire": ("softroce_ext.wire",), "transport": ("softroce_ext.wire", "softroce_ext.transport")}
FILES = [path for layer in ALLOWED_OURS for path in sorted((PACKAGE / layer).glob("*.py"))]


def imported(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names.append(node.module or "")
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_imports(path: Path) -> None:
    names = imported(path)
    assert not {name.split(".")[0] for name in names} & FORBIDDEN
    ours = ALLOWED_OURS[path.parent.name]
    for name in names:
        if name.startswith(("softroce_ext", "testbed")):
            assert name.startswith(ours), f"{path.parent.name} must not know {name}"


def test_nothing_forbidden_is_loaded_by_way_of_others() -> None:
    """A fresh interpreter that imports the engine has no socket, no thread and no randomness loaded by it."""
    code = (
        "import sys; before = set(sys.modules); import softroce_ext.transport.engine; "
        "print(*sorted(set(sys.modules) - before))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "softroce_ext.wire.frame" in loaded
    assert not set(loaded) & {"socket", "random", "asyncio", "select", "selectors", "multiprocessing", "subprocess"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_file_is_a_room(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400
    assert ast.get_docstring(ast.parse(path.read_text()))
