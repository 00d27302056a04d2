"""Invariant: each room imports what its first lines say, the core is sans-IO, and no circle of files exists.

`MAY_IMPORT` is the one table of the architecture. The docstring of each package quotes its row, the diagram of rooms in
the documents is drawn from it, and here the imports of every file are compared with it, those for types included.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "softroce_ext.wire": (),
    "softroce_ext.transport": ("softroce_ext.wire",),
    "softroce_ext.device": ("softroce_ext.transport", "softroce_ext.wire"),
    "softroce_ext.uverbs": ("softroce_ext.device", "softroce_ext.transport"),
    "softroce_ext.cm": ("softroce_ext.device", "softroce_ext.transport", "softroce_ext.wire", "softroce_ext.uverbs"),
    "softroce_ext.port": ("softroce_ext.wire", "softroce_ext.device"),
    "softroce_ext.trace": ("softroce_ext.transport", "softroce_ext.wire"),
    "softroce_ext.control": (),
    "softroce_ext.native": (),
    "softroce_ext.simulation": ("softroce_ext.transport", "softroce_ext.wire", "softroce_ext.port"),
    "softroce_ext.process": (
        "softroce_ext.wire", "softroce_ext.transport", "softroce_ext.device", "softroce_ext.uverbs",
        "softroce_ext.cm", "softroce_ext.port", "softroce_ext.trace", "softroce_ext.control",
    ),
    "testbed.base": (),
    "testbed.record": (),
    "testbed.cleanup": ("testbed.base",),
    "testbed.topology": ("testbed.base",),
    "testbed.checkpoint": ("softroce_ext.native", "testbed.base"),
    "testbed.view": ("softroce_ext.transport", "testbed.record"),
    "testbed.controller": ("testbed.base", "testbed.cleanup"),
    "testbed.agent": ("softroce_ext.control", "softroce_ext.native", "testbed.base", "testbed.checkpoint"),
    "testbed.diagram": ("testbed.base", "testbed.view"),
    "testbed.network": ("testbed.base", "testbed.cleanup", "testbed.topology", "testbed.controller"),
    "testbed.lab": (
        "softroce_ext.control", "testbed.base", "testbed.cleanup", "testbed.record", "testbed.topology",
        "testbed.controller", "testbed.network", "testbed.agent",
    ),
    "testbed.migration": ("testbed.base", "testbed.record", "testbed.topology", "testbed.controller", "testbed.lab"),
    "testbed.run": (
        "softroce_ext.native", "testbed.base", "testbed.cleanup", "testbed.record", "testbed.view",
        "testbed.topology", "testbed.network", "testbed.checkpoint", "testbed.lab", "testbed.migration",
    ),
    "testbed.measure": ("testbed.base", "testbed.record", "testbed.topology", "testbed.lab", "testbed.run"),
    "testbed.cli": (
        "softroce_ext.native", "testbed.base", "testbed.cleanup", "testbed.record", "testbed.view",
        "testbed.topology", "testbed.controller", "testbed.network", "testbed.checkpoint", "testbed.diagram",
        "testbed.lab", "testbed.run",
    ),
}  # fmt: skip
"""Room → rooms that its files may import besides their own, by type too. No row is the way back of another."""

ENTRY_POINTS = {"softroce_ext/__init__.py", "softroce_ext/__main__.py", "testbed/__init__.py", "testbed/__main__.py"}
"""The only modules that lie in no room."""

SANS_IO = ("softroce_ext.wire", "softroce_ext.transport")
FORBIDDEN = {
    "asyncio", "ctypes", "fcntl", "io", "mmap", "multiprocessing", "os", "pathlib", "random", "secrets", "select",
    "selectors", "signal", "socket", "subprocess", "sys", "threading", "time",
}  # fmt: skip

FILES = [path.relative_to(ROOT) for name in ("softroce_ext", "testbed") for path in sorted((ROOT / name).rglob("*.py"))]
IN_ROOMS = [path for path in FILES if str(path) not in ENTRY_POINTS]


def room_of(path: Path) -> str:
    return ".".join(path.parts[:2])


def module_of(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path) for path in FILES}


def imported(path: Path, *, with_types: bool = True) -> list[str]:
    """The modules that a file imports; `from package import module` counts as the module."""
    names: list[str] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            names.extend(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module is not None
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                names.append(whole if whole in MODULES else node.module)
        elif isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            for child in (*node.body, *node.orelse) if with_types else node.orelse:
                visit(child)
            return
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse((ROOT / path).read_text()))
    return names


def ours(names: list[str]) -> list[str]:
    return [name for name in names if name.split(".")[0] in ("softroce_ext", "testbed")]


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """The strongly connected parts of more than one module (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def connect(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for following in sorted(graph[node]):
            if following not in index:
                connect(following)
                low[node] = min(low[node], low[following])
            elif following in stack:
                low[node] = min(low[node], index[following])
        if low[node] == index[node]:
            at = stack.index(node)
            if len(stack) - at > 1:
                found.append(set(stack[at:]))
            del stack[at:]

    for node in sorted(graph):
        if node not in index:
            connect(node)
    return found


def file_graph(*, with_types: bool) -> dict[str, set[str]]:
    graph: dict[str, set[str]] = {}
    for path in FILES:
        module = module_of(path)
        graph[module] = {name for name in imported(path, with_types=with_types) if name in MODULES} - {module}
    return graph


@pytest.mark.parametrize("path", IN_ROOMS, ids=str)
def test_a_file_imports_only_what_its_room_may(path: Path) -> None:
    room = room_of(path)
    allowed = (room, *MAY_IMPORT[room])
    for name in ours(imported(path)):
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
