"""The processes of an application that CRIU dumps: everything below its init, which is pid 1 of their namespace."""

from __future__ import annotations

import contextlib
import os


def members(init: int) -> list[int]:
    """Return `init` and all its descendants, as this process numbers them; empty if it has ended.

    Orphans in a pid namespace become children of its init, so these are all its processes. Only their own entries in
    /proc are read (`children`, which CRIU needs too), because a search of all of /proc takes milliseconds of blackout.
    """
    found: list[int] = []
    waiting = [init]
    while waiting:
        pid = waiting.pop()
        try:
            threads = os.listdir(f"/proc/{pid}/task")
        except OSError:
            continue
        found.append(pid)
        for thread in threads:
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{thread}/children") as children:
                waiting += map(int, children.read().split())
    return found


def change_policy(init: int, before: int, after: int) -> None:
    """Change the scheduling policy (sched(7)) of every thread that has `before` to `after`, both without priority.

    Applications run under SCHED_IDLE, so that polling programs yield to NICs and switches. But CRIU does much of its
    work inside the frozen program under the program's policy, and would wait for all others on a busy machine.
    """
    for pid in members(init):
        with contextlib.suppress(OSError):
            for thread in map(int, os.listdir(f"/proc/{pid}/task")):
                if os.sched_getscheduler(thread) == before:
                    os.sched_setscheduler(thread, after, os.sched_param(0))
