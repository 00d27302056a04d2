"""A full memory barrier, for the two places where a store must be visible before a later load is made.

On x86 stores become visible in order and loads are made in order, but a load may overtake an earlier store. After
clearing a doorbell the queues must be read, and after publishing a completion the request for an event; without a
barrier either could be missed.
"""

from __future__ import annotations

import threading

_lock = threading.Lock()
_acquire, _release = _lock.acquire, _lock.release


def full_barrier() -> None:
    """HOT. Order every earlier store before every later load (taking a lock is a lock-prefixed instruction)."""
    _acquire(False)
    _release()
