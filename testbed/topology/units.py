"""Quantities as a user writes them (`2s`, `500us`, `64MiB`, `0.1%`), parsed to seconds, bytes and fractions.

A number without a unit is rejected where its unit would be ambiguous (seconds or milliseconds?), with a hint.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Final

from pydantic import BeforeValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

_NUMBER: Final = r"(\d+(?:\.\d+)?|\.\d+)"
DURATION_PATTERN: Final = rf"^{_NUMBER}\s*(ns|us|µs|ms|s|min|h)$"
SIZE_PATTERN: Final = rf"^{_NUMBER}\s*(B|KB|MB|GB|KiB|MiB|GiB)$"
PERCENT_PATTERN: Final = rf"^{_NUMBER}\s*%$"

_SECONDS: Final = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}
_BYTES: Final = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def duration(value: Any) -> float:
    """Parse a duration (`2s`, `1.5ms`, `50us`) to seconds. Raises PydanticCustomError `unit`."""
    match = re.match(DURATION_PATTERN, value) if isinstance(value, str) else None
    if match:
        return float(match[1]) * _SECONDS[match[2]]
    raise PydanticCustomError(
        "unit", "invalid duration; allowed: a number with ns, us, ms, s, min or h", _missing_unit(value)
    )


def size(value: Any) -> int:
    """Parse a size (`64MiB`, `10MB`, `512B`) to bytes. Raises PydanticCustomError `unit`."""
    match = re.match(SIZE_PATTERN, value) if isinstance(value, str) else None
    if match:
        return round(float(match[1]) * _BYTES[match[2]])
    raise PydanticCustomError("unit", "invalid size; allowed: a number with B, KB, MB, GB, KiB, MiB or GiB", {})


def fraction(value: Any) -> float:
    """Parse a fraction (`0.001` or `0.1%`) of at least 0 and below 1. Raises PydanticCustomError `fraction`."""
    number = -1.0
    if isinstance(value, str) and (match := re.match(PERCENT_PATTERN, value)):
        number = float(match[1]) / 100
    elif isinstance(value, int | float) and not isinstance(value, bool):
        number = float(value)
    if 0 <= number < 1:
        return number
    hint = f"did you mean {value}%?" if isinstance(value, int | float) and 1 <= value < 100 else None
    raise PydanticCustomError(
        "fraction",
        "invalid fraction; allowed: at least 0 and below 1, or a percentage such as 0.1%",
        {"hint": hint},
    )


def moment(value: Any) -> float | int:
    """Parse when a migration starts: seconds as float, or bytes as int. Raises PydanticCustomError `unit`."""
    if isinstance(value, str):
        if re.match(DURATION_PATTERN, value):
            return duration(value)
        if re.match(SIZE_PATTERN, value):
            return size(value)
    raise PydanticCustomError(
        "unit",
        "invalid time or amount of data; allowed: a time after the program's start (2s, 500ms) or the data that it has "
        "sent and received (64MiB)",
        _missing_unit(value),
    )


def _missing_unit(value: Any) -> dict[str, str | None]:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return {"hint": f"add a unit, for example {value}s" if number else None}


def _text(pattern: str, description: str) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "pattern": pattern, "description": description})


Duration = Annotated[float, BeforeValidator(duration), _text(DURATION_PATTERN, "a time with its unit: 500us, 2s")]
"""A duration; the value is in seconds."""

Moment = Annotated[
    float | int,
    BeforeValidator(moment),
    WithJsonSchema(
        {
            "type": "string",
            "anyOf": [{"pattern": DURATION_PATTERN}, {"pattern": SIZE_PATTERN}],
            "description": "a time after the program's start (2s) or an amount of data sent and received (64MiB)",
        }
    ),
]
"""When a migration starts: seconds as float, or bytes as int."""

Fraction = Annotated[
    float,
    BeforeValidator(fraction),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
                {"type": "string", "pattern": PERCENT_PATTERN},
            ],
            "description": "a fraction of the packets: 0.001 or 0.1%",
        }
    ),
]
"""A fraction of packets, 0 ≤ value < 1."""
