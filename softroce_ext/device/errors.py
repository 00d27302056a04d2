"""Errors of the device, by the party at fault."""

from __future__ import annotations

import errno
import os


class VerbsError(Exception):
    """The program's fault, or a limit: the verb is answered by an errno. `reason` is for the trace."""

    def __init__(self, number: int, reason: str = "") -> None:
        super().__init__(f"{errno.errorcode.get(number, number)}: {reason or os.strerror(number)}")
        self.number = number


class NotYet(Exception):
    """The verb cannot be answered before the MAC of `address` is known; nothing was changed, ask again later."""

    def __init__(self, address: bytes) -> None:
        super().__init__(f"waiting for the neighbour {'.'.join(map(str, address))}")
        self.address = address


class ImageError(Exception):
    """A NIC image cannot be restored: it is damaged, or something in it does not fit here. Names the field."""


class StateError(Exception):
    """A management command does not fit the state of its object (not held, not known, already there)."""
