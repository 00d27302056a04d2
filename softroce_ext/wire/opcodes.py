"""The opcode table: for every transport opcode its name, its kind of packet and the headers that follow the BTH.

Source: InfiniBand Architecture volume 1, table 38 (opcodes) and 9.3 to 9.6 (headers); RESUME is from the MigrOS proof
of concept. The table is the single source of the header lengths that `frame.parse` checks, of the flags that requester,
responder and completer branch on, and of the opcodes that packets are built with.
"""

from __future__ import annotations

from enum import IntFlag
from typing import NamedTuple


class OpFlag(IntFlag):
    """The kind of a packet. A message runs from START to END; an ONLY packet has both flags."""

    REQUEST = 0x0001
    RESPONSE = 0x0002
    START = 0x0004
    MIDDLE = 0x0008
    END = 0x0010
    SEND = 0x0020
    WRITE = 0x0040
    READ = 0x0080
    ATOMIC = 0x0100
    ACK = 0x0200
    RESUME = 0x0400
    PAYLOAD = 0x0800
    """Data follows the headers (a packet without this flag must not carry any)."""
    IMM = 0x1000
    INVALIDATE = 0x2000


class Header(NamedTuple):
    """An extended transport header, with its name in the specification and its length in bytes."""

    name: str
    length: int


RETH = Header("RETH", 16)
ATOMIC_ETH = Header("AtomicETH", 28)
AETH = Header("AETH", 4)
ATOMIC_ACK_ETH = Header("AtomicAckETH", 8)
IMM_DT = Header("ImmDt", 4)
IETH = Header("IETH", 4)
DETH = Header("DETH", 8)


class Opcode(NamedTuple):
    """One row of the table. `code` includes the transport in its top three bits (0 is RC, 1 is UC, 3 is UD)."""

    code: int
    name: str
    flags: OpFlag
    headers: tuple[Header, ...]


_F = OpFlag
_REQ = _F.REQUEST
_ONLY = _F.START | _F.END

RC, UC, UD = 0x00, 0x20, 0x60
TRANSPORT_MASK = 0xE0
"""The bits of an opcode that say which of them it belongs to."""

# Requests that RC and UC have in common, by their low five bits.
_SEND_AND_WRITE: tuple[tuple[int, str, OpFlag, tuple[Header, ...]], ...] = (
    (0x00, "SEND_FIRST", _F.SEND | _F.START | _F.PAYLOAD, ()),
    (0x01, "SEND_MIDDLE", _F.SEND | _F.MIDDLE | _F.PAYLOAD, ()),
    (0x02, "SEND_LAST", _F.SEND | _F.END | _F.PAYLOAD, ()),
    (0x03, "SEND_LAST_WITH_IMMEDIATE", _F.SEND | _F.END | _F.PAYLOAD | _F.IMM, (IMM_DT,)),
    (0x04, "SEND_ONLY", _F.SEND | _ONLY | _F.PAYLOAD, ()),
    (0x05, "SEND_ONLY_WITH_IMMEDIATE", _F.SEND | _ONLY | _F.PAYLOAD | _F.IMM, (IMM_DT,)),
    (0x06, "RDMA_WRITE_FIRST", _F.WRITE | _F.START | _F.PAYLOAD, (RETH,)),
    (0x07, "RDMA_WRITE_MIDDLE", _F.WRITE | _F.MIDDLE | _F.PAYLOAD, ()),
    (0x08, "RDMA_WRITE_LAST", _F.WRITE | _F.END | _F.PAYLOAD, ()),
    (0x09, "RDMA_WRITE_LAST_WITH_IMMEDIATE", _F.WRITE | _F.END | _F.PAYLOAD | _F.IMM, (IMM_DT,)),
    (0x0A, "RDMA_WRITE_ONLY", _F.WRITE | _ONLY | _F.PAYLOAD, (RETH,)),
    (0x0B, "RDMA_WRITE_ONLY_WITH_IMMEDIATE", _F.WRITE | _ONLY | _F.PAYLOAD | _F.IMM, (RETH, IMM_DT)),
)

_RC_SPECIFIC: tuple[tuple[int, str, OpFlag, tuple[Header, ...]], ...] = (
    (0x0C, "RDMA_READ_REQUEST", _REQ | _F.READ | _ONLY, (RETH,)),
    (0x0D, "RDMA_READ_RESPONSE_FIRST", _F.RESPONSE | _F.READ | _F.START | _F.PAYLOAD, (AETH,)),
    (0x0E, "RDMA_READ_RESPONSE_MIDDLE", _F.RESPONSE | _F.READ | _F.MIDDLE | _F.PAYLOAD, ()),
    (0x0F, "RDMA_READ_RESPONSE_LAST", _F.RESPONSE | _F.READ | _F.END | _F.PAYLOAD, (AETH,)),
    (0x10, "RDMA_READ_RESPONSE_ONLY", _F.RESPONSE | _F.READ | _ONLY | _F.PAYLOAD, (AETH,)),
    (0x11, "ACKNOWLEDGE", _F.RESPONSE | _F.ACK | _ONLY, (AETH,)),
    (0x12, "ATOMIC_ACKNOWLEDGE", _F.RESPONSE | _F.ATOMIC | _ONLY, (AETH, ATOMIC_ACK_ETH)),
    (0x13, "COMPARE_SWAP", _REQ | _F.ATOMIC | _ONLY, (ATOMIC_ETH,)),
    (0x14, "FETCH_ADD", _REQ | _F.ATOMIC | _ONLY, (ATOMIC_ETH,)),
    (0x16, "SEND_LAST_WITH_INVALIDATE", _REQ | _F.SEND | _F.END | _F.PAYLOAD | _F.INVALIDATE, (IETH,)),
    (0x17, "SEND_ONLY_WITH_INVALIDATE", _REQ | _F.SEND | _ONLY | _F.PAYLOAD | _F.INVALIDATE, (IETH,)),
    # MigrOS. The proof of concept also defines PAUSE (0x18), which is never sent.
    (0x19, "RESUME", _REQ | _F.RESUME | _ONLY, (AETH,)),
)

_UD_SPECIFIC: tuple[tuple[int, str, OpFlag, tuple[Header, ...]], ...] = (
    (0x04, "SEND_ONLY", _REQ | _F.SEND | _ONLY | _F.PAYLOAD, (DETH,)),
    (0x05, "SEND_ONLY_WITH_IMMEDIATE", _REQ | _F.SEND | _ONLY | _F.PAYLOAD | _F.IMM, (DETH, IMM_DT)),
)

TABLE: dict[int, Opcode] = {
    transport | low: Opcode(transport | low, f"{prefix}_{name}", flags | more, headers)
    for transport, prefix, rows, more in (
        (RC, "RC", _SEND_AND_WRITE, _REQ),
        (UC, "UC", _SEND_AND_WRITE, _REQ),
        (RC, "RC", _RC_SPECIFIC, _F(0)),
        (UD, "UD", _UD_SPECIFIC, _F(0)),
    )
    for low, name, flags, headers in rows
}
"""Every opcode that this NIC supports, by its code."""

UNKNOWN = 0xFF

HEADERS_LENGTH = bytes(
    sum(header.length for header in TABLE[code].headers) if code in TABLE else UNKNOWN for code in range(256)
)
"""Length in bytes of the headers after the BTH, indexed by opcode; UNKNOWN for an opcode that is not in the table."""

FLAGS: tuple[int, ...] = tuple(int(TABLE[code].flags) if code in TABLE else 0 for code in range(256))
"""OpFlag bits as plain integers, indexed by opcode: hot code tests them without the cost of the enum."""

# The RC opcodes by name, for the code that builds packets.
_CODES = {row.name: row.code for row in TABLE.values()}
SEND_FIRST = _CODES["RC_SEND_FIRST"]
SEND_MIDDLE = _CODES["RC_SEND_MIDDLE"]
SEND_LAST = _CODES["RC_SEND_LAST"]
SEND_LAST_IMM = _CODES["RC_SEND_LAST_WITH_IMMEDIATE"]
SEND_LAST_INV = _CODES["RC_SEND_LAST_WITH_INVALIDATE"]
SEND_ONLY = _CODES["RC_SEND_ONLY"]
SEND_ONLY_IMM = _CODES["RC_SEND_ONLY_WITH_IMMEDIATE"]
SEND_ONLY_INV = _CODES["RC_SEND_ONLY_WITH_INVALIDATE"]
WRITE_FIRST = _CODES["RC_RDMA_WRITE_FIRST"]
WRITE_MIDDLE = _CODES["RC_RDMA_WRITE_MIDDLE"]
WRITE_LAST = _CODES["RC_RDMA_WRITE_LAST"]
WRITE_LAST_IMM = _CODES["RC_RDMA_WRITE_LAST_WITH_IMMEDIATE"]
WRITE_ONLY = _CODES["RC_RDMA_WRITE_ONLY"]
WRITE_ONLY_IMM = _CODES["RC_RDMA_WRITE_ONLY_WITH_IMMEDIATE"]
READ_REQUEST = _CODES["RC_RDMA_READ_REQUEST"]
READ_RESPONSE_FIRST = _CODES["RC_RDMA_READ_RESPONSE_FIRST"]
READ_RESPONSE_MIDDLE = _CODES["RC_RDMA_READ_RESPONSE_MIDDLE"]
READ_RESPONSE_LAST = _CODES["RC_RDMA_READ_RESPONSE_LAST"]
READ_RESPONSE_ONLY = _CODES["RC_RDMA_READ_RESPONSE_ONLY"]
ACKNOWLEDGE = _CODES["RC_ACKNOWLEDGE"]
ATOMIC_ACKNOWLEDGE = _CODES["RC_ATOMIC_ACKNOWLEDGE"]
COMPARE_SWAP = _CODES["RC_COMPARE_SWAP"]
FETCH_ADD = _CODES["RC_FETCH_ADD"]
RESUME = _CODES["RC_RESUME"]


def name_of(code: int) -> str:
    """The opcode's name in the specification, or its number when it is not in the table."""
    row = TABLE.get(code)
    return row.name if row else f"opcode {code:#04x}"
