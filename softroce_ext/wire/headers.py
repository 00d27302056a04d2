"""Layouts of the transport headers (IBA 9.2 to 9.6) as precompiled Structs, and the values of their fields."""

from __future__ import annotations

from struct import Struct

PSN_MASK = 0xFFFFFF
PSN_HALF = 0x800000
"""`(a - b) & PSN_MASK < PSN_HALF` holds when PSN a is equal to b or after it (IBA 9.7.2, 24-bit circular)."""

MAX_MESSAGE = 1 << 30
"""Longest message in bytes. The IBA allows twice as many (9.7.7), but at an MTU of 256 they would take half of all
PSNs."""

MTU_BYTES = {1: 256, 2: 512, 3: 1024, 4: 2048, 5: 4096}
"""enum ib_mtu → bytes of payload."""

HEADER_ALLOWANCE = 80
"""Bytes of the interface's MTU that are kept for the longest RoCEv2 headers (rxe: RXE_MAX_HDR_LENGTH)."""

# BTH in three words: opcode, flags, P_Key | reserved/FECN/BECN, destination QPN | AckReq byte, PSN.
# Flags byte: solicited event 0x80, MigReq 0x40, pad count 0x30, transport version 0x0f.
BTH = Struct(">III")
BTH_RETH = Struct(">IIIQII")
BTH_RETH_IMM = Struct(">IIIQII4s")
BTH_IMM = Struct(">III4s")
BTH_IETH = Struct(">IIII")
BTH_ATOMIC_ETH = Struct(">IIIQIQQ")
BTH_AETH = Struct(">IIII")
BTH_AETH_ATOMIC = Struct(">IIIIQ")

BTH_DETH = Struct(">IIIII")
BTH_DETH_IMM = Struct(">IIIII4s")

DETH = Struct(">II")
"""Q_Key, source QPN (low 24 bits)."""
RETH = Struct(">QII")
"""Virtual address, rkey, DMA length."""
ATOMIC_ETH = Struct(">QIQQ")
"""Virtual address, rkey, swap or add data, compare data."""
WORD = Struct(">I")
"""AETH (syndrome << 24 | MSN) or IETH (rkey)."""
AETH_ATOMIC = Struct(">IQ")
"""AETH, original remote data."""

PKEY_DEFAULT = 0xFFFF
PKEY_MASK = 0x7FFF
"""The part of a P_Key that two ports must have in common: the top bit tells full from limited members (IBA 10.9.1.1).

A packet belongs to this NIC's partition if `first_word & PKEY_MASK == PKEY_PARTITION`.
"""
PKEY_PARTITION = PKEY_DEFAULT & PKEY_MASK
SOLICITED = 0x80 << 16
"""The solicited-event bit in the BTH's first word."""
PAD_SHIFT = 20
"""Position of the pad count in the BTH's first word, in bits."""

GSI_QPN = 1
"""QPN of the general services interface, which receives every port's management datagrams (IBA 3.9.5)."""
GSI_QKEY = 0x80010000
"""Well-known Q_Key of the general services interface (IBA 10.2.5)."""
QKEY_PRIVILEGED = 0x80000000
"""A work request's Q_Key with this bit set selects the queue pair's own Q_Key, so that programs cannot forge one
(IBA 10.2.5)."""
MULTICAST_QPN = 0xFFFFFF

ACK_REQ = 0x80
"""AckReq, in BTH byte 8. The byte's other seven bits are reserved; stock NICs send them as 0 and ignore them."""
MIGROS_CAPABLE = 0x40
"""Reserved bit of BTH byte 8: the sender supports MigrOS (our extension; covered by the ICRC)."""
MIGROS_RESUMED = 0x20
"""Reserved bit of BTH byte 8: this ACK answers a RESUME (our extension)."""
MIGROS_RECEIVER = 0x10
"""Reserved bit of BTH byte 8: this RESUME comes from a queue pair in RTR (our extension). Such a queue pair has sent
nothing and has no send PSN yet, so its RESUME carries the PSN that it expects instead."""

# AETH syndromes (IBA 9.7.5.1.2): the top three bits give the kind; the low five hold a credit count, an RNR timer or a
# NAK code.
AETH_KIND = 0xE0
AETH_ACK = 0x00
AETH_RNR_NAK = 0x20
AETH_NAK = 0x60
ACK_UNLIMITED = 0x1F
"""ACK with the credit code for unlimited credits."""
NAK_PSN_SEQUENCE = 0x60
NAK_INVALID_REQUEST = 0x61
NAK_REMOTE_ACCESS = 0x62
NAK_REMOTE_OPERATIONAL = 0x63
NAK_STOPPED = 0x65
"""MigrOS extension: the responder is being moved, and the requester has to wait for its RESUME."""

RNR_TIMER = (
    655.36, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.16, 0.24, 0.32, 0.48, 0.64, 0.96, 1.28, 1.92,
    2.56, 3.84, 5.12, 7.68, 10.24, 15.36, 20.48, 30.72, 40.96, 61.44, 81.92, 122.88, 163.84, 245.76, 327.68, 491.52,
)  # fmt: skip
"""Delay in milliseconds, indexed by RNR NAK timer code (IBA table 45)."""
