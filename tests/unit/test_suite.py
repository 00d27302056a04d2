"""Invariant: the tests are one package, and a test depends on no other test.

No file changes where Python looks for modules, every folder with Python files is a package, every import of a module of
the tests is absolute, and what tests share is imported from a module that is not a test.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("tests", "benchmarks", "experiments", "docs")
STANDALONE = Path("tests/interop/probe")
"""Programs that are copied into a guest, which has no package of ours: they import each other by their bare names."""
FILES = [path.relative_to(ROOT) for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
TESTS = [path for path in FILES if path.parts[0] == "tests" and STANDALONE not in path.parents]
OWN_NAMES = {path.stem for path in TESTS} | {path.parent.name for path in TESTS} - {"tests"}
"""What only a changed search path could find without `tests.` before it."""
SEARCH_PATH = {("sys", "path"), ("sys", "path_hooks"), ("sys", "meta_path"), ("site", "addsitedir")}


def is_test(module: str) -> bool:
    """A module that pytest collects, or that it loads by itself."""
    name = module.rpartition(".")[2]
    return name.startswith("test_") or name == "conftest"


def problems(text: str) -> Iterator[str]:
    """What a file of this repository's tests does against the rules, in words."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) in SEARCH_PATH:
                yield f"line {node.lineno} changes where modules are found: {node.value.id}.{node.attr}"
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield f"line {node.lineno} imports by a relative name"
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names]
            modules = names
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                modules = [node.module, *(f"{node.module}.{name}" for name in names if node.module.startswith("tests"))]
                if any((node.module, name) in SEARCH_PATH for name in names):
                    yield f"line {node.lineno} changes where modules are found: {node.module}"
            for module in modules:
                if module.partition(".")[0] in OWN_NAMES:
                    yield f"line {node.lineno} imports {module} by a name that needs a changed search path"
                elif module.startswith("tests.") and is_test(module):
                    yield f"line {node.lineno} imports from the test module {module}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports(path: Path) -> None:
    """What a guest runs may import by bare names, but may not change the search path either."""
    found = list(problems((ROOT / path).read_text()))
    if STANDALONE in path.parents:
        found = [line for line in found if "search path" not in line]
    assert not found, f"{path}: {'; '.join(found)}; shared code belongs in tests/support"


@pytest.mark.parametrize("folder", sorted({path.parent for path in TESTS}), ids=str)
def test_every_folder_is_a_package_that_says_what_lives_there(folder: Path) -> None:
    file = ROOT / folder / "__init__.py"
    assert file.exists(), f"{folder} has Python files and no __init__.py"
    assert ast.get_docstring(ast.parse(file.read_text())), f"{folder}/__init__.py does not say what lives there"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("import sys\nsys.path.insert(0, 'x')", "changes where modules are found: sys.path"),
        ("import sys\nsys.path[:0] = ['x']", "changes where modules are found: sys.path"),
        ("from sys import path", "changes where modules are found: sys"),
        ("import site\nsite.addsitedir('x')", "changes where modules are found: site.addsitedir"),
        ("from tests.unit.cm.test_hostile import HERE", "the test module tests.unit.cm.test_hostile"),
        ("from tests.unit.cm import test_hostile", "the test module tests.unit.cm.test_hostile"),
        ("import tests.unit.cm.test_hostile", "the test module tests.unit.cm.test_hostile"),
        ("from tests.unit.agent.conftest import agent", "the test module tests.unit.agent.conftest"),
        ("from test_hostile import HERE", "imports test_hostile by a name"),
        ("import scene", "imports scene by a name"),
        ("def f():\n    from support.cm import net", "imports support.cm by a name"),
        ("from .lab import lab", "a relative name"),
        ("from . import lab", "a relative name"),
    ],
)
def test_each_breach_is_found(text: str, what: str) -> None:
    (problem,) = problems(text)
    assert what in problem


def test_what_is_allowed_is_not_found() -> None:
    text = "import sys\nfrom tests.support.cm import net\nfrom testbed.view.report import print_report\nsys.exit(0)"
    assert list(problems(text)) == []
