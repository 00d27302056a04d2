"""Multicast groups: which UD queue pairs are in which (IBA 10.5), and what that asks of the port."""

from __future__ import annotations

import errno
from collections.abc import Callable

from softroce_ext.device import limits
from softroce_ext.device.addressing import address_of, is_multicast
from softroce_ext.device.errors import VerbsError
from softroce_ext.device.user_queue_pair import UserQueuePair
from softroce_ext.transport.engine import Engine
from softroce_ext.transport.verbs import QpType


class Groups:
    """The groups of one device. `engine.multicast` is the table that packets are delivered by."""

    def __init__(self, engine: Engine, changed: Callable[[bytes, bool], None]) -> None:
        """changed: called with a group's IP address when it gets its first member (True) and has lost its last."""
        self._engine = engine
        self._changed = changed
        self._members = 0
        """The memberships of all groups together."""

    def attach(self, qp: UserQueuePair, mgid: bytes, mlid: int) -> None:
        """ibv_attach_mcast. Raises VerbsError: EINVAL unless it is a UD queue pair and a group, ENOMEM at a limit.

        mlid: means nothing in RoCE (annex A17), but `detach` must name one that the queue pair joined with.
        """
        if qp.kind != QpType.UD or not is_multicast(address_of(mgid)):
            raise VerbsError(errno.EINVAL, "only a UD queue pair can join, and only a multicast group")
        if mgid in qp.groups:
            qp.groups[mgid].add(mlid)
            return
        table = self._engine.multicast
        if mgid not in table and len(table) >= limits.MAX_MCAST_GRP:
            raise VerbsError(errno.ENOMEM, "too many multicast groups")
        if len(table.get(mgid, ())) >= limits.MAX_MCAST_QP_ATTACH:
            raise VerbsError(errno.ENOMEM, "too many queue pairs in the group")
        if self._members >= limits.MAX_TOTAL_MCAST_QP_ATTACH:
            raise VerbsError(errno.ENOMEM, "too many members of multicast groups")
        self.enter(qp, mgid, {mlid})

    def enter(self, qp: UserQueuePair, mgid: bytes, mlids: set[int]) -> None:
        """Put a queue pair into a group (a restored one, too)."""
        members = self._engine.multicast.setdefault(mgid, [])
        members.append(qp.transport)
        qp.groups[mgid] = mlids
        self._members += 1
        if len(members) == 1:
            self._changed(address_of(mgid), True)

    def detach(self, qp: UserQueuePair, mgid: bytes, mlid: int) -> None:
        """ibv_detach_mcast. Raises VerbsError(EINVAL) when the queue pair is not in the group, or not by this mlid."""
        if mlid not in qp.groups.get(mgid, ()):
            raise VerbsError(errno.EINVAL, "not a member of the group")
        self._leave(qp, mgid)

    def _leave(self, qp: UserQueuePair, mgid: bytes) -> None:
        del qp.groups[mgid]
        self._members -= 1
        members = self._engine.multicast[mgid]
        members.remove(qp.transport)
        if not members:
            del self._engine.multicast[mgid]
            self._changed(address_of(mgid), False)

    def leave_all(self, qp: UserQueuePair) -> None:
        """Take a queue pair that is destroyed out of all its groups."""
        for mgid in list(qp.groups):
            self._leave(qp, mgid)
