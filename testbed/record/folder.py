"""The folder of a run, `results/<topology>/<UTC>-<id>/`, and everything that is kept in it.

    summary.json     the run in numbers (testbed.record.summary.Summary), written last and atomically
    events.jsonl     the events of the run, one JSON object per line (testbed.record.events)
    topology.yaml    the topology of the run, with every default filled in
    versions.json    versions of kernel, packages, programs, CRIU and Open vSwitch
    pcaps/           RoCE frames of the hosts' NICs (testbed.run.captures)
    traces/          traces of their queue pairs, if the topology requests them (testbed.diagram.trace)
    logs/<app>.stdout|stderr, logs/<host>.nic.log, …

The live view subscribes to the events that are reported through `RunFolder.event`.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from testbed.record import events
from testbed.record.stats import over_runs
from testbed.record.summary import Environment, Migration, RunReference, Summary

Listener = Callable[[Mapping[str, Any]], None]


def default_root() -> Path:
    """The root of all results: $TESTBED_RESULTS, or `results` in the current folder."""
    return Path(os.environ.get("TESTBED_RESULTS") or "results").absolute()


class RunFolder:
    """A run's folder, open for the duration of the run. Thread-safe: events may come from any thread.

    Use it as a context manager, or call `close`; `finish` writes the summary.
    """

    def __init__(
        self, path: Path, topology: str, seed: int, *, started: float | None = None, made: Iterable[Path] = ()
    ) -> None:
        """Use the existing folder `path`; `started` is time.monotonic() at the start of the run (default: now).

        `made`: parent folders that were created for it, which are also given to the user who called sudo.
        """
        self.path = path.absolute()
        self.topology = topology
        self.seed = seed
        self.run_id = path.name
        self.started = time.monotonic() if started is None else started
        self.started_utc = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        self._lock = threading.RLock()
        self._listeners: list[Listener] = []
        self._made = tuple(made)
        self._events = (self.path / "events.jsonl").open("a", encoding="utf-8", buffering=1)
        for sub in ("pcaps", "logs"):
            (self.path / sub).mkdir(exist_ok=True)

    @classmethod
    def create(cls, topology: str, *, seed: int, root: Path | None = None) -> RunFolder:
        """Create the folder `root/<topology>/<UTC>-<id>/`. Raises OSError (disk full, no write permission)."""
        safe = re.sub(r"[^A-Za-z0-9_.-]", "_", topology).lstrip(".") or "unnamed"
        parent = ((root or default_root()) / safe).absolute()
        made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
        parent.mkdir(parents=True, exist_ok=True)
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        path = parent / f"{stamp}-{secrets.token_hex(3)}"
        path.mkdir()
        return cls(path, topology, seed, made=made)

    # ---- paths -----------------------------------------------------------------------------------------------------

    def pcap(self, host: str) -> Path:
        """Path of the capture of `host`'s NIC."""
        return self.path / "pcaps" / f"{host}.pcap"

    def trace(self, host: str) -> Path:
        """Path of the queue pair trace of `host`'s NIC."""
        return self.path / "traces" / f"{host}.jsonl"

    def log(self, name: str) -> Path:
        """Path of a log, such as `server.stdout` or `h2.nic.log`."""
        return self.path / "logs" / name

    def relative(self, path: Path) -> str:
        """`path` relative to the run folder, as the summary has it."""
        return str(path.relative_to(self.path))

    # ---- events ----------------------------------------------------------------------------------------------------

    def now(self) -> float:
        """Seconds since the start of the run."""
        return time.monotonic() - self.started

    def since_start(self, monotonic: float) -> float:
        """Convert a time.monotonic() value to seconds since the start of the run."""
        return monotonic - self.started

    def subscribe(self, listener: Listener) -> None:
        """Call `listener(event)` for every later event, in the thread that reports it."""
        self._listeners.append(listener)

    def event(self, name: str, /, *, at: Any = None, **fields: Any) -> None:  # at: Any, for `**fields` of callers
        """Record an event that happened now, or at time.monotonic() `at`. `events.EVENTS` has the names and fields."""
        events.check(name, fields)
        record = {"t": round(self.now() if at is None else self.since_start(at), 6), "event": name, **fields}
        with self._lock:
            if not self._events.closed:
                self._events.write(json.dumps(record, default=str) + "\n")
            for listener in self._listeners:
                listener(record)

    # ---- files -----------------------------------------------------------------------------------------------------

    def write_topology(self, resolved: Mapping[str, Any]) -> Path:
        """Write topology.yaml from the resolved topology as plain data."""
        path = self.path / "topology.yaml"
        path.write_text(yaml.safe_dump(dict(resolved), sort_keys=False, allow_unicode=True))
        return path

    def write_environment(self, environment: Environment) -> Path:
        """Write versions.json, so that a run without a summary has the versions as well."""
        path = self.path / "versions.json"
        path.write_text(environment.model_dump_json(indent=2) + "\n")
        return path

    def finish(self, summary: Summary) -> Path:
        """Write summary.json atomically, close the events, and give the folder to the user who called sudo."""
        target = self.path / "summary.json"
        temporary = self.path / ".summary.json.tmp"
        temporary.write_text(summary.to_json())
        temporary.replace(target)
        self.close()
        return target

    def close(self) -> None:
        """Close events.jsonl; later events still reach the listeners. Idempotent."""
        with self._lock:
            self._events.close()
        give_to_user(self.path, self._made)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def give_to_user(path: Path, made: Iterable[Path] = ()) -> None:
    """Under sudo, make the calling user the owner of the folder `path`, all of its contents, and the folders `made`.

    Nothing else changes its owner: the results may be inside a folder of another user, such as /tmp.
    """
    if os.geteuid() != 0 or not os.environ.get("SUDO_UID", "").isdigit():
        return
    user, group = int(os.environ["SUDO_UID"]), int(os.environ.get("SUDO_GID", "-1"))
    for entry in [*made, path, *path.rglob("*")]:
        os.chown(entry, user, group, follow_symlinks=False)


def load_summary(path: Path) -> Summary:
    """Read `summary.json` (or the one in the folder `path`). Raises OSError, pydantic.ValidationError."""
    file = path / "summary.json" if path.is_dir() else path
    return Summary.model_validate_json(file.read_text())


def summarise_repeats(folder: RunFolder, runs: list[Summary]) -> Summary:
    """The summary of `--repeat N`: medians in `migrations[]`, intervals in `statistics`, and a reference to each run.

    The folders of `runs` are inside `folder`. A migration is ok only if it was ok in every run; its error is that of
    the first failure, and its exit code the first that is not 0.
    """
    if not runs:
        raise ValueError("no runs to summarise; at least one is needed")
    statistics = over_runs([run.model_dump() for run in runs], seed=folder.seed)
    count = min(len(run.migrations) for run in runs)
    first = runs[0]
    return first.model_copy(
        update={
            "ok": all(run.ok for run in runs),
            "run_id": folder.run_id,
            "started": folder.started_utc,
            "duration_s": folder.now(),
            "seed": folder.seed,
            "interrupted": any(run.interrupted for run in runs),
            "problems": [problem for run in runs for problem in run.problems],
            "hosts": [],
            "apps": [],
            "flow_changes": [],
            "migrations": [_typical([run.migrations[i] for run in runs], i, statistics) for i in range(count)],
            "folder": str(folder.path),
            "repeats": [
                RunReference(path=os.path.relpath(run.folder, folder.path), ok=run.ok, seed=run.seed) for run in runs
            ],
            "statistics": statistics,
        }
    )


def _typical(migrations: list[Migration], index: int, statistics: Mapping[str, Any]) -> Migration:
    """One migration with the medians over all runs."""

    def median(field: str) -> float | None:
        found = statistics.get(f"migrations[{index}].{field}")
        return None if found is None else float(found.median)

    failed = next((m for m in migrations if not m.ok), None)
    first = failed or migrations[0]
    codes = [m.app_exit_code for m in migrations]
    counts = ("image_bytes", "nic_image_bytes", "qps", "nak_stopped", "resumes", "retransmissions")
    return first.model_copy(
        update={
            "ok": failed is None,
            "rolled_back": any(m.rolled_back for m in migrations),
            "phases_ms": {p: median(f"phases_ms.{p}") for p in first.phases_ms if median(f"phases_ms.{p}") is not None},
            "phases_at_ms": {
                p: median(f"phases_at_ms.{p}") for p in first.phases_at_ms if median(f"phases_at_ms.{p}") is not None
            },
            "blackout_ms": median("blackout_ms"),
            "partner_gap_ms": median("partner_gap_ms"),
            "app_exit_code": next((code for code in codes if code != 0), 0),
            **{name: (None if (m := median(name)) is None else round(m)) for name in counts},
        }
    )
