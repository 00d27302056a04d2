"""The fields of a REQ and a REP, and the connection parameters that they report to the peer's program."""

from __future__ import annotations

import errno
from typing import Final

from softroce_ext.cm import messages as m
from softroce_ext.cm.addresses import HOP_LIMIT
from softroce_ext.cm.ids import CmId
from softroce_ext.cm.params import ConnParam, conn_param
from softroce_ext.device import limits
from softroce_ext.device.addressing import gid_of
from softroce_ext.device.errors import VerbsError
from softroce_ext.transport.verbs import QpType

LID_PERMISSIVE: Final = 0xFFFF
"""Ethernet has no LIDs; Linux writes this."""
RESPONSE_TIMEOUT_CODE: Final = 20
MAX_RETRIES: Final = 15


def request(cm_id: CmId, param: ConnParam, service: int, guid: bytes) -> dict[str, int]:
    """The fields of a REQ for service id `service`, as Linux fills them on Ethernet; guid: the device's."""
    assert cm_id.source is not None and cm_id.destination is not None
    return {
        "service_id": service,
        "vendor_id": param.ece[0] & 0xFFFFFF,
        "local_ca_guid": int.from_bytes(guid, "big"),
        "local_qpn": param.qp_num & 0xFFFFFF,
        "responder_resources": param.responder_resources,
        "initiator_depth": param.initiator_depth,
        "remote_cm_response_timeout": RESPONSE_TIMEOUT_CODE,
        "transport_type": int(cm_id.qp_type == QpType.UC),
        "end_to_end_flow_control": param.flow_control & 1,
        "starting_psn": cm_id.psn,
        "local_cm_response_timeout": RESPONSE_TIMEOUT_CODE,
        "retry_count": cm_id.retry_count,
        "pkey": limits.DEFAULT_PKEY,
        "path_mtu": cm_id.path_mtu,
        "rnr_retry_count": cm_id.rnr_retry_count,
        "max_cm_retries": MAX_RETRIES,
        "srq": int(param.srq != 0),
        "primary_local_lid": LID_PERMISSIVE,
        "primary_remote_lid": LID_PERMISSIVE,
        "primary_local_gid": int.from_bytes(gid_of(cm_id.source.ip), "big"),
        "primary_remote_gid": int.from_bytes(gid_of(cm_id.destination.ip), "big"),
        "primary_flow_label": cm_id.flow_label,
        "primary_traffic_class": cm_id.tos,
        "primary_hop_limit": HOP_LIMIT,
        "primary_ack_timeout": cm_id.ack_timeout,
    }


def reply(cm_id: CmId, param: ConnParam, guid: bytes) -> dict[str, int]:
    """The fields of a REP."""
    vendor = param.ece[0]
    return {
        "local_qpn": param.qp_num & 0xFFFFFF,
        "vendor_id_high": vendor >> 16 & 0xFF,
        "vendor_id_middle": vendor >> 8 & 0xFF,
        "vendor_id_low": vendor & 0xFF,
        "starting_psn": cm_id.psn,
        "responder_resources": param.responder_resources,
        "initiator_depth": param.initiator_depth,
        "target_ack_delay": limits.LOCAL_CA_ACK_DELAY,
        "end_to_end_flow_control": param.flow_control & 1,
        "rnr_retry_count": min(param.rnr_retry_count, 7),
        "srq": int(param.srq != 0),
        "local_ca_guid": int.from_bytes(guid, "big"),
    }


def check_private(kind: m.Kind, private: bytes) -> None:
    """Raise VerbsError(EINVAL) for more private data than the message takes."""
    _, room = m.LAYOUTS[kind].private
    if len(private) > room:
        raise VerbsError(errno.EINVAL, f"{len(private)} bytes of private data, a {kind.name} takes {room}")


def ece(message: m.Message) -> tuple[int, int]:
    """Return the enhanced connection establishment of a REQ or REP: the vendor's id and its options."""
    if message.kind is m.Kind.REQ:
        return message["vendor_id"], message.modifier
    if message.kind is not m.Kind.REP:
        return 0, 0
    parts = (message[f"vendor_id_{part}"] for part in ("high", "middle", "low"))
    return int.from_bytes(bytes(parts), "big"), message.modifier


def peer_parameters(message: m.Message, private: bytes) -> bytes:
    """Return the parameters of a REQ or REP as they are here: the peer's initiator depth is our responder resources."""
    return conn_param(
        qp_num=message["local_qpn"],
        private=private,
        srq=message["srq"],
        responder_resources=message["initiator_depth"],
        initiator_depth=message["responder_resources"],
        flow_control=message["end_to_end_flow_control"],
        retry_count=message.fields.get("retry_count", 0),
        rnr_retry_count=message["rnr_retry_count"],
    )
