"""Invariant: each room imports what its first lines say, the core is sans-IO, and no circle of files exists.

The table of rooms is `tests.support.layers.MAY_IMPORT`; the imports of every file are compared with it, those for types
included.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.layers import FILES, IN_ROOMS, MAY_IMPORT, ROOT, circles, file_graph, imported, ours, room_of

SANS_IO = ("softroce_ext.wire", "softroce_ext.transport")
FORBIDDEN = {
    "asyncio", "ctypes", "fcntl", "io", "mmap", "multiprocessing", "os", "pathlib", "random", "secrets", "select",
    "selectors", "signal", "socket", "subprocess", "sys", "threading", "time",
}  # fmt: skip


@pytest.mark.parametrize("path", IN_ROOMS, ids=str)
def test_a_file_imports_only_what_its_room_may(path: Path) -> None:
    room = room_of(path)
    allowed = (room, *MAY_IMPORT[room])
    for name in set(ours(imported(path))) - {"testbed", "softroce_ext"}:  # the package itself: its version
        assert ".".join(name.split(".")[:2]) in allowed, f"{room} must not know {name}"


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_quotes_its_rule(room: str) -> None:
    """The last paragraph of a package's docstring is `May import: …`, word for word the row of the table."""
    text = ast.get_docstring(ast.parse((ROOT / room.replace(".", "/") / "__init__.py").read_text())) or ""
    match = re.search(r"^May import: ([^.]*(?:\.\w[^.]*)*)\.$", text.split("\n\n")[-1], re.MULTILINE | re.DOTALL)
    assert match, f"{room}: its docstring does not end with what it may import"
    quoted = re.findall(r"`([\w.]+)`", match.group(1))
    assert sorted(quoted) == sorted(MAY_IMPORT[room])
    assert quoted or match.group(1) == "nothing"


def test_every_room_is_in_the_table() -> None:
    assert {room_of(path) for path in IN_ROOMS} == set(MAY_IMPORT)


def test_rooms_form_no_circle() -> None:
    assert circles({room: set(row) for room, row in MAY_IMPORT.items()}) == []


def test_no_circle_of_files_at_run_time() -> None:
    assert circles(file_graph(with_types=False)) == []


def test_one_circle_of_files_by_type() -> None:
    """The engine calls its queue pairs, and they (and their completions) know the engine that they are in."""
    found = [{name.removeprefix("softroce_ext.transport.") for name in circle} for circle in circles(file_graph())]
    assert found == [{"engine", "completion", "queue_pair"}]


def test_no_import_is_hidden_in_a_string() -> None:
    """Only the controller chooses a module by name: which of two OpenFlow frameworks is installed."""
    hidden = [str(path) for path in FILES if re.search(r"import_module|__import__", (ROOT / path).read_text())]
    assert hidden == ["testbed/controller/framework.py"]


@pytest.mark.parametrize("path", [path for path in IN_ROOMS if room_of(path) in SANS_IO], ids=str)
def test_the_core_does_no_input_or_output(path: Path) -> None:
    assert not {name.split(".")[0] for name in imported(path)} & FORBIDDEN


def test_nothing_forbidden_is_loaded_by_way_of_others() -> None:
    """A fresh interpreter that imports the engine has no socket, no thread and no randomness loaded by it."""
    code = (
        "import sys; before = set(sys.modules); import softroce_ext.transport.engine; "
        "print(*sorted(set(sys.modules) - before))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "softroce_ext.wire.frame" in loaded
    assert not set(loaded) & {"socket", "random", "asyncio", "select", "selectors", "multiprocessing", "subprocess"}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_is_a_room_of_moderate_size(path: Path) -> None:
    text = (ROOT / path).read_text()
    assert len(text.splitlines()) <= (400 if room_of(path) in SANS_IO else 410)
    assert ast.get_docstring(ast.parse(text))
