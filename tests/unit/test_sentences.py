"""Invariant: no decision is taken by searching a sentence. Results are data; sentences are for people.

A literal of several words that is looked for in other text (`"NOT removed" in line`, `text.startswith("goes on")`) is
the sign of one. What another program says only in words is read in one named place (`CommandFailed.absent_in_kernel`,
`checkpoint.criu_log`), which turns it into data.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = [path for name in ("softroce_ext", "testbed", "experiments") for path in sorted((ROOT / name).rglob("*.py"))]


def searched(tree: ast.AST) -> list[str]:
    """The literals of several words that are looked for in text."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and any(isinstance(op, ast.In | ast.NotIn) for op in node.ops):
            if not isinstance(node.comparators[0], ast.Tuple | ast.List | ast.Set | ast.Dict):
                found += _literals(node.left)
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("startswith", "endswith", "find", "index", "partition", "split", "count")
        ):
            found += [text for argument in node.args for text in _literals(argument)]
    return [text for text in found if len(text.split()) > 1]


def _literals(node: ast.AST) -> list[str]:
    parts = [node] if isinstance(node, ast.Constant) else node.values if isinstance(node, ast.JoinedStr) else []
    if isinstance(node, ast.Tuple):
        parts = node.elts
    return [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_sentence_is_searched(path: Path) -> None:
    assert searched(ast.parse(path.read_text())) == []


@pytest.mark.parametrize(
    "code",
    [
        'failed = "NOT removed" in line',
        'frozen = text.startswith(f"{app} goes on")',
        'if "Cannot assign requested address" in error: pass',
        'message, hint = text.split("; hint: ")',
    ],
)
def test_such_a_decision_is_found(code: str) -> None:
    assert searched(ast.parse(code))
