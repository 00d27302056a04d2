"""The scheduling priority of the userspace datapath.

A switch in the kernel forwards in an interrupt, but ovs-vswitchd waits for its time slice behind programs that poll.
While runs use a userspace datapath, its main thread, which forwards, therefore gets the lowest real-time priority. The
old policy is kept in a file until the last run has ended, in case a run is killed in between.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Final

SWITCH: Final = "ovs-vswitchd"
PID_FILE: Final = Path("/run/openvswitch/ovs-vswitchd.pid")
_SAVED: Final = "switch-scheduling"


def _started(pid: int) -> str:
    """Start time of a process, which tells it from a later one with the same id. Raises OSError if there is none."""
    name, _, rest = Path(f"/proc/{pid}/stat").read_text().partition("(")[2].rpartition(")")
    if name != SWITCH:
        raise ProcessLookupError(f"process {pid} is {name}, not {SWITCH}")
    return rest.split()[19]


def raise_priority(base: Path, pid_file: Path = PID_FILE) -> bool:
    """Let the switch run before programs that poll. Returns whether it now does. Call with the machine's lock held."""
    try:
        pid = int(pid_file.read_text())
        saved = {"pid": pid, "started": _started(pid), "policy": os.sched_getscheduler(pid)}
        if os.sched_getscheduler(pid) & ~os.SCHED_RESET_ON_FORK in (os.SCHED_RR, os.SCHED_FIFO):
            return True  # Another run or the administrator has raised it.
        (base / _SAVED).write_text(json.dumps(saved))
        os.sched_setscheduler(pid, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    except (OSError, ValueError):  # Not permitted, as in many containers: slower, but still correct.
        return False
    return True


def restore_priority(base: Path) -> None:
    """Restore the switch's old policy if it is still the same process. Call with the machine's lock held."""
    path = base / _SAVED
    if not path.exists():
        return
    with contextlib.suppress(OSError, ValueError, KeyError):
        saved = json.loads(path.read_text())
        if _started(saved["pid"]) == saved["started"]:
            os.sched_setscheduler(saved["pid"], saved["policy"], os.sched_param(0))
    path.unlink()
