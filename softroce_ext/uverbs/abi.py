"""Numbers and layouts of the uverbs write ABI (rdma/ib_user_verbs.h, rdma/rdma_user_rxe.h)."""

from __future__ import annotations

from enum import IntEnum
from struct import Struct
from typing import Final

from softroce_ext.device import limits
from softroce_ext.device.adapter import Adapter
from softroce_ext.device.shared import Ring

ABI_VERSION: Final = 6
"""class/infiniband_verbs/abi_version."""
RXE_ABI_VERSION: Final = 2
EXTENDED: Final = 0x80000000
COMMAND_BITS: Final = EXTENDED | 0xFF
"""The valid bits of a command's first word: its number, and whether it is an extended one."""


class Command(IntEnum):
    """enum ib_uverbs_write_cmds."""

    GET_CONTEXT = 0
    QUERY_DEVICE = 1
    QUERY_PORT = 2
    ALLOC_PD = 3
    DEALLOC_PD = 4
    CREATE_AH = 5
    DESTROY_AH = 8
    REG_MR = 9
    REREG_MR = 11
    DEREG_MR = 13
    ALLOC_MW = 14
    DEALLOC_MW = 16
    CREATE_COMP_CHANNEL = 17
    CREATE_CQ = 18
    RESIZE_CQ = 19
    DESTROY_CQ = 20
    REQ_NOTIFY_CQ = 23
    CREATE_QP = 24
    QUERY_QP = 25
    MODIFY_QP = 26
    DESTROY_QP = 27
    POST_SEND = 28
    ATTACH_MCAST = 30
    DETACH_MCAST = 31
    CREATE_SRQ = 32
    MODIFY_SRQ = 33
    QUERY_SRQ = 34
    DESTROY_SRQ = 35
    CREATE_XSRQ = 39
    EX_QUERY_DEVICE = EXTENDED | 1
    EX_CREATE_CQ = EXTENDED | 18
    EX_CREATE_QP = EXTENDED | 24


SIZES: Final[dict[int, tuple[int, int]]] = {
    Command.GET_CONTEXT: (8, 8),
    Command.QUERY_DEVICE: (8, 176),
    Command.QUERY_PORT: (16, 40),
    Command.ALLOC_PD: (8, 4),
    Command.DEALLOC_PD: (4, 0),
    Command.CREATE_AH: (56, 4),
    Command.DESTROY_AH: (4, 0),
    Command.REG_MR: (40, 12),
    Command.REREG_MR: (48, 8),
    Command.DEREG_MR: (4, 0),
    Command.ALLOC_MW: (16, 8),
    Command.DEALLOC_MW: (4, 0),
    Command.CREATE_COMP_CHANNEL: (8, 4),
    Command.CREATE_CQ: (32, 8),
    Command.RESIZE_CQ: (16, 8),
    Command.DESTROY_CQ: (16, 8),
    Command.REQ_NOTIFY_CQ: (8, 0),
    Command.CREATE_QP: (56, 32),
    Command.QUERY_QP: (16, 128),
    Command.MODIFY_QP: (112, 0),
    Command.DESTROY_QP: (16, 4),
    Command.POST_SEND: (24, 4),
    Command.ATTACH_MCAST: (24, 0),
    Command.DETACH_MCAST: (24, 0),
    Command.CREATE_SRQ: (32, 16),
    Command.MODIFY_SRQ: (16, 0),
    Command.QUERY_SRQ: (16, 16),
    Command.DESTROY_SRQ: (16, 4),
    Command.CREATE_XSRQ: (48, 16),
}
"""The kernel's structures: bytes of a command after its header, bytes of its response; with less it is refused."""

HEADER = Struct("<IHH")
"""struct ib_uverbs_cmd_hdr: command, in_words, out_words."""
EX_HEADER = Struct("<QHHI")
"""struct ib_uverbs_ex_cmd_hdr: response, provider_in_words, provider_out_words, reserved."""

MMINFO = Struct("<QII")
"""struct mminfo: offset to mmap, size, pad."""

U32 = Struct("<I")
U32X2 = Struct("<II")
U32X3 = Struct("<III")
U32X4 = Struct("<IIII")
REG_MR = Struct("<8xQQQII")
REREG_MR = Struct("<8xIIQQQII")
ALLOC_MW = Struct("<8xIB3x")
CREATE_CQ = Struct("<QIIi")
EX_CREATE_CQ = Struct("<QIIiIII")
EX_CREATE_CQ_RESP = Struct("<IIII")
CREATE_QP = Struct("<QIIIIIIIIIBBBx")
CREATE_QP_RESP = Struct("<IIIIIIII")
MODIFY_QP = Struct("<32s32sIIIIIIIHHBBBBBBBBBBBBBB2x")
QUERY_QP_RESP = Struct("<32s32sIIIIIIIIIIHHBBBBBBBBBBBBBBB5x")
MCAST = Struct("<16sIH")
SEND_WR_BYTES: Final = 128
"""struct ib_uverbs_send_wr."""
CREATE_SRQ = Struct("<QIIII")
CREATE_XSRQ = Struct("<QIIIII")
MODIFY_SRQ = Struct("<IIIIQ")

_DEVICE = Struct("<Q8s8sQQ32IHBB4x")
_EX_DEVICE_TAIL = Struct("<II24xQQQ16xII24x8xQII")
EX_DEVICE_BYTES: Final = _DEVICE.size + _EX_DEVICE_TAIL.size
_PORT = Struct("<IIIIIHHHBBBBBBBBBBBBBB")


def mminfo(ring: Ring | None) -> bytes:
    """Return the place of a ring in the program's device file (zeros: there is none)."""
    return MMINFO.pack(ring.offset, ring.size, 0) if ring is not None else bytes(MMINFO.size)


def device_attributes(adapter: Adapter) -> bytes:
    """struct ib_uverbs_query_device_resp."""
    return _DEVICE.pack(
        0,  # fw_ver
        adapter.guid,
        adapter.guid,
        limits.MAX_MR_SIZE,
        limits.PAGE_SIZE_CAP,
        limits.VENDOR_ID,
        0,  # vendor_part_id
        0,  # hw_ver
        limits.MAX_QP,
        limits.MAX_QP_WR,
        limits.DEVICE_CAP_FLAGS,
        limits.MAX_SGE,
        limits.MAX_SGE_RD,
        limits.MAX_CQ,
        limits.MAX_CQE,
        limits.MAX_MR,
        limits.MAX_PD,
        limits.MAX_QP_RD_ATOM,
        0,  # max_ee_rd_atom
        limits.MAX_RES_RD_ATOM,
        limits.MAX_QP_RD_ATOM,  # max_qp_init_rd_atom
        0,  # max_ee_init_rd_atom
        limits.ATOMIC_CAP_HCA,
        0,  # max_ee
        0,  # max_rdd
        limits.MAX_MW,
        0,  # max_raw_ipv6_qp
        0,  # max_raw_ethy_qp
        limits.MAX_MCAST_GRP,
        limits.MAX_MCAST_QP_ATTACH,
        limits.MAX_TOTAL_MCAST_QP_ATTACH,
        limits.MAX_AH,
        0,  # max_fmr
        0,  # max_map_per_fmr
        limits.MAX_SRQ,
        limits.MAX_SRQ_WR,
        limits.MAX_SRQ_SGE,
        limits.MAX_PKEYS,
        limits.LOCAL_CA_ACK_DELAY,
        1,  # phys_port_cnt
    )


def extended_device_attributes(adapter: Adapter) -> bytes:
    """struct ib_uverbs_ex_query_device_resp: no ODP, no time stamps, no RSS, no tag matching, no device memory."""
    tail = _EX_DEVICE_TAIL.pack(0, EX_DEVICE_BYTES, 0, 0, limits.DEVICE_CAP_FLAGS, 0, 0, 0, 0, 0)
    return device_attributes(adapter) + tail


def port_attributes(adapter: Adapter) -> bytes:
    """struct ib_uverbs_query_port_resp: the state of the interface in InfiniBand's terms."""
    link = adapter.current_link()
    counters = adapter.engine.counters
    return _PORT.pack(
        limits.PORT_CAP_FLAGS,
        limits.MAX_MSG_SIZE,
        min(counters.get("refused_pkey", 0), 0xFFFF),  # bad_pkey_cntr
        min(counters.get("refused_qkey", 0), 0xFFFF),  # qkey_viol_cntr
        limits.GID_TABLE_LENGTH,
        limits.PKEY_TABLE_LENGTH,
        0,  # lid
        0,  # sm_lid
        link.state,
        5,  # max_mtu: 4096
        limits.active_mtu(link.mtu),
        0,  # lmc
        1,  # max_vl_num
        0,  # sm_sl
        0,  # subnet_timeout
        0,  # init_type_reply
        link.rate.width,
        link.rate.speed,
        link.phys_state,
        2,  # link_layer: Ethernet
        1,  # flags: GRH required
        0,
    )
