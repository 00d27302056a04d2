"""Multicast groups that ids have joined (rdma_join_multicast)."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable
from typing import Final

from softroce_ext.cm.addresses import Addresses
from softroce_ext.cm.ids import CmEvent, CmId, Endpoint, EventType, Group, IdState
from softroce_ext.cm.params import UDP_QKEY, ud_param
from softroce_ext.device.addressing import address_of, gid_of, is_multicast
from softroce_ext.device.errors import VerbsError
from softroce_ext.transport.verbs import QpType

MULTICAST_QPN: Final = 0xFFFFFF


class Groups:
    """All memberships of one NIC."""

    def __init__(
        self, addresses: Addresses, take_handle: Callable[[], int], changed: Callable[[bytes, bool], None]
    ) -> None:
        """changed: called with a group's address when it gets its first member (True) and when it has lost its last."""
        self._addresses = addresses
        self._take_handle = take_handle
        self.by_handle: dict[int, Group] = {}
        self._members: Counter[bytes] = Counter()
        self._changed = changed

    def join(self, cm_id: CmId, uid: int, address: Endpoint) -> Group:
        """rdma_join_multicast; the queue pair is attached by the library when it sees the event."""
        if cm_id.qp_type != QpType.UD or cm_id.state not in (IdState.BOUND, IdState.ADDR_RESOLVED):
            raise VerbsError(errno.EINVAL, "only a bound id of datagrams can join a group")
        if cm_id.source is None or not self._addresses.own(cm_id.source.ip) or not is_multicast(address.ip):
            raise VerbsError(errno.EINVAL, "the id has no device, or the address is not a multicast group")
        if len(address.ip) != len(cm_id.source.ip):
            raise VerbsError(errno.EINVAL, "the group is of another address family than the id")
        group = Group(self._take_handle(), uid, gid_of(address.ip), cm_id)
        self.enter(group)
        cm_id.qkey = cm_id.qkey or UDP_QKEY
        param = ud_param(MULTICAST_QPN, cm_id.qkey, self._addresses.vector_to(cm_id, group.mgid))
        cm_id.queue.post(CmEvent(cm_id, EventType.MULTICAST_JOIN, 0, param, group=group))
        return group

    def enter(self, group: Group) -> None:
        """Enter a membership."""
        self._members[group.mgid] += 1
        if self._members[group.mgid] == 1:
            self._changed(address_of(group.mgid), True)
        self.by_handle[group.handle] = group.cm_id.groups[group.handle] = group

    def leave(self, group: Group) -> int:
        """rdma_leave_multicast. Returns how many of its events the program has taken."""
        self.by_handle.pop(group.handle, None)
        group.cm_id.groups.pop(group.handle, None)
        group.cm_id.queue.withdraw(group.cm_id, group)
        self._members[group.mgid] -= 1
        if not self._members[group.mgid]:
            del self._members[group.mgid]
            self._changed(address_of(group.mgid), False)
        return group.reported
