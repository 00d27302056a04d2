"""Every field of a queue pair's context is looked at before an image is believed."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from softroce_ext.device.errors import ImageError
from softroce_ext.device.image_checks import CONTEXT_LIMITS, check_context
from softroce_ext.transport.context import QpContext

STRUCTURED = {"path", "inflight", "recv_wqe", "resources", "answers"}
"""Checked part by part."""
PLAIN = [item for item in fields(QpContext) if item.name not in STRUCTURED]
NUMBERS = [item.name for item in PLAIN if item.type == "int"]
WRONG = {"int": (-1, 1 << 64, None, "1", 1.5), "bool": (0, 2, None, "true"), "float": (None, "1", float("nan"), 1e300),
         "float | None": ("1", float("inf"), [])}  # fmt: skip


def test_a_fresh_context_passes() -> None:
    check_context(QpContext(qpn=17))


def test_every_number_has_a_limit() -> None:
    assert set(NUMBERS) == set(CONTEXT_LIMITS)


@pytest.mark.parametrize(("name", "value"), [(item.name, value) for item in PLAIN for value in WRONG[str(item.type)]])
def test_a_wrong_value_is_refused_by_name(name: str, value: Any) -> None:
    context = QpContext(qpn=17)
    setattr(context, name, value)
    with pytest.raises(ImageError, match=rf"queue pair .*: context: {name} = "):
        check_context(context)
