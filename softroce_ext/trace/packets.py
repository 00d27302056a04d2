"""A packet's headers in words, for traces: names of opcodes, bits and AETH syndromes."""

from __future__ import annotations

from typing import Any, Final

from softroce_ext.wire.frame import Buffer
from softroce_ext.wire.headers import (
    ACK_REQ,
    AETH_ACK,
    AETH_KIND,
    AETH_RNR_NAK,
    BTH,
    MIGROS_CAPABLE,
    MIGROS_RECEIVER,
    MIGROS_RESUMED,
    PSN_MASK,
    RNR_TIMER,
    SOLICITED,
)
from softroce_ext.wire.opcodes import AETH, ATOMIC_ETH, DETH, IETH, IMM_DT, RETH, TABLE, name_of

NAK_NAMES: Final = {
    0x60: "NAK_PSN_SEQUENCE",
    0x61: "NAK_INVALID_REQUEST",
    0x62: "NAK_REMOTE_ACCESS",
    0x63: "NAK_REMOTE_OPERATIONAL",
    0x64: "NAK_INVALID_RD_REQUEST",
    0x65: "NAK_STOPPED",
}
_BITS: Final = (
    (ACK_REQ, "ackreq"),
    (MIGROS_CAPABLE, "capable"),
    (MIGROS_RESUMED, "resumed"),
    (MIGROS_RECEIVER, "receiver"),
)


def code_name(syndrome: int) -> str:
    """The name of an AETH syndrome: ACK, RNR_NAK, NAK_…"""
    kind = syndrome & AETH_KIND
    if kind == AETH_ACK:
        return "ACK"
    if kind == AETH_RNR_NAK:
        return "RNR_NAK"
    return NAK_NAMES.get(syndrome, f"NAK_{syndrome:#04x}")


def describe(headers: Buffer) -> dict[str, Any]:
    """The fields of a line that are in a packet's BTH and extended headers."""
    first, second, third = BTH.unpack_from(headers)
    code = first >> 24
    fields: dict[str, Any] = {"opcode": name_of(code), "psn": third & PSN_MASK, "remote_qpn": second & 0xFFFFFF}
    if first & SOLICITED:
        fields["solicited"] = True
    fields.update((name, True) for bit, name in _BITS if third >> 24 & bit)
    at = BTH.size
    for header in TABLE[code].headers if code in TABLE else ():
        data = bytes(headers[at : at + header.length])
        if header is AETH:
            fields.update(syndrome=data[0], code=code_name(data[0]), msn=int.from_bytes(data[1:]))
            if data[0] & AETH_KIND == AETH_RNR_NAK:
                fields["rnr_ms"] = RNR_TIMER[data[0] & 0x1F]
        elif header is RETH:
            fields.update(address=int.from_bytes(data[:8]), rkey=int.from_bytes(data[8:12]))
            fields["dma_length"] = int.from_bytes(data[12:])
        elif header is ATOMIC_ETH:
            fields.update(address=int.from_bytes(data[:8]), rkey=int.from_bytes(data[8:12]))
        elif header is DETH:
            fields.update(qkey=int.from_bytes(data[:4]), source_qpn=int.from_bytes(data[5:]))
        elif header is IMM_DT:
            fields["imm"] = data.hex()
        elif header is IETH:
            fields["invalidates"] = int.from_bytes(data)
        at += header.length
    return fields
