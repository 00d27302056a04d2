"""Scatter and gather: a message's bytes in the elements that a work request names.

A *segment* is (length, memory, address): one element after its key was checked. Resolving costs a key lookup each, so
callers keep the segments of a message for the length of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

from softroce_ext.transport.interfaces import Memory, ProtectionDomain, Sge
from softroce_ext.wire.frame import Buffer

Segment = tuple[int, Memory, int]


def resolve(pd: ProtectionDomain, sges: Sequence[Sge], access: int) -> list[Segment]:
    """Check every non-empty element's key for `access`. Raises ProtectionError."""
    return [(sge.length, *pd.local(sge.lkey, sge.address, sge.length, access)) for sge in sges if sge.length]


def gather(pd: ProtectionDomain, sges: Sequence[Sge], offset: int, length: int) -> Buffer:
    """Bytes offset..offset+length of the message that the elements make up; valid until the memory's next read.

    Raises ProtectionError for a key, MemoryFault for the memory, ValueError when the elements are shorter than that.
    """
    if length == 0:
        return b""
    if len(sges) == 1:
        sge = sges[0]
        if offset + length > sge.length:
            raise ValueError("scatter/gather elements are shorter than the message")
        memory, address = pd.local(sge.lkey, sge.address + offset, length, 0)
        return memory.read(address, length)
    parts = []
    for sge in sges:
        if offset >= sge.length:
            offset -= sge.length
            continue
        here = min(length, sge.length - offset)
        memory, address = pd.local(sge.lkey, sge.address + offset, here, 0)
        parts.append(bytes(memory.read(address, here)))
        offset = 0
        length -= here
        if length == 0:
            return b"".join(parts)
    raise ValueError("scatter/gather elements are shorter than the message")


def scatter(segments: Sequence[Segment], offset: int, data: memoryview) -> None:
    """HOT. Write `data` at `offset` of the message. The caller has checked that it fits. Raises MemoryFault."""
    if len(segments) == 1:
        _, memory, address = segments[0]
        memory.write(address + offset, data)
        return
    for length, memory, address in segments:
        if offset >= length:
            offset -= length
            continue
        here = length - offset
        if len(data) <= here:
            memory.write(address + offset, data)
            return
        memory.write(address + offset, data[:here])
        data = data[here:]
        offset = 0
