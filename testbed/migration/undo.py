"""The steps that take a half-done migration back, newest first."""

from __future__ import annotations

from collections.abc import Callable

from testbed.base.errors import TestbedError


class Undo:
    """A list of named steps. Each runs at most once; one that fails does not keep the others from running."""

    def __init__(self) -> None:
        self._steps: list[tuple[str, Callable[[], object]]] = []

    def add(self, name: str, step: Callable[[], object]) -> None:
        """Remember how to take back what is about to be done: before it is done, for it may fail half way."""
        self._steps.append((name, step))

    def add_last(self, name: str, step: Callable[[], object]) -> None:
        """As `add`, for a step that must run after all the others, whenever they were added."""
        self._steps.insert(0, (name, step))

    def forget(self) -> None:
        """There is no way back any more."""
        self._steps.clear()

    def run(self) -> list[str]:
        """Take everything back. Returns the complaints of the steps that failed, "name: why"."""
        complaints = []
        while self._steps:
            name, step = self._steps.pop()
            try:
                step()
            except TestbedError as error:
                complaints.append(f"{name}: {error.message}")
        return complaints
