"""The undo steps of a migration: each runs once, newest first, and a failure is known by its step, not by its words."""

from __future__ import annotations

import pytest

from testbed.base.errors import RunFailed
from testbed.migration.undo import Undo


def test_failures_are_steps() -> None:
    order: list[str] = []

    def fail() -> None:
        order.append("second")
        raise RunFailed("no answer", where="h2")

    undo = Undo()
    first = undo.add("the same name", lambda: order.append("first"))
    second = undo.add("the same name", fail)
    last = undo.add_last("the same name", lambda: order.append("last"))
    (failed,) = undo.run()
    assert order == ["second", "first", "last"]
    assert failed.step is second and failed.step not in (first, last)
    assert str(failed) == "the same name: no answer"
    assert undo.run() == [], "each step runs at most once"


def test_a_defect_is_not_swallowed() -> None:
    undo = Undo()
    undo.add("a step", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        undo.run()
