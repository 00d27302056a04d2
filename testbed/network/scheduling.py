"""The userspace datapath's place in the queue for the processor.

A switch in the kernel forwards in an interrupt; ovs-vswitchd waits for its time slice behind programs that poll. While
there are runs on a userspace datapath its main thread, which forwards, gets the lowest real-time priority. The old
policy is kept in a file until the last run has gone, for a run that is killed in between.
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
    """What tells a process from a later one of the same number: its start time. Raises OSError when there is none."""
    name, _, rest = Path(f"/proc/{pid}/stat").read_text().partition("(")[2].rpartition(")")
    if name != SWITCH:
        raise ProcessLookupError(f"process {pid} is {name}, not {SWITCH}")
    return rest.split()[19]


def first(base: Path, pid_file: Path = PID_FILE) -> bool:
    """Let the switch run before what polls; whether it does now. Call with the machine's lock held."""
    try:
        pid = int(pid_file.read_text())
        saved = {"pid": pid, "started": _started(pid), "policy": os.sched_getscheduler(pid)}
        if os.sched_getscheduler(pid) & ~os.SCHED_RESET_ON_FORK in (os.SCHED_RR, os.SCHED_FIFO):
            return True  # by another run, or by its administrator
        (base / _SAVED).write_text(json.dumps(saved))
        os.sched_setscheduler(pid, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    except (OSError, ValueError):  # not allowed, as in many containers: slower, not wrong
        return False
    return True


def as_before(base: Path) -> None:
    """Give the switch its old policy back, if it is still the same process. Call with the machine's lock held."""
    path = base / _SAVED
    if not path.exists():
        return
    with contextlib.suppress(OSError, ValueError, KeyError):
        saved = json.loads(path.read_text())
        if _started(saved["pid"]) == saved["started"]:
            os.sched_setscheduler(saved["pid"], saved["policy"], os.sched_param(0))
    path.unlink()
