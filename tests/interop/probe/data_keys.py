"""The key of a memory window of type 2, which a program keeps itself: pyverbs has no way to."""

from __future__ import annotations

import ctypes

from pyverbs.mr import MW

KEY_AT, SMALLEST = 16, 1 << 16
"""Where struct ibv_mw has its key, handle and type; no address of anything is below."""


class _Fields(ctypes.Structure):
    _fields_ = (("key", ctypes.c_uint32), ("handle", ctypes.c_uint32), ("type", ctypes.c_int))


def keep_key(window: MW, key: int) -> None:
    """What a C program does after a bind that it posted: `mw->rkey = key`. The next bind must name the window so.

    ibv_bind_mw does that for windows of type 1 only. The Python object has the address of the C one somewhere, and
    otherwise addresses of Python's own objects.
    """
    words = (ctypes.c_size_t * (type(window).__basicsize__ // ctypes.sizeof(ctypes.c_size_t))).from_address(id(window))
    for word in words:
        if word >= SMALLEST:
            fields = _Fields.from_address(word + KEY_AT)
            if (fields.key, fields.handle, fields.type) == (window.rkey, window.handle, window.type):
                fields.key = key
                return
    raise AssertionError("pyverbs keeps its windows in another way")
