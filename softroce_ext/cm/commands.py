"""The table of rdma_cm's commands (rdma/rdma_user_cm.h), and what their handlers share.

A handler gets the manager, the file that the command was written to, the command's body and the time.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from enum import IntEnum
from typing import Final

from softroce_ext.cm.ids import CmId
from softroce_ext.cm.interfaces import File
from softroce_ext.cm.manager import CommunicationManager
from softroce_ext.device.errors import VerbsError

Body = memoryview
Handler = Callable[[CommunicationManager, File, Body, float], bytes]


class Command(IntEnum):
    """RDMA_USER_CM_CMD_*."""

    CREATE_ID = 0
    DESTROY_ID = 1
    BIND_IP = 2
    RESOLVE_IP = 3
    RESOLVE_ROUTE = 4
    QUERY_ROUTE = 5
    CONNECT = 6
    LISTEN = 7
    ACCEPT = 8
    REJECT = 9
    DISCONNECT = 10
    INIT_QP_ATTR = 11
    GET_EVENT = 12
    GET_OPTION = 13
    SET_OPTION = 14
    NOTIFY = 15
    JOIN_IP_MCAST = 16
    LEAVE_MCAST = 17
    MIGRATE_ID = 18
    QUERY = 19
    BIND = 20
    RESOLVE_ADDR = 21
    JOIN_MCAST = 22


HANDLERS: Final[dict[int, Handler]] = {}


def handles(command: Command) -> Callable[[Handler], Handler]:
    """Enter a handler into the table."""

    def register(handler: Handler) -> Handler:
        HANDLERS[command] = handler
        return handler

    return register


def get(cm: CommunicationManager, file: File, handle: int) -> CmId:
    """Return the id with `handle`. Raises VerbsError: ENOENT for an unknown one, EINVAL for another file's."""
    cm_id = cm.ids.get(handle)
    if cm_id is None:
        raise VerbsError(errno.ENOENT, f"there is no rdma_cm id {handle}")
    if cm_id.queue is not file.queue:
        raise VerbsError(errno.EINVAL, f"rdma_cm id {handle} belongs to another file")
    return cm_id
