"""What Ctrl-C, SIGTERM and SIGHUP do to a run: they interrupt it, but not its clean-up."""

from __future__ import annotations

import contextlib
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Final

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Raise KeyboardInterrupt at Ctrl-C (also if a shell started the process with it ignored), SIGTERM and SIGHUP.

    Does nothing outside the main thread, which alone can set handlers and receives signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    old = {number: signal.signal(number, interrupt) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def postponed(tell: Callable[[], None]) -> Iterator[None]:
    """Keep a second Ctrl-C from cutting the clean-up short: each is answered by `tell`, in another thread.

    The handler itself takes no lock, because the main thread, which it interrupts, may hold the one that `tell` needs.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: queue.SimpleQueue[bool] = queue.SimpleQueue()  # its `put` may be called by a signal handler

    def answer() -> None:
        while asked.get():
            with contextlib.suppress(OSError):  # a full disk: the main thread reports it when it writes next
                tell()

    teller = threading.Thread(target=answer, name="tell-interrupts", daemon=True)
    # Before the thread starts, which may wait for a processor: nothing may be interrupted from here on.
    old = {number: signal.signal(number, lambda *_: asked.put(True)) for number in _SIGNALS}
    try:
        teller.start()
        yield
    finally:
        asked.put(False)
        if teller.ident is not None:
            teller.join()
        for number, handler in old.items():
            signal.signal(number, handler)
