"""Communication management datagrams: a table of their fields, and bytes ⇄ `Message` (IBA volume 1, 12.6 and 13.4).

A field is a name, the position of its first bit after the MAD header, and its number of bits. Fields are unsigned
integers (GIDs and addresses, too); bits without a name are zero.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, NamedTuple

MAD_BYTES: Final = 256
HEADER = struct.Struct(">BBBBHHQHHI")
"""base version, class, class version, method, status, class specific, transaction id, attribute, reserved, modifier."""
DATA_BYTES: Final = MAD_BYTES - HEADER.size
BASE_VERSION, CM_CLASS, CM_CLASS_VERSION, SEND = 1, 7, 2, 3


class Kind(IntEnum):
    """Attribute ids of the messages (table 100)."""

    REQ = 0x10
    MRA = 0x11
    REJ = 0x12
    REP = 0x13
    RTU = 0x14
    DREQ = 0x15
    DREP = 0x16
    SIDR_REQ = 0x17
    SIDR_REP = 0x18


class Reason(IntEnum):
    """Reject reasons that are sent or evaluated here (table 108)."""

    NO_RESOURCES = 3
    TIMEOUT = 4
    INVALID_COMM_ID = 6
    INVALID_SERVICE_ID = 8
    STALE_CONN = 10
    CONSUMER_DEFINED = 28
    VENDOR_OPTION_NOT_SUPPORTED = 35


class Layout(NamedTuple):
    """Fields as name → (first bit, bits), and the place of the private data (byte, bytes)."""

    fields: dict[str, tuple[int, int]]
    private: tuple[int, int]


_IDS = {"local_comm_id": (0, 32), "remote_comm_id": (32, 32)}

LAYOUTS: Final[dict[Kind, Layout]] = {
    Kind.REQ: Layout(
        {
            "local_comm_id": (0, 32),
            "service_id": (64, 64),
            "vendor_id": (40, 24),
            "local_ca_guid": (128, 64),
            "local_qkey": (224, 32),
            "local_qpn": (256, 24),
            "responder_resources": (280, 8),
            "local_eecn": (288, 24),
            "initiator_depth": (312, 8),
            "remote_eecn": (320, 24),
            "remote_cm_response_timeout": (344, 5),
            "transport_type": (349, 2),
            "end_to_end_flow_control": (351, 1),
            "starting_psn": (352, 24),
            "local_cm_response_timeout": (376, 5),
            "retry_count": (381, 3),
            "pkey": (384, 16),
            "path_mtu": (400, 4),
            "rdc_exists": (404, 1),
            "rnr_retry_count": (405, 3),
            "max_cm_retries": (408, 4),
            "srq": (412, 1),
            "extended_transport": (413, 3),
            "primary_local_lid": (416, 16),
            "primary_remote_lid": (432, 16),
            "primary_local_gid": (448, 128),
            "primary_remote_gid": (576, 128),
            "primary_flow_label": (704, 20),
            "primary_packet_rate": (730, 6),
            "primary_traffic_class": (736, 8),
            "primary_hop_limit": (744, 8),
            "primary_sl": (752, 4),
            "primary_subnet_local": (756, 1),
            "primary_ack_timeout": (760, 5),
        },
        (140, 92),
    ),
    Kind.MRA: Layout({**_IDS, "message_mraed": (64, 2), "service_timeout": (72, 5)}, (10, 222)),
    Kind.REJ: Layout(
        {**_IDS, "message_rejected": (64, 2), "info_length": (72, 7), "reason": (80, 16)},
        (84, 148),
    ),
    Kind.REP: Layout(
        {
            **_IDS,
            "local_qkey": (64, 32),
            "local_qpn": (96, 24),
            "vendor_id_high": (120, 8),
            "local_eecn": (128, 24),
            "vendor_id_middle": (152, 8),
            "starting_psn": (160, 24),
            "vendor_id_low": (184, 8),
            "responder_resources": (192, 8),
            "initiator_depth": (200, 8),
            "target_ack_delay": (208, 5),
            "failover_accepted": (213, 2),
            "end_to_end_flow_control": (215, 1),
            "rnr_retry_count": (216, 3),
            "srq": (219, 1),
            "local_ca_guid": (224, 64),
        },
        (36, 196),
    ),
    Kind.RTU: Layout(_IDS, (8, 224)),
    Kind.DREQ: Layout({**_IDS, "remote_qpn": (64, 24)}, (12, 220)),
    Kind.DREP: Layout(_IDS, (8, 224)),
    Kind.SIDR_REQ: Layout({"request_id": (0, 32), "pkey": (32, 16), "service_id": (64, 64)}, (16, 216)),
    Kind.SIDR_REP: Layout(
        {
            "request_id": (0, 32),
            "status": (32, 8),
            "info_length": (40, 8),
            "qpn": (64, 24),
            "service_id": (96, 64),
            "qkey": (160, 32),
        },
        (96, 136),
    ),
}


class MessageError(ValueError):
    """A MAD that is not a communication management message (the peer's fault)."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message: every field of its layout, and the private data at its full length."""

    kind: Kind
    transaction_id: int
    fields: dict[str, int]
    private: bytes = b""
    modifier: int = 0
    """The MAD's attribute modifier: in a REQ or REP, the options of enhanced connection establishment (ECE)."""

    def __getitem__(self, name: str) -> int:
        return self.fields[name]

    def pack(self) -> bytes:
        """The 256 bytes. Raises ValueError for a field that does not fit, or too much private data."""
        layout = LAYOUTS[self.kind]
        at, room = layout.private
        if len(self.private) > room:
            raise ValueError(f"{self.kind.name} takes {room} bytes of private data, not {len(self.private)}")
        bits = 0
        for name, value in self.fields.items():
            first, width = layout.fields[name]
            if not 0 <= value < 1 << width:
                raise ValueError(f"{self.kind.name}.{name} is {value:#x}, more than {width} bits")
            bits |= value << (8 * DATA_BYTES - first - width)
        data = bytearray(bits.to_bytes(DATA_BYTES, "big"))
        data[at : at + len(self.private)] = self.private
        kind = (BASE_VERSION, CM_CLASS, CM_CLASS_VERSION, SEND)
        return HEADER.pack(*kind, 0, 0, self.transaction_id, self.kind, 0, self.modifier) + bytes(data)


def unpack(mad: bytes | memoryview) -> Message:
    """Read one MAD. Raises MessageError when it is of another length, class, version, method or attribute."""
    if len(mad) != MAD_BYTES:
        raise MessageError(f"{len(mad)} bytes")
    base, management_class, version, method, _, _, transaction, attribute, _, modifier = HEADER.unpack_from(mad)
    if (base, management_class, version, method) != (BASE_VERSION, CM_CLASS, CM_CLASS_VERSION, SEND):
        raise MessageError(f"class {management_class:#x} version {version} method {method}")
    try:
        kind = Kind(attribute)
    except ValueError:
        raise MessageError(f"attribute {attribute:#x}") from None
    layout = LAYOUTS[kind]
    data = bytes(mad[HEADER.size :])
    bits = int.from_bytes(data, "big")
    fields = {
        name: bits >> (8 * DATA_BYTES - first - width) & ((1 << width) - 1)
        for name, (first, width) in layout.fields.items()
    }
    at, room = layout.private
    return Message(kind, transaction, fields, data[at : at + room], modifier)


def service_id(port_space: int, port: int) -> int:
    """The service id of an IP port (IBA annex A11)."""
    return port_space << 16 | port


_ADDRESSES = struct.Struct(">BBH16s16s")


class IpHeader(NamedTuple):
    """The addresses at the start of the private data of a REQ or SIDR_REQ (annex A11.4.2), 36 bytes."""

    source_port: int
    source: bytes
    destination: bytes

    def pack(self) -> bytes:
        """36 bytes; addresses of 4 bytes are at the end of their fields."""
        version = 4 if len(self.source) == 4 else 6
        ends = self.source.rjust(16, b"\0"), self.destination.rjust(16, b"\0")
        return _ADDRESSES.pack(0, version << 4, self.source_port, *ends)

    @classmethod
    def unpack(cls, private: bytes) -> IpHeader:
        """Raises MessageError for an unknown version."""
        major, version, port, source, destination = _ADDRESSES.unpack_from(private)
        if major != 0 or version >> 4 not in (4, 6):
            raise MessageError(f"IP header version {major:#x}, address version {version >> 4}")
        if version >> 4 == 4:
            source, destination = source[12:], destination[12:]
        return cls(port, source, destination)


IP_HEADER_BYTES: Final = _ADDRESSES.size
