"""Multicast groups: which UD queue pairs are in which (IBA 10.5), and what that asks of the port."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Final

from softroce_ext.device import limits
from softroce_ext.device.addressing import address_of, is_multicast
from softroce_ext.device.errors import VerbsError
from softroce_ext.device.queue_pair import QPT_UD, QueuePair
from softroce_ext.transport.engine import Engine

FIRST_MLID: Final = 0xC000


class Groups:
    """The groups of one device. `engine.multicast` is the table that packets are delivered by."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.changed: Callable[[set[bytes]], None] = lambda addresses: None
        """Called with the IP addresses of all groups that have members, when that set has changed."""

    def attach(self, qp: QueuePair, mgid: bytes, mlid: int) -> None:
        """ibv_attach_mcast. Raises VerbsError: EINVAL for what is no group or no UD queue pair, ENOMEM at a limit."""
        if qp.kind != QPT_UD or not is_multicast(address_of(mgid)) or 0 < mlid < FIRST_MLID:
            raise VerbsError(errno.EINVAL, "only UD queue pairs join, and only multicast groups")
        if mgid in qp.groups:
            return
        table = self._engine.multicast
        if mgid not in table and len(table) >= limits.MAX_MCAST_GRP:
            raise VerbsError(errno.ENOMEM, "too many multicast groups")
        if len(table.get(mgid, ())) >= limits.MAX_MCAST_QP_ATTACH:
            raise VerbsError(errno.ENOMEM, "too many queue pairs in the group")
        self.enter(qp, mgid)

    def enter(self, qp: QueuePair, mgid: bytes) -> None:
        """Put a queue pair into a group (also one that was restored in it)."""
        members = self._engine.multicast.setdefault(mgid, [])
        members.append(qp.transport)
        qp.groups.append(mgid)
        if len(members) == 1:
            self._tell()

    def detach(self, qp: QueuePair, mgid: bytes) -> None:
        """ibv_detach_mcast. Raises VerbsError(EINVAL) when the queue pair is not in the group."""
        if mgid not in qp.groups:
            raise VerbsError(errno.EINVAL, "not a member of the group")
        qp.groups.remove(mgid)
        members = self._engine.multicast[mgid]
        members.remove(qp.transport)
        if not members:
            del self._engine.multicast[mgid]
            self._tell()

    def leave_all(self, qp: QueuePair) -> None:
        """The queue pair goes."""
        for mgid in list(qp.groups):
            self.detach(qp, mgid)

    def _tell(self) -> None:
        self.changed({address_of(mgid) for mgid in self._engine.multicast})
