"""The table of operations, and the error that one of them may end with.

An operation is a function `name(agent, **arguments) -> dict | None`; arguments and result are JSON. Each request runs
in a thread of its own, so an operation may block, and must guard what it shares.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Final, Literal

Blame = Literal["input", "environment", "run"]
"""Whose fault: what the user asked for, what this host lacks, or something that happened during the run."""

Operation = Callable[..., "dict[str, Any] | None"]

OPS: Final[dict[str, Operation]] = {}

MODULES: Final = (
    "testbed.agent.nic",
    "testbed.agent.apps",
    "testbed.agent.addresses",
    "testbed.agent.files",
    "testbed.checkpoint.agent_ops",
)
"""Modules that fill OPS when imported, in this order."""


class OperationError(Exception):
    """An operation could not be done: one sentence, whose fault, and what to do about it."""

    def __init__(self, message: str, *, blame: Blame = "run", hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.blame: Blame = blame
        self.hint = hint


def operation(name: str) -> Callable[[Operation], Operation]:
    """Enter the decorated function in OPS under `name`."""

    def enter(function: Operation) -> Operation:
        if OPS.setdefault(name, function) is not function:
            raise ValueError(f"operation {name!r} is defined twice")
        return function

    return enter


def load() -> None:
    """Import every module of MODULES. One that is absent as a whole is passed over (a host without checkpoint code)."""
    for name in MODULES:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
                raise
