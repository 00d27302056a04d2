"""docs/architecture.md shows the rooms as the table of imports has them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.layers import MAY_IMPORT

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def make_layers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_layers", ROOT / "docs" / "make_layers.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_rooms_are_up_to_date(make_layers: ModuleType) -> None:
    """If this fails: `PYTHONPATH=. python docs/make_layers.py`."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert text == make_layers.document(text)


def test_every_room_is_a_node_and_a_row() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for room in MAY_IMPORT:
        assert f'{room.replace(".", "_")}["{room.partition(".")[2]}"]' in text
        assert f"| `{room.replace('.', '/')}/` |" in text


def test_an_import_that_follows_from_others_is_not_drawn(make_layers: ModuleType) -> None:
    table = {"a.top": ("a.middle", "a.low"), "a.middle": ("a.low",), "a.low": ()}
    assert make_layers.direct(table) == [("a.top", "a.middle"), ("a.middle", "a.low")]


def test_a_document_without_markers_is_refused(make_layers: ModuleType) -> None:
    with pytest.raises(SystemExit, match="markers are missing"):
        make_layers.document("# Architecture\n")
