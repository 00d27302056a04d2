"""Batches of frames for sendmmsg(2) and recvmmsg(2): buffers and kernel structures that are made once."""

from __future__ import annotations

import ctypes
import struct
from typing import Final

BATCH: Final = 64
"""Frames of a batch."""
SLOT: Final = 9216
"""Bytes of a slot: the longest frame of a 9000-byte MTU, and some more."""

_MMSGHDR = struct.Struct("=QIxxxxQQQQixxxxIxxxx")
"""struct mmsghdr on 64-bit: name, namelen, iov, iovlen, control, controllen, flags, length."""
_LENGTH_WORD: Final = 14
"""The place of msg_len in struct mmsghdr, in 32-bit words."""
_WORDS: Final = _MMSGHDR.size // 4
_MSG_DONTWAIT: Final = 0x40

_libc = ctypes.CDLL(None, use_errno=True)
_sendmmsg, _recvmmsg = _libc.sendmmsg, _libc.recvmmsg
_sendmmsg.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int]
_recvmmsg.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int, ctypes.c_void_p]


class Batch:
    """BATCH slots and the structures by which the kernel reads or fills them in one call."""

    __slots__ = ("_headers", "_iovecs", "_slots", "_words", "address", "lengths", "views")

    def __init__(self) -> None:
        self._slots = bytearray(BATCH * SLOT)
        view = memoryview(self._slots)
        self.views = [view[i * SLOT : (i + 1) * SLOT] for i in range(BATCH)]
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._slots))
        self._iovecs = bytearray(16 * BATCH)
        self._headers = bytearray(_MMSGHDR.size * BATCH)
        iovecs_at = ctypes.addressof(ctypes.c_char.from_buffer(self._iovecs))
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._headers))
        for i in range(BATCH):
            struct.pack_into("=QQ", self._iovecs, 16 * i, base + i * SLOT, SLOT)
            _MMSGHDR.pack_into(self._headers, _MMSGHDR.size * i, 0, 0, iovecs_at + 16 * i, 1, 0, 0, 0, 0)
        self.lengths = memoryview(self._iovecs).cast("Q")
        """Bytes to send of slot i: [2 * i + 1]."""
        self._words = memoryview(self._headers).cast("I")

    def frames(self, count: int) -> list[memoryview]:
        """The first `count` frames that were put here to be sent."""
        lengths = self.lengths
        return [self.views[i][: lengths[2 * i + 1]] for i in range(count)]

    def receive(self, fd: int) -> list[memoryview]:
        """HOT. Fill the slots from a socket; returns the frames, valid until the next call."""
        count = _recvmmsg(fd, self.address, BATCH, _MSG_DONTWAIT, None)
        if count <= 0:
            return []
        words, views = self._words, self.views
        return [views[i][: words[i * _WORDS + _LENGTH_WORD]] for i in range(count)]

    def send(self, fd: int, first: int, end: int) -> int:
        """HOT. Send slots `first` up to `end` to a socket; returns how many it took (0 or less: see errno)."""
        taken: int = _sendmmsg(fd, self.address + first * _MMSGHDR.size, end - first, _MSG_DONTWAIT)
        return taken
