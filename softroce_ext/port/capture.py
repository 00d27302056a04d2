"""A pcap file of the NIC's own frames, with nanosecond times (the classic format, magic 0xa1b23c4d)."""

from __future__ import annotations

import contextlib
import os
import struct
import time
from collections.abc import Iterable
from typing import Final

_FILE = struct.Struct("<IHHiIII")
_RECORD = struct.Struct("<IIII")
_MAGIC_NANOSECONDS: Final = 0xA1B23C4D
_LINKTYPE_ETHERNET: Final = 1
_BUFFER: Final = 1 << 20


class Capture:
    """An open pcap file. `snaplen` bytes of each frame are kept."""

    def __init__(self, path: str, snaplen: int = 65535) -> None:
        """Raises OSError when the file cannot be written."""
        self.path = path
        self.frames = 0
        self._snaplen = snaplen
        self._file = open(path, "wb", buffering=_BUFFER)  # noqa: SIM115
        self._file.write(_FILE.pack(_MAGIC_NANOSECONDS, 2, 4, 0, 0, snaplen, _LINKTYPE_ETHERNET))
        self._file.flush()
        self._dirty = False

    def write(self, frames: Iterable[memoryview]) -> None:
        """Append frames, all with the present time. A full disk ends the capture, not the NIC."""
        seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
        snaplen = self._snaplen
        try:
            for frame in frames:
                kept = frame[:snaplen]
                self._file.write(_RECORD.pack(seconds, nanoseconds, len(kept), len(frame)))
                self._file.write(kept)
                self.frames += 1
            self._dirty = True
        except OSError:
            self._snaplen = 0
            with contextlib.suppress(OSError):  # the file has been removed
                os.truncate(self.path, _FILE.size)

    def flush(self) -> None:
        """Write everything to the file (called when the NIC is idle)."""
        if self._dirty:
            self._dirty = False
            try:
                self._file.flush()
            except OSError:
                self._snaplen = 0

    def close(self) -> None:
        """Flush and close."""
        with contextlib.suppress(OSError):
            self._file.close()
