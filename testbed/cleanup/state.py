"""What a run has made on this machine, written down before it is made, so that `testbed clean` can remove it.

One folder per run, `/run/migros-testbed/<run-id>/`, with the file `state` in it: JSON lines, each appended by one
`write`. The first line names the owner (pid and start time). Every further line is one thing that is about to exist. A
killed run leaves the file behind, and the file says what to remove: exactly that, nothing found by a name pattern.

Three rules keep other people's things safe:

* a link, bridge or namespace whose name is already in use is refused when recorded; a file or folder that already
  exists is recorded as not the run's;
* a process is identified by pid *and* start time, so a recycled pid is never killed. A pid exists only after the fork;
  for the time between, every child inherits a mark in its environment (`RUN_VARIABLE`), which CRIU restores, too;
* a process in the network namespace of a verified process of the run belongs to the run, unless that namespace is the
  machine's.

Standard library only.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from testbed.base.errors import EnvironmentProblem

BASE: Final = Path("/run/migros-testbed")
RUN_VARIABLE: Final = "MIGROS_TESTBED_RUN"
YOUNG: Final = 5.0
"""Seconds within which a folder without a state file may belong to a run that is just starting."""
KINDS: Final = ("process", "host", "mount", "link", "ovs_bridge", "netns", "cgroup", "file", "directory")
"""Everything that can be recorded, in the order in which it is removed (newest first within one kind)."""
PROCESSES: Final = ("process", "host")
"""The kinds that are processes: they are ended, all else is removed."""

FACT: Final = {
    "process": "pid",
    "host": "pid",
    "mount": "path",
    "link": "name",
    "ovs_bridge": "name",
    "netns": "name",
    "cgroup": "path",
    "file": "path",
    "directory": "path",
}


def start_time(pid: int) -> int | None:
    """Clock ticks after boot at which `pid` started (proc(5), stat field 22); None if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat[stat.rindex(")") + 2 :].split()
    return None if fields[0] in "ZX" else int(fields[19])


class RunState:
    """The state file of one run: `create` it, then `record` each thing before it is created."""

    def __init__(self, run_id: str, base: Path = BASE) -> None:
        self.run_id = run_id
        self.directory = base / run_id
        self.file = self.directory / "state"
        self._count = 0

    @classmethod
    def create(cls, run_id: str, base: Path = BASE) -> RunState:
        """Start a run owned by this process. Also marks this process's environment, which all its children inherit."""
        state = cls(run_id, base)
        try:
            state.directory.mkdir(parents=True, mode=0o755)
        except PermissionError as error:
            raise EnvironmentProblem(
                f"cannot write to {base}", hint="the testbed creates network namespaces: run it as root (sudo)"
            ) from error
        state._append({"kind": "run", "run_id": run_id, "pid": os.getpid(), "start": start_time(os.getpid())})
        os.environ[RUN_VARIABLE] = run_id
        return state

    def record(self, kind: str, **facts: Any) -> str:
        """Write down one thing that is about to be made; returns a token for `forget`.

        process     pid (its start time is read here); recorded right after the fork
        host        pid of a Mininet host's shell; every process in its network namespace is ended with it
        link        name of an interface of the root namespace
        netns       name, of `ip netns`
        ovs_bridge  name
        mount       path, in the root mount namespace
        cgroup      path
        file        path
        directory   path, removed with its content

        Further facts are kept for the reader. Raises EnvironmentProblem if the name is taken already, or if Open
        vSwitch does not say whether a bridge's is.
        """
        if kind not in KINDS:
            raise ValueError(f"unknown kind {kind!r}; known: {', '.join(KINDS)}")
        fact = facts[FACT[kind]]
        if kind in PROCESSES:
            facts.setdefault("start", start_time(int(fact)))
        elif kind in ("file", "directory"):
            facts["existed"] = os.path.lexists(fact)
        else:
            taken = bridge_exists(str(fact)) if kind == "ovs_bridge" else exists(kind, str(fact))
            if taken is None:
                raise EnvironmentProblem(
                    f"Open vSwitch does not say whether there is a bridge {fact}",
                    hint="does `ovs-vsctl show` answer? the server may be overloaded",
                )
            if taken:
                raise EnvironmentProblem(
                    f"{kind.replace('_', ' ')} {fact} already exists",
                    hint="testbed clean removes what a killed run has left; testbed status lists live runs",
                )
        self._count += 1
        token = f"{os.getpid()}.{self._count}"
        self._append({"kind": kind, "token": token, **{key: _plain(value) for key, value in facts.items()}})
        return token

    def forget(self, token: str) -> None:
        """Note that the thing behind `token` has been removed by its maker."""
        self._append({"forget": token})

    def close(self) -> None:
        """Remove the state: the run has removed everything itself."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _append(self, line: dict[str, Any]) -> None:
        descriptor = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.write(descriptor, (json.dumps(line, separators=(",", ":")) + "\n").encode())
        finally:
            os.close(descriptor)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


@dataclass(slots=True)
class Run:
    """One state file as read back."""

    run_id: str
    directory: Path
    owner_pid: int = 0
    owner_start: int | None = None
    entries: list[dict[str, Any]] = field(default_factory=list)
    """Recorded and not forgotten, oldest first."""

    @property
    def alive(self) -> bool:
        """Whether the process that owns the run still exists: the same one, not another with a recycled pid."""
        if self.owner_start is None:
            # Without a first line the process was killed before writing it, or is about to write it.
            try:
                return time.time() - self.directory.stat().st_mtime < YOUNG
            except OSError:
                return False
        return start_time(self.owner_pid) == self.owner_start


def read(directory: Path) -> Run:
    """Read `directory/state`. A line that a kill has truncated is dropped: its thing was not created yet."""
    run = Run(run_id=directory.name, directory=directory)
    try:
        lines = (directory / "state").read_text(errors="replace").splitlines()
    except OSError:
        return run
    forgotten: set[str] = set()
    for text in lines:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if not isinstance(line, dict):
            continue
        if "forget" in line:
            forgotten.add(line["forget"])
        elif line.get("kind") == "run":
            run.owner_pid, run.owner_start = line["pid"], line["start"]
        elif line.get("kind") in KINDS:
            run.entries.append(line)
    run.entries = [entry for entry in run.entries if entry["token"] not in forgotten]
    return run


def runs(base: Path = BASE) -> list[Run]:
    """List every run that has a folder under `base`, by name."""
    if not base.is_dir():
        return []
    return [read(path) for path in sorted(base.iterdir()) if path.is_dir()]


def exists(kind: str, what: str) -> bool:
    """Whether a thing of this kind and name exists on the machine or, for a bridge, may exist."""
    if kind == "link":
        return os.path.exists(f"/sys/class/net/{what}")
    if kind == "netns":
        return os.path.exists(f"/run/netns/{what}")
    if kind == "mount":
        return os.path.realpath(what) in mounts()
    if kind == "ovs_bridge":
        # Without an answer the bridge may exist: the database of Open vSwitch outlives its daemon.
        return bridge_exists(what, 5) is not False
    return os.path.lexists(what)


def bridge_exists(name: str, patience: int = 30) -> bool | None:
    """Whether Open vSwitch has this bridge; None if it does not answer within `patience` seconds."""
    argv = ["ovs-vsctl", f"--timeout={patience}", "br-exists", name]
    if shutil.which(argv[0]) is None:
        return False
    code = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True).returncode
    return {0: True, 2: False}.get(code)


def call(*argv: str) -> str | None:
    """Run a program; None if it succeeded, else its error message."""
    result = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30)
    if result.returncode == 0:
        return None
    return result.stderr.strip() or f"{argv[0]} ended with {result.returncode}"


def mounts() -> set[str]:
    """Every mount point of this mount namespace."""
    with open("/proc/self/mountinfo") as file:
        # Octal escapes as in proc(5): a space in a path is \040.
        return {line.split(" ")[4].encode().decode("unicode_escape") for line in file}
