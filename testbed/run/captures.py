"""Captures of a run: around each migration on every NIC that is not captured anyway, with counts at the end.

A topology's `capture: true` (or a host's `nic: {capture: true}`) gives `pcaps/<host>.pcap` with whole frames of the
whole run. Otherwise each migration leaves `pcaps/<host>-migration<k>.pcap`, k from 1, with the headers of the frames.
"""

from __future__ import annotations

import contextlib
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from testbed.base.errors import TestbedError
from testbed.record.folder import RunFolder
from testbed.record.summary import Capture

if TYPE_CHECKING:
    from testbed.lab.session import Session

SNAPLEN: Final = 128
"""Bytes kept of each frame around a migration: all headers and the start of the payload."""
_FILE_HEADER: Final = 24
_RECORD: Final = struct.Struct("<8xI4x")


@contextlib.contextmanager
def during_migration(session: Session, index: int) -> Iterator[None]:
    """Capture on every NIC while the migration with this index lasts. A capture that fails is noted, and no error."""
    started = []
    for name, host in session.topology.hosts.items():
        if host.nic.capture:
            continue
        path = session.folder.pcap(f"{name}-migration{index + 1}")
        if _capture(session, name, file=str(path), snaplen=SNAPLEN):
            started.append(name)
    try:
        yield
    finally:
        for name in started:
            _capture(session, name, file=None)


def _capture(session: Session, host: str, **arguments: object) -> bool:
    try:
        session.hosts[host].call("nic", command="capture", timeout=10, **arguments)
    except TestbedError as error:
        session.folder.event("note", text=f"cannot capture at {host}: {error.message}")
        return False
    return True


def found(folder: RunFolder, host: str) -> list[Capture]:
    """List the captures of `host` in a run's folder."""
    paths = [folder.pcap(host), *sorted(folder.path.glob(f"pcaps/{host}-migration*.pcap"))]
    return [
        Capture(path=folder.relative(path), bytes=path.stat().st_size, frames=count_frames(path))
        for path in paths
        if path.exists()
    ]


def count_frames(path: Path) -> int:
    """Count the frames of a classic little-endian pcap, without one that is truncated at the end."""
    size = path.stat().st_size
    if size <= _FILE_HEADER:
        return 0
    count, at = 0, _FILE_HEADER
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        while at + _RECORD.size <= size:
            at += _RECORD.size + _RECORD.unpack_from(data, at)[0]
            count += at <= size
    return count
