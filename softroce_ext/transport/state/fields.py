"""What a field of a record may hold, written beside the field: the device checks a restored queue pair against it."""

from __future__ import annotations

from dataclasses import field
from typing import Any, Final

MOST: Final = "most"
"""Key of a field's metadata: the largest value of a number whose smallest is 0."""

U8, U16, U32, U64 = (1 << 8) - 1, (1 << 16) - 1, (1 << 32) - 1, (1 << 64) - 1


def number(default: int, most: int) -> Any:
    """A dataclass field for an integer in 0..most."""
    return field(default=int(default), metadata={MOST: int(most)})


def bounded(most: int) -> Any:
    """As `number`, but None unless it is set."""
    return field(default=None, metadata={MOST: int(most)})


def required(most: int) -> Any:
    """As `number`, without a default."""
    return field(metadata={MOST: int(most)})
