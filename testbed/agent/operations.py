"""What an operation is, and the error that one may end with.

An operation is a function `name(agent, **arguments) -> dict | None`; arguments and result are JSON. Each request runs
in a thread of its own, so an operation may block, and must guard what it shares.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

Blame = Literal["input", "environment", "run"]
"""Whose fault an error is: the request's, this host's, or that of something that happened during the run."""

Operation = Callable[..., "dict[str, Any] | None"]


class OperationError(Exception):
    """An operation failed: one sentence, whose fault it is, and what to do about it."""

    def __init__(self, message: str, *, blame: Blame = "run", hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.blame: Blame = blame
        self.hint = hint
