"""The attributes of the device: those of Linux rxe (kernel 6.1) as `ibv_devinfo -v` shows them there."""

from __future__ import annotations

from typing import Final

from softroce_ext.wire.headers import HEADER_ALLOWANCE
from softroce_ext.wire.headers import MTU_BYTES as MTU_BYTES

MAX_MR_SIZE: Final = (1 << 64) - 1
PAGE_SIZE_CAP: Final = 0xFFFFF000
VENDOR_ID: Final = 0xFFFFFF
MAX_QP: Final = 1048560
MAX_QP_WR: Final = 1048576
DEVICE_CAP_FLAGS: Final = 0x01223C76
MAX_SGE: Final = 32
MAX_SGE_RD: Final = 32
MAX_CQ: Final = 1048576
MAX_CQE: Final = 32767
MAX_MR: Final = 524287
MAX_PD: Final = 1048576
MAX_QP_RD_ATOM: Final = 128
MAX_RES_RD_ATOM: Final = 258048
ATOMIC_CAP_HCA: Final = 1
MAX_MW: Final = 524287
MAX_MCAST_GRP: Final = 8192
MAX_MCAST_QP_ATTACH: Final = 56
MAX_TOTAL_MCAST_QP_ATTACH: Final = 458752
MAX_AH: Final = 32767
MAX_SRQ: Final = 917503
MAX_SRQ_WR: Final = 1048576
MAX_SRQ_SGE: Final = 27
MAX_PKEYS: Final = 64
LOCAL_CA_ACK_DELAY: Final = 15
COMP_VECTORS: Final = 1

MAX_INLINE_DATA: Final = 512
"""Bytes of a send work request that may be in the queue itself."""

MAX_MSG_SIZE: Final = 0x800000
PORT_CAP_FLAGS: Final = 0x00010000
GID_TABLE_LENGTH: Final = 1024
PKEY_TABLE_LENGTH: Final = 1
DEFAULT_PKEY: Final = 0xFFFF

MTU_CODE: Final = {size: code for code, size in MTU_BYTES.items()}


def active_mtu(interface_mtu: int) -> int:
    """Return the ib_mtu code that fits an interface's MTU in bytes: the largest ≤ it − 80, at least 256."""
    fitting = [code for code, size in MTU_BYTES.items() if size <= interface_mtu - HEADER_ALLOWANCE]
    return max(fitting, default=1)
