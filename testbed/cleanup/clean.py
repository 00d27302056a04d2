"""Removing what a run has left: exactly what its state file lists; see `testbed.cleanup.state` for the rules.

Standard library only.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from testbed.cleanup.state import FACT, KINDS, PROCESSES, RUN_VARIABLE, Run, call, exists, mounts, start_time

SURVIVED: Final = "it was killed and is still there"


@dataclass(frozen=True)
class Removal:
    """One thing that a run left, and what became of it. `str()` describes it on one line."""

    kind: str
    """One of `state.KINDS`."""
    what: str
    """Its name, path, or pid with the command line."""
    problem: str | None = None
    """Why it is still there; None: it was removed."""

    def __str__(self) -> str:
        text = f"{self.kind.replace('_', ' ')} {self.what}"
        if self.problem is None:
            return text
        return f"{text}: {'NOT ended' if self.kind == 'process' else 'NOT removed'}: {self.problem}"


def clean(run: Run) -> list[Removal]:
    """Remove everything that `run` recorded, then its folder.

    Returns one record for each thing that was there, removed or not. It can be called again after a failure: what is
    gone is passed over, and the state file stays while anything is left.
    """
    removals = _end_processes(run)
    for kind in (kind for kind in KINDS if kind not in PROCESSES):
        for entry in reversed(run.entries):
            if entry["kind"] != kind:
                continue
            what = str(entry[FACT[kind]])
            if entry.get("existed") or not exists(kind, what):
                continue
            problem = _remove(kind, what)
            if problem is not None and not exists(kind, what):
                continue  # the kernel removed it meanwhile, as it does with a dead namespace's links
            removals.append(Removal(kind, what, problem))
    if all(removal.problem is None for removal in removals):
        shutil.rmtree(run.directory, ignore_errors=True)
    return removals


def _remove(kind: str, what: str) -> str | None:
    """Remove one thing; return the reason if that failed."""
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
    """Remove a folder, unless something is mounted below it: its files are not the run's."""
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
    """Every live process of `run`: pid → start time. `testbed.cleanup.state` says what makes a process the run's."""
    everyone = [pid for pid in _pids() if pid > 1]
    found = _recorded(run) | _with_mark(run, everyone)
    found |= _started(_in_namespaces_of(everyone, found))
    found |= _started(_descendants(everyone, found))
    spared = _own_line()
    return {pid: start for pid, start in found.items() if pid not in spared}


def _recorded(run: Run) -> dict[int, int]:
    """The recorded processes that still are what was recorded: a recycled pid has another start time."""
    return {
        entry["pid"]: entry["start"]
        for entry in run.entries
        if entry["kind"] in PROCESSES and entry.get("start") is not None and start_time(entry["pid"]) == entry["start"]
    }


def _with_mark(run: Run, everyone: list[int]) -> dict[int, int]:
    """The processes that carry the run's mark in their environment."""
    return _started([pid for pid in everyone if _marked(pid, run.run_id)])


def _descendants(everyone: list[int], known: dict[int, int]) -> list[int]:
    """The processes that descend from a known one."""
    parents = {pid: _parent(pid) for pid in everyone}

    def descends(pid: int) -> bool:
        while pid > 1 and pid not in known:
            pid = parents.get(pid, 0)
        return pid > 1

    return [pid for pid in everyone if descends(pid)]


def _in_namespaces_of(everyone: list[int], known: dict[int, int]) -> list[int]:
    """The processes in the network namespaces of known ones, unless these are the machine's."""
    machine = {_net_namespace(1), _net_namespace(os.getpid()), ""}
    spaces = {_net_namespace(pid) for pid in known} - machine
    return [pid for pid in everyone if _net_namespace(pid) in spaces]


def _started(pids: list[int]) -> dict[int, int]:
    """pid → start time of those that are alive."""
    return {pid: start for pid in pids if (start := start_time(pid)) is not None}


def _end_processes(run: Run, patience: float = 20.0) -> list[Removal]:
    """SIGKILL all of `run`'s processes, repeatedly until none is left or `patience` seconds have passed.

    A process needs processor time to die, and those with idle priority get little of it on a busy machine. There is no
    SIGTERM first: a caller has no use for an orderly end any more, and a frozen program would not see the signal.
    """
    killed: dict[int, str] = {}
    deadline = time.monotonic() + patience
    if run.alive and run.owner_pid not in _own_line():
        run.entries.append({"kind": "process", "token": "owner", "pid": run.owner_pid, "start": run.owner_start})
    while (left := processes(run)) and time.monotonic() < deadline:
        for pid, start in left.items():
            name = _command(pid)
            if start_time(pid) == start:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
                killed.setdefault(pid, name)
        time.sleep(0.05)
    ended = [Removal("process", f"{pid} ({name})") for pid, name in killed.items() if pid not in left]
    return ended + [Removal("process", f"{pid} ({killed.get(pid) or _command(pid)})", SURVIVED) for pid in left]


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()[:60]
    except OSError:
        return "?"
