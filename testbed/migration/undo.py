"""The steps that undo an unfinished migration, newest first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from testbed.base.errors import TestbedError


@dataclass(frozen=True, eq=False)
class Step:
    """One step of an undo; compared by identity."""

    name: str
    """What it achieves, for messages."""
    act: Callable[[], object]


@dataclass(frozen=True)
class Failed:
    """A step that failed."""

    step: Step
    error: TestbedError

    def __str__(self) -> str:
        return f"{self.step.name}: {self.error.message}"


class Undo:
    """A list of steps. Each runs at most once; one that fails does not keep the others from running."""

    def __init__(self) -> None:
        self._steps: list[Step] = []

    def add(self, name: str, act: Callable[[], object]) -> Step:
        """Remember how to undo what is about to be done. To be called first, because that may fail half-way."""
        step = Step(name, act)
        self._steps.append(step)
        return step

    def add_last(self, name: str, act: Callable[[], object]) -> Step:
        """Remember a step that must run after all the others, whenever they are added."""
        step = Step(name, act)
        self._steps.insert(0, step)
        return step

    def forget(self) -> None:
        """Drop all steps: there is no way back any more."""
        self._steps.clear()

    def run(self) -> list[Failed]:
        """Undo everything, and return the steps that failed."""
        failed = []
        while self._steps:
            step = self._steps.pop()
            try:
                step.act()
            except TestbedError as error:
                failed.append(Failed(step, error))
        return failed
