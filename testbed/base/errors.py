"""Errors by blame: whose fault it is decides the type, and the type decides the exit code.

Every error says what is wrong in one sentence, where (`where`: a file and a path in it, a host, a phase) and what to do
about it (`hint`). The command line prints exactly these three and no traceback; anything else that reaches the top is a
defect of the testbed and does print one. Standard library only: the agents import this too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum


class Exit(IntEnum):
    """Exit codes of every `testbed` verb."""

    OK = 0
    CHECK_FAILED = 1
    """The run took place; a check of it (exit code, data, a migration) did not pass."""
    BAD_INPUT = 2
    """The topology or the command line is wrong; nothing was started."""
    ENVIRONMENT = 3
    """This machine cannot do it as it is: something is missing, forbidden or broken."""
    INTERRUPTED = 130
    """Ctrl-C or SIGTERM; everything that was made has been removed."""


class TestbedError(Exception):
    """Base of everything that the user is told about without a traceback."""

    __test__ = False  # pytest: the name begins with Test, but this is no test class
    exit_code: Exit = Exit.CHECK_FAILED

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{text}\n  hint: {self.hint}" if self.hint else text


class RunFailed(TestbedError):
    """The run began and could not be brought to its end (a host died, a step of the run failed)."""


class MigrationFailed(RunFailed):
    """A migration did not complete. `phase` is the one that failed; `rolled_back` says that the source runs on."""

    def __init__(
        self,
        message: str,
        *,
        phase: str,
        rolled_back: bool,
        where: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, where=where, hint=hint)
        self.phase = phase
        self.rolled_back = rolled_back


class BadInput(TestbedError):
    """The user's fault: a wrong option, a wrong file."""

    exit_code = Exit.BAD_INPUT


class EnvironmentProblem(TestbedError):
    """The machine's fault: not root, a program missing, a kernel that refuses."""

    exit_code = Exit.ENVIRONMENT


class Interrupted(TestbedError):
    """The user ended the run. Raised after the clean-up, so that the exit code tells."""

    exit_code = Exit.INTERRUPTED

    def __init__(self, message: str = "interrupted", *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(message, where=where, hint=hint)


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake in an input file."""

    path: str
    """Where in the file, dotted: `apps.client.after`, `links[2].bw`; empty for the file as a whole."""
    message: str
    """What is wrong, with what is allowed."""
    value: str | None = None
    """The bad value as the user wrote it, shortened; None if something is missing."""
    hint: str | None = None
    """What to do: a nearby name, a bound, a command."""
    line: int | None = None
    """1-based line in the file, where known."""

    def render(self, file: str) -> str:
        """Two or three lines: place, what is wrong with its value, the hint."""
        place = f"{file}:{self.line}" if self.line is not None else file
        head = f"{place}: {self.path}" if self.path else place
        text = f"{head}: {self.message}"
        if self.value is not None:
            text += f" (got {self.value})"
        return f"{text}\n    hint: {self.hint}" if self.hint else text


class TopologyError(BadInput):
    """Everything that is wrong with a topology file, all at once."""

    def __init__(self, file: str, problems: Sequence[Problem]) -> None:
        count = len(problems)
        super().__init__(f"{count} problem{'s' if count != 1 else ''} in the topology", where=file)
        self.file = file
        self.problems = tuple(problems)

    def __str__(self) -> str:
        return "\n".join([*(problem.render(self.file) for problem in self.problems), f"{self.file}: {self.message}"])
