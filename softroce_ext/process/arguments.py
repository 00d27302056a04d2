"""The arguments of management commands: taken by name, checked, with errors that say what is expected."""

from __future__ import annotations

import ipaddress
from typing import Any

Arguments = dict[str, Any]


class CommandError(Exception):
    """The caller's fault: an argument is missing or of the wrong kind. `hint` says what is expected."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


def argument(arguments: Arguments, name: str, kind: type | tuple[type, ...], default: Any = ...) -> Any:
    """Return argument `name`, which must be of `kind`; without a default it must be there. Raises CommandError."""
    value = arguments.get(name, default)
    if value is ...:
        raise CommandError(f"argument {name!r} is missing")
    if value is not default and not isinstance(value, kind):
        names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise CommandError(f"argument {name!r} is {value!r}, expected {names}")
    return value


def ip_argument(arguments: Arguments, name: str) -> bytes:
    """Return the IP address (4 or 16 bytes) that argument `name` says. Raises CommandError."""
    text = argument(arguments, name, str)
    try:
        return ipaddress.ip_address(text).packed
    except ValueError:
        raise CommandError(f"argument {name!r} is {text!r}, expected an IP address such as 10.0.0.2") from None
