"""Golden errors: `errors/*.yaml` → `errors/*.txt`, letter for letter, every mistake of a file at once.

After a wanted change of wording: `python tests/unit/topology/test_errors.py` rewrites the texts; read the diff.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.base.errors import BadInput, Exit, TopologyError
from testbed.topology import Topology, find, load, parse, resolve

FOLDER = Path(__file__).parent / "errors"
TOPOLOGIES = Path(__file__).parents[3] / "topologies"


def complaint(file: Path) -> str:
    """What the user reads about a file."""
    with pytest.raises(TopologyError) as caught:
        parse(file.read_text(), file.name)
    assert caught.value.exit_code is Exit.BAD_INPUT
    return f"{caught.value}\n"


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_golden(file: Path) -> None:
    assert complaint(file) == file.with_suffix(".txt").read_text()


def test_every_golden_text_has_its_input() -> None:
    assert {path.stem for path in FOLDER.glob("*.txt")} == {path.stem for path in FOLDER.glob("*.yaml")}


def test_missing_file_suggests_a_near_name() -> None:
    with pytest.raises(BadInput) as caught:
        find("topologies/migrate_piar.yaml")
    assert str(caught.value) == "topologies/migrate_piar.yaml: no such file\n  hint: did you mean migrate_pair?"


def test_folder_is_no_topology(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is a folder"):
        load(tmp_path)


def test_binary_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(BadInput, match="cannot be read"):
        load(file)


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all nodes below the root."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [found for key, value in items for found in ((*path, key), *places(value, (*path, key)))]


FABRIC = yaml.safe_load((TOPOLOGIES / "fabric.yaml").read_text())
ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 70000)
    | st.floats()
    | st.text(max_size=12)
    | st.just("h1")
    | st.just("s1"),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | st.integers(0, 3), inner, max_size=3)
    ),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(places(FABRIC)), ODD), min_size=1, max_size=3))
def test_any_mistake_is_a_topology_error(changes: list[tuple[tuple[Any, ...], Any]]) -> None:
    """Invariant: whatever stands in a file, it is either accepted (and then resolves) or refused as TopologyError."""
    data = copy.deepcopy(FABRIC)
    for path, value in changes:
        target = data
        try:
            for key in path[:-1]:
                target = target[key]
            target[path[-1]] = value
        except (TypeError, KeyError, IndexError):
            continue  # an earlier change has removed that place
    try:
        topology = parse(yaml.safe_dump(data, allow_unicode=True))
    except TopologyError as error:
        assert error.problems
        assert all("\n" not in problem.message for problem in error.problems)
    else:
        assert isinstance(topology, Topology)
        resolve(topology).to_plain()


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40))
def test_any_text_is_a_topology_error(text: str) -> None:
    """Invariant: no text makes the reader fail in another way than by TopologyError."""
    with pytest.raises(TopologyError):
        parse(text)


if __name__ == "__main__":
    for golden in sorted(FOLDER.glob("*.yaml")):
        golden.with_suffix(".txt").write_text(complaint(golden))
