"""Every field of a queue pair's state is looked at before an image is believed."""

from __future__ import annotations

from dataclasses import Field, fields
from typing import Any

import pytest

from softroce_ext.device.errors import ImageError
from softroce_ext.device.image_checks import check_state
from softroce_ext.transport.state.attributes import Attributes
from softroce_ext.transport.state.fields import MOST
from softroce_ext.transport.state.queue_pair import RECORDS, QueuePairState

STRUCTURED = {"path", "inflight", "recv_wqe", "resources", "answers"}
"""Checked part by part."""
PLAIN = [(record, item) for record, kind in RECORDS.items() for item in fields(kind) if item.name not in STRUCTURED]
WRONG = {
    "int": (-1, 1 << 64, None, "1", 1.5),
    "int | None": (-1, 1 << 64, "1", 1.5),
    "bool": (0, 2, None, "true"),
    "float": (None, "1", float("nan"), 1e300),
    "float | None": ("1", float("inf"), []),
}


def test_a_fresh_state_passes() -> None:
    check_state(QueuePairState(Attributes(17)))


@pytest.mark.parametrize(("record", "item"), PLAIN, ids=str)
def test_every_number_has_a_limit(record: str, item: Field[Any]) -> None:
    assert (MOST in item.metadata) == (item.type in ("int", "int | None"))


@pytest.mark.parametrize(
    ("record", "name", "value"),
    [(record, item.name, value) for record, item in PLAIN for value in WRONG[str(item.type)]],
)
def test_a_wrong_value_is_refused_by_name(record: str, name: str, value: Any) -> None:
    state = QueuePairState(Attributes(17))
    setattr(getattr(state, record), name, value)
    with pytest.raises(ImageError, match=rf"queue pair .*: {record}: {name} = "):
        check_state(state)
