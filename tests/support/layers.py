"""The architecture as one table, and the imports of every file of the product.

`MAY_IMPORT` says which rooms a room may import. The docstring of each package quotes its row, docs/architecture.md
shows all of it, and tests/unit/test_layers.py compares it with the imports.
"""

from __future__ import annotations

import ast
from pathlib import Path

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
    "testbed.topology": ("softroce_ext.wire", "testbed.base"),
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


def file_graph(*, with_types: bool = True) -> dict[str, set[str]]:
    graph: dict[str, set[str]] = {}
    for path in FILES:
        module = module_of(path)
        graph[module] = {name for name in imported(path, with_types=with_types) if name in MODULES} - {module}
    return graph
