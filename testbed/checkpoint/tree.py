"""The processes of an application, as CRIU dumps them: everything below its init, which is pid 1 of their namespace."""

from __future__ import annotations

import contextlib
import os


def members(init: int) -> list[int]:
    """`init` and all its descendants, numbered as this process numbers them. Empty if it has ended.

    Orphans of a pid namespace become its init's children, so descendants are all there is. Reads only their own
    entries in /proc (`children`, which CRIU needs too): a search of all of /proc costs milliseconds of blackout.
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
    """Give every thread that has scheduling policy `before` (sched(7)) the policy `after`, both without priority.

    Applications run under SCHED_IDLE so that what polls gives way to NICs and switches. But CRIU does much of its work
    inside the frozen program, with the program's policy: on a busy machine it would wait for all others.
    """
    for pid in members(init):
        with contextlib.suppress(OSError):
            for thread in map(int, os.listdir(f"/proc/{pid}/task")):
                if os.sched_getscheduler(thread) == before:
                    os.sched_setscheduler(thread, after, os.sched_param(0))
