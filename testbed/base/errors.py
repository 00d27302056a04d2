"""Errors by blame: whose fault it is decides the type, and the type decides the exit code.

Every error says in one sentence what is wrong, where (`where`: a file and a path in it, a host, a phase) and what to do
about it (`hint`). The command line prints these three and no traceback; any other exception that reaches the top is a
defect of the testbed and prints one. Standard library only, because the agents import it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum


class Exit(IntEnum):
    """Exit codes of every `testbed` verb."""

    OK = 0
    CHECK_FAILED = 1
    """The run took place, but a check of it (exit code, data, a migration) failed."""
    BAD_INPUT = 2
    """The topology or the command line is invalid; nothing was started."""
    ENVIRONMENT = 3
    """This machine cannot do it: something is missing, forbidden or broken."""
    INTERRUPTED = 130
    """Ctrl-C or SIGTERM; everything that the run created has been removed."""


class TestbedError(Exception):
    """Base of all errors that are reported to the user without a traceback."""

    __test__ = False  # pytest: the name starts with Test, but this is not a test class
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
    """The run started but could not be completed: a host died, or a step failed."""


class MigrationFailed(RunFailed):
    """A migration failed in `phase`; `rolled_back` says whether the program continues at the source."""

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
    """The user's fault, such as an invalid option or file."""

    exit_code = Exit.BAD_INPUT


class EnvironmentProblem(TestbedError):
    """The machine's fault, such as missing rights, a missing program, or a kernel without a feature."""

    exit_code = Exit.ENVIRONMENT


class Interrupted(TestbedError):
    """The user interrupted the run. Raised after the clean-up, for the exit code."""

    exit_code = Exit.INTERRUPTED

    def __init__(self, message: str = "interrupted", *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(message, where=where, hint=hint)


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake in an input file."""

    path: str
    """Place in the file, such as `apps.client.after` or `links[2].bw`; empty for the file as a whole."""
    message: str
    """What is wrong, and what is allowed."""
    value: str | None = None
    """The invalid value as the user wrote it, shortened; None if something is missing."""
    hint: str | None = None
    """What to do, such as a similar name, a bound or a command."""
    line: int | None = None
    """1-based line in the file; None if unknown."""

    def render(self, file: str) -> str:
        """The problem on one line, with place and value, and the hint on a second one."""
        place = f"{file}:{self.line}" if self.line is not None else file
        head = f"{place}: {self.path}" if self.path else place
        text = f"{head}: {self.message}"
        if self.value is not None:
            text += f" (got {self.value})"
        return f"{text}\n    hint: {self.hint}" if self.hint else text


class TopologyError(BadInput):
    """All problems of a topology file at once."""

    def __init__(self, file: str, problems: Sequence[Problem]) -> None:
        count = len(problems)
        super().__init__(f"{count} problem{'s' if count != 1 else ''} in the topology", where=file)
        self.file = file
        self.problems = tuple(problems)

    def __str__(self) -> str:
        return "\n".join([*(problem.render(self.file) for problem in self.problems), f"{self.file}: {self.message}"])
