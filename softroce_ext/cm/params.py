"""The structures of connection parameters in the command ABI (rdma/rdma_user_cm.h, rdma/ib_user_verbs.h)."""

from __future__ import annotations

from struct import Struct
from typing import Final, NamedTuple

from softroce_ext.device.address_handle import Destination

UDP_QKEY: Final = 0x01234567
"""RDMA_UDP_QKEY: the Q_Key of rdma_cm's datagrams unless a program chooses one."""
CONN_PARAM: Final = Struct("<II256s8B")
"""struct rdma_ucm_conn_param."""
UD_PARAM: Final = Struct("<II32s256sB7x")
"""struct rdma_ucm_ud_param."""
AH_ATTR: Final = Struct("<16sIBBBxHBBBBBx")
"""struct ib_uverbs_ah_attr."""


class ConnParam(NamedTuple):
    """struct rdma_ucm_conn_param, its private data cut to its length."""

    qp_num: int
    qkey: int
    private: bytes
    srq: int
    responder_resources: int
    initiator_depth: int
    flow_control: int
    retry_count: int
    rnr_retry_count: int
    valid: int
    ece: tuple[int, int] = (0, 0)
    """Vendor's id and options of enhanced connection establishment, which are elsewhere in the commands."""

    @classmethod
    def unpack(cls, data: bytes | memoryview, offset: int) -> ConnParam:
        """Raises struct.error when `data` is too short."""
        qpn, qkey, private, length, *rest = CONN_PARAM.unpack_from(data, offset)
        return cls(qpn, qkey, private[:length], *rest)


def conn_param(
    qp_num: int = 0,
    private: bytes = b"",
    srq: int = 0,
    responder_resources: int = 0,
    initiator_depth: int = 0,
    flow_control: int = 0,
    retry_count: int = 0,
    rnr_retry_count: int = 0,
) -> bytes:
    """struct rdma_ucm_conn_param of an event."""
    return CONN_PARAM.pack(
        qp_num,
        0,
        private,
        len(private),
        srq,
        responder_resources,
        initiator_depth,
        flow_control,
        retry_count,
        rnr_retry_count,
        0,
    )


def ah_attr(vector: Destination) -> bytes:
    """struct ib_uverbs_ah_attr."""
    return AH_ATTR.pack(
        vector.dgid,
        vector.flow_label,
        vector.sgid_index,
        vector.hop_limit,
        vector.traffic_class,
        0,
        0,
        0,
        0,
        1,
        vector.port_num,
    )


def ud_param(qp_num: int, qkey: int, vector: Destination | None, private: bytes = b"") -> bytes:
    """struct rdma_ucm_ud_param of an event."""
    attributes = ah_attr(vector) if vector is not None else bytes(AH_ATTR.size)
    return UD_PARAM.pack(qp_num, qkey, attributes, private, len(private))
