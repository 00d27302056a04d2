"""Taking away what a run has left: exactly what its state file says, see `testbed.cleanup.state` for the rules.

Standard library only.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from testbed.cleanup.state import FACT, KINDS, RUN_VARIABLE, Run, call, exists, mounts, start_time


def clean(run: Run) -> list[str]:
    """Remove everything that `run` recorded, then its folder. Returns one line for each thing removed or not removable.

    Can be called again after a failure: what is gone is passed over. The state file stays while anything is left.
    """
    done: list[str] = []
    failed = False
    ended, left = _end_processes(run)
    done += ended
    for pid in left:
        failed = True
        done.append(f"process {pid} ({_command(pid)}): NOT ended: it was killed and is still there")
    for kind in KINDS[2:]:
        for entry in reversed(run.entries):
            if entry["kind"] != kind:
                continue
            what = str(entry[FACT[kind]])
            if entry.get("existed") or not exists(kind, what):
                continue
            problem = _remove(kind, what)
            if problem is not None and not exists(kind, what):
                continue  # it went by itself meanwhile: the kernel takes a dead namespace's links away when it likes
            failed |= problem is not None
            done.append(f"{kind.replace('_', ' ')} {what}" + (f": NOT removed: {problem}" if problem else ""))
    if not failed:
        shutil.rmtree(run.directory, ignore_errors=True)
    return done


def _remove(kind: str, what: str) -> str | None:
    """Remove one thing; the reason if that failed."""
    try:
        if kind == "link":
            return call("ip", "link", "delete", what)
        if kind == "netns":
            return call("ip", "netns", "delete", what)
        if kind == "ovs_bridge":
            return call("ovs-vsctl", "--timeout=10", "--if-exists", "del-br", what)
        if kind == "mount":
            return call("umount", "--lazy", what)
        if kind == "cgroup":
            _remove_cgroup(Path(what))
        elif kind == "file":
            os.unlink(what)
        else:
            _remove_tree(what)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None


def _remove_tree(path: str) -> None:
    """As rmtree, but never into something mounted below (that would be other people's files)."""
    real = os.path.realpath(path)
    below = [mount for mount in mounts() if mount == real or mount.startswith(real + "/")]
    if below:
        raise OSError(f"{', '.join(sorted(below))} is mounted there")
    if os.path.islink(path):
        os.unlink(path)
    else:
        shutil.rmtree(path)


def _remove_cgroup(path: Path) -> None:
    for folder in [*sorted((p for p in path.rglob("*") if p.is_dir()), reverse=True), path]:
        folder.rmdir()


# ------------------------------------------------------------------------------------------------------------ processes


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def _parent(pid: int) -> int:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(stat[stat.rindex(")") + 2 :].split()[1])


def _net_namespace(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/net")
    except OSError:
        return ""


def _marked(pid: int, run_id: str) -> bool:
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False
    return f"{RUN_VARIABLE}={run_id}".encode() in environment.split(b"\0")


def _own_line() -> set[int]:
    """This process and its ancestors, never to be ended: `testbed clean` may itself run inside a marked environment."""
    line, pid = set(), os.getpid()
    while pid > 0 and pid not in line:
        line.add(pid)
        pid = _parent(pid)
    return line


def processes(run: Run) -> dict[int, int]:
    """Every live process of `run`: pid → start time. See the module's text for what makes a process ours."""
    ours: dict[int, int] = {}
    for entry in run.entries:
        if entry["kind"] in ("process", "host") and entry.get("start") is not None:
            if start_time(entry["pid"]) == entry["start"]:
                ours[entry["pid"]] = entry["start"]
    everyone = [pid for pid in _pids() if pid > 1]
    for pid in everyone:
        if pid not in ours and _marked(pid, run.run_id):
            start = start_time(pid)
            if start is not None:
                ours[pid] = start
    machine = {_net_namespace(1), _net_namespace(os.getpid()), ""}
    spaces = {_net_namespace(pid) for pid in ours} - machine
    parents = {pid: _parent(pid) for pid in everyone}
    spared = _own_line()
    for pid in everyone:
        ancestor = pid
        while ancestor > 1 and ancestor not in ours:
            ancestor = parents.get(ancestor, 0)
        if ancestor > 1 or _net_namespace(pid) in spaces:
            start = start_time(pid)
            if start is not None:
                ours[pid] = start
    return {pid: start for pid, start in ours.items() if pid not in spared}


def _end_processes(run: Run, patience: float = 20.0) -> tuple[list[str], list[int]]:
    """SIGKILL all of `run`'s processes, again until none is left or `patience` seconds have passed.

    Returns a line for each, and the pids that are still there: a process needs processor time to die, and those with
    idle priority get little of it on a busy machine. Not SIGTERM first: whoever calls this has no use for an orderly
    end any more, and a frozen program would not see it.
    """
    done: list[str] = []
    deadline = time.monotonic() + patience
    if run.alive and run.owner_pid not in _own_line():
        run.entries.append({"kind": "process", "token": "owner", "pid": run.owner_pid, "start": run.owner_start})
    while (found := processes(run)) and time.monotonic() < deadline:
        for pid, start in found.items():
            name = _command(pid)
            if start_time(pid) == start:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
                done.append(f"process {pid} ({name})")
        time.sleep(0.05)
    return list(dict.fromkeys(done)), list(found)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()[:60]
    except OSError:
        return "?"
