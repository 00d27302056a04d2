"""The NIC image: every object of one or more user contexts in one file, checked when it is read.

Layout: the line `MIGROS NIC IMAGE 1`, two little-endian u64 (length of the JSON, length of the rings compressed by
zlib), the JSON, the rings, and a CRC-32 of everything before it. The JSON is `Image`; rings refer to their bytes by
offset. It names no host, so any NIC whose numbers are free can take it.
"""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from softroce_ext.device.errors import ImageError
from softroce_ext.device.shared import RingImage

try:
    from isal.isal_zlib import compress
except ImportError:  # the standard library has the same, but slower
    from zlib import compress

MAGIC: Final = b"MIGROS NIC IMAGE 1\n"
VERSION: Final = 4
_LENGTHS = struct.Struct("<QQ")
_CRC = struct.Struct("<I")
MAX_IMAGE: Final = 1 << 31


class Record(BaseModel):
    """The base of every record of an image: strict, complete, unknown fields refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


_U32 = Field(ge=0, lt=1 << 32)
_U64 = Field(ge=0, lt=1 << 64)
_HANDLE = Field(ge=1, lt=65536)


class RingRecord(Record):
    """device.shared.RingImage; `at` is the offset of its bytes in the ring section."""

    offset: int = Field(ge=0, multiple_of=4096)
    size: int = Field(gt=0, multiple_of=4096)
    element: int = Field(ge=64)
    mask: int = Field(ge=0)
    producer: int = Field(ge=0)
    consumer: int = Field(ge=0)
    fetched: int = Field(ge=0)
    at: int = Field(ge=0)


class PdRecord(Record):
    handle: int = _HANDLE


class MrRecord(Record):
    handle: int = _HANDLE
    pd: int = _HANDLE
    key: int = _U32
    start: int = _U64
    length: int = _U64
    iova: int = _U64
    access: int = _U32


class MwRecord(Record):
    handle: int = _HANDLE
    pd: int = _HANDLE
    key: int = _U32
    kind: int = Field(ge=1, le=2)
    mr: int | None
    """Handle of the region that it is bound to."""
    iova: int = _U64
    end: int = _U64
    access: int = _U32
    qpn: int = _U32


class AhRecord(Record):
    handle: int = _HANDLE
    pd: int = _HANDLE
    number: int = _U32
    attributes: str
    path: dict[str, int | str]
    """wire.path.Path.to_plain."""


class ChannelRecord(Record):
    name: str = Field(pattern=r"^comp-[0-9]+$")


class CqRecord(Record):
    handle: int = _HANDLE
    user_handle: int = _U64
    ring: RingRecord
    channel: str | None
    notify: int = Field(ge=0, le=2)
    comp_events: int = Field(ge=0)
    async_events: int = Field(ge=0)


class SrqRecord(Record):
    handle: int = _HANDLE
    user_handle: int = _U64
    pd: int = _HANDLE
    ring: RingRecord
    max_sge: int = Field(ge=1, le=64)
    limit: int = Field(ge=0)
    number: int = _U32
    async_events: int = Field(ge=0)


class QpRecord(Record):
    handle: int = _HANDLE
    user_handle: int = _U64
    kind: int
    pd: int = _HANDLE
    send_cq: int = _HANDLE
    recv_cq: int = _HANDLE
    srq: int | None
    capabilities: tuple[int, int, int, int, int]
    destination: str
    alternate: str
    send_ring: RingRecord
    receive_ring: RingRecord | None
    async_events: int = Field(ge=0)
    groups: dict[str, list[int]]
    """Its multicast groups: GID in hexadecimal, and the LIDs with which it joined."""
    state: dict[str, Any]
    """transport.state.queue_pair.QueuePairState.to_plain."""


def qpn_of(record: QpRecord) -> Any:
    """The QPN in a queue pair's state, whatever else is there in its place; None when there is none."""
    attributes = record.state.get("attributes")
    return attributes.get("qpn") if isinstance(attributes, dict) else None


class ContextRecord(Record):
    id: str = Field(pattern=r"^[0-9]+-[0-9]+$")
    inner_pid: int = Field(ge=1)
    uid: int = Field(ge=0)
    gid: int = Field(ge=0)
    async_open: bool
    """The program has its asynchronous events' FIFO (it always has, after GET_CONTEXT)."""
    mailbox: str
    """The last answer, in hexadecimal: the program may have been frozen before it read it."""
    pds: list[PdRecord]
    mrs: list[MrRecord]
    mws: list[MwRecord]
    channels: list[ChannelRecord]
    cqs: list[CqRecord]
    srqs: list[SrqRecord]
    ahs: list[AhRecord]
    qps: list[QpRecord]


class Image(Record):
    """Everything; `checkpoint.ORDER` is the order in which the objects of a user context are restored."""

    version: int
    number_base: int = Field(ge=0, le=255)
    """The number base of the NIC that wrote the image; for people who read it."""
    contexts: list[ContextRecord]
    cm: list[dict[str, Any]]
    """Openings of rdma_cm: cm.records.FileRecord, which checks them."""


class RingSection:
    """The bytes of all rings, one after another."""

    def __init__(self, data: bytes = b"") -> None:
        self._parts: list[bytes] = [data] if data else []
        self._length = len(data)

    def add(self, image: RingImage) -> RingRecord:
        """Append a ring's bytes; returns its record."""
        record = RingRecord(at=self._length, **{k: v for k, v in image._asdict().items() if k != "data"})
        self._parts.append(image.data)
        self._length += len(image.data)
        return record

    def take(self, record: RingRecord) -> RingImage:
        """Return the ring of a record. Raises ImageError when its numbers contradict each other."""
        data = self.bytes()[record.at : record.at + record.size]
        needed = 384 + (record.mask + 1) * record.element
        if record.element & (record.element - 1) or record.mask & (record.mask + 1):
            raise ImageError(
                f"ring at {record.offset:#x}: {record.element} bytes x {record.mask + 1} are no powers of two"
            )
        if len(data) != record.size or needed > record.size:
            raise ImageError(f"ring at {record.offset:#x}: {len(data)} bytes in the image, {needed} needed")
        return RingImage(
            record.offset,
            record.size,
            record.element,
            record.mask,
            record.producer,
            record.consumer,
            record.fetched,
            data,
        )

    def bytes(self) -> bytes:
        """Return all of it."""
        if len(self._parts) > 1:
            self._parts = [b"".join(self._parts)]
        return self._parts[0] if self._parts else b""


def write(path: str | os.PathLike[str], image: Image, rings: RingSection) -> int:
    """Write an image file, complete or not at all; returns its length in bytes. Raises OSError."""
    text = image.model_dump_json().encode()
    packed = compress(rings.bytes(), 1)
    body = MAGIC + _LENGTHS.pack(len(text), len(packed)) + text + packed
    data = body + _CRC.pack(zlib.crc32(body))
    scratch = Path(f"{os.fspath(path)}.part")
    try:
        scratch.write_bytes(data)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
    return len(data)


class _Versioned(BaseModel):
    """What images of all versions have."""

    version: int


def _check_version(path: str | os.PathLike[str], image: Image | bytes) -> None:
    """Raise ImageError when an image, or its text, is of another version. A text without a version passes."""
    try:
        version = image.version if isinstance(image, Image) else _Versioned.model_validate_json(image).version
    except ValidationError:
        return
    if version != VERSION:
        hint = "use the same version of the testbed at both ends"
        raise ImageError(f"{path}: a NIC image of version {version}, this NIC reads version {VERSION}: {hint}")


def read(path: str | os.PathLike[str]) -> tuple[Image, RingSection]:
    """Read and check an image file. Raises ImageError naming what is wrong and where, OSError."""
    if os.path.getsize(path) > MAX_IMAGE:
        raise ImageError(f"{path}: longer than {MAX_IMAGE} bytes")
    data = Path(path).read_bytes()
    head = len(MAGIC) + _LENGTHS.size
    if not data.startswith(MAGIC):
        raise ImageError(f"{path}: not a NIC image of version {VERSION} (it begins with {data[:20]!r})")
    if len(data) < head + _CRC.size:
        raise ImageError(f"{path}: cut off after {len(data)} bytes")
    text_length, ring_length = _LENGTHS.unpack_from(data, len(MAGIC))
    if len(data) != head + text_length + ring_length + _CRC.size:
        raise ImageError(f"{path}: {len(data)} bytes, but its header announces {head + text_length + ring_length + 4}")
    if zlib.crc32(data[: -_CRC.size]) != _CRC.unpack_from(data, len(data) - _CRC.size)[0]:
        raise ImageError(f"{path}: the checksum does not match, the file is damaged")
    text = data[head : head + text_length]
    try:
        image = Image.model_validate_json(text)
    except ValidationError as error:
        _check_version(path, text)  # an image of another version has other fields, which are not its fault
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the image"
        raise ImageError(f"{path}: {place}: {first['msg']} ({error.error_count()} faults)") from None
    _check_version(path, image)
    try:
        unpacker = zlib.decompressobj()
        # No more than the records announce: some bytes can unpack to any number.
        rings = unpacker.decompress(data[head + text_length : -_CRC.size], min(_ring_bytes(image), MAX_IMAGE) + 1)
    except zlib.error as error:
        raise ImageError(f"{path}: the rings do not unpack: {error}") from None
    if len(rings) != _ring_bytes(image) or not unpacker.eof:
        raise ImageError(f"{path}: the rings do not have the {_ring_bytes(image)} bytes that the records announce")
    return image, RingSection(rings)


def _ring_bytes(image: Image) -> int:
    """Return the bytes of all rings, by their records."""
    records: list[RingRecord | None] = []
    for context in image.contexts:
        records += [cq.ring for cq in context.cqs] + [srq.ring for srq in context.srqs]
        records += [ring for qp in context.qps for ring in (qp.send_ring, qp.receive_ring)]
    return sum(ring.size for ring in records if ring is not None)
