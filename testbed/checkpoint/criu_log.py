"""The errors that CRIU logs, as records. Its command line reports them in no other form."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

_ERROR: Final = re.compile(r"Error \(([^)]*)\): (.*)")
_HARMLESS: Final = (
    "rlimit: Can't setup RLIMIT_NOFILE",
    "Unable to detach from",
    "Dumping FAILED",
    "Restoring FAILED",
)
"""What CRIU logs as an error although it is none, or is only the consequence of the error before it."""
_NUMBERS: Final = {os.strerror(number): number for number in errno.errorcode}


class LogError(NamedTuple):
    """One error that CRIU logged."""

    place: str
    """Source file and line in CRIU, e.g. "criu/sk-inet.c:860"."""
    text: str
    number: int | None
    """The errno whose text (strerror) ends the line; None if it ends otherwise."""


def errors(log: Path) -> tuple[LogError, ...]:
    """The errors in a log, in order, without harmless ones. Empty when the log cannot be read."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ()
    return parse(text)


def parse(text: str) -> tuple[LogError, ...]:
    """The errors in what CRIU logged or printed, in order, without harmless ones."""
    found = [(match[1], match[2].strip()) for match in map(_ERROR.search, text.splitlines()) if match]
    return tuple(
        LogError(place, text, _NUMBERS.get(text.rpartition(": ")[2]))
        for place, text in found
        if not text.startswith(_HARMLESS)
    )


def summary(found: Sequence[LogError], fallback: str) -> str:
    """The first three errors on one line, or `fallback` when there is none."""
    return "; ".join(error.text for error in found[:3]) or fallback
