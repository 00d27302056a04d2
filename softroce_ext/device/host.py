"""What the device asks of, and reports to, the machine around it: neighbours, the interface, the loop, the files.

The NIC process implements `Host`; a test hands in something smaller. There are no defaults: what is not connected is
an error when the device is made, and not a silence when something happens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from softroce_ext.device.user_queue_pair import UserQueuePair


class Host(Protocol):
    """The machine around a device."""

    def resolve(self, address: bytes) -> bytes | None:
        """Return the MAC (6 bytes) of the next hop to an IP address (4 or 16 bytes), or None: ask again later."""

    def link_speed(self) -> int | None:
        """Return the interface's speed in Mbit/s (None: unknown). No event reports a change of it."""

    def gid_changed(self, index: int, gid: bytes | None) -> None:
        """A row of the GID table has changed; gid: 16 bytes, or None for an empty row."""

    def link_changed(self) -> None:
        """The device's `link` is another one."""

    def group_changed(self, address: bytes, member: bool) -> None:
        """A multicast group (its IP address) has its first member (True), or has lost its last."""

    def last_turn(self, leaving: Sequence[UserQueuePair]) -> None:
        """Queue pairs are about to be destroyed: send what they have to send, an ACK perhaps."""
