"""The migrations of a run in time: wait until each is due, carry it out, keep the records."""

from __future__ import annotations

import contextlib
import threading
import time
import traceback
from collections.abc import Iterable
from typing import Final

from testbed.base.errors import TestbedError
from testbed.lab.session import Session
from testbed.record import summary
from testbed.run import captures
from testbed.topology import ResolvedMigration, ResolvedTopology

POLL: Final = 0.02
"""Seconds between two checks of the clock, the applications and the byte counts."""


def addresses_at_end(topology: ResolvedTopology, records: Iterable[summary.Migration]) -> dict[str, str]:
    """Address of a host → name of the host that has it after `records`, which are in order of time."""
    at = {host.ip: host.name for host in topology.hosts.values()}
    for record in records:
        if record.ok and record.address == "keep":
            at[topology.migrations[record.index].ip_before] = record.to_host
    return at


class Traffic:
    """The bytes that one application has sent and received, as counted by the NIC of the host where it was.

    A NIC counts from its own start, and continues to count for other programs when this one has left.
    """

    def __init__(self) -> None:
        self._host: str | None = None
        self._baseline = 0
        """The NIC's count when the application came to the host."""
        self._last = 0
        self._carried = 0
        """Bytes that were counted at earlier hosts."""

    @property
    def total(self) -> int:
        """Bytes since the first reading."""
        return self._carried + self._last - self._baseline

    def update(self, host: str, count: int) -> None:
        """Take a reading: the application is at `host`, whose NIC has counted `count` bytes."""
        if host != self._host:
            self._carried = self.total
            self._host, self._baseline = host, count
        self._last = count


class Schedule:
    """A thread that carries out the topology's migrations, one after the other, as they become due."""

    def __init__(self, session: Session) -> None:
        self.records: list[summary.Migration] = []
        """One for each migration that has become due or can no longer become due, in the order of time."""
        self.flow_changes: list[summary.FlowChange] = []
        self._session = session
        self._open = list(session.topology.migrations)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="migrations", daemon=True)
        self._traffic = {migration.app: Traffic() for migration in self._open if migration.at_bytes is not None}
        session.folder.subscribe(self._on_event)

    def start(self) -> None:
        """Start to watch the clock; called when the applications have started."""
        if self._open:
            self._thread.start()

    def finish(self) -> None:
        """Wait until no migration is open; called when every application has ended, which makes all of them due."""
        if self._thread.ident is not None:
            self._thread.join()

    def stop(self) -> None:
        """Start no further migration and wait for the one in progress."""
        self._stopped.set()
        if self._thread.ident is not None:
            self._thread.join(60)

    def _run(self) -> None:
        while self._open and not self._stopped.is_set():
            for migration in self._due():
                self._open.remove(migration)
                self._do(migration)
                break
            else:
                self._stopped.wait(POLL)

    def _due(self) -> list[ResolvedMigration]:
        """The migrations that are due or whose program has ended, longest overdue first; each app's in order."""
        for name in self._traffic:
            self._count(name)
        found: dict[str, tuple[float, ResolvedMigration]] = {}
        for migration in self._open:
            if migration.app not in found:
                found[migration.app] = (self._lateness(migration), migration)
        late = sorted((item for item in found.values() if item[0] >= 0), key=lambda item: -item[0])
        return [migration for _, migration in late]

    def _lateness(self, migration: ResolvedMigration) -> float:
        """How late a migration is: seconds, or bytes for a byte count; negative before it is due."""
        app = self._session.apps.all[migration.app]
        if app.started is None:
            return -1.0
        if not app.running:
            return 0.0
        if migration.at_seconds is not None:
            return time.monotonic() - (app.started + migration.at_seconds)
        assert migration.at_bytes is not None
        return float(self._traffic[migration.app].total - migration.at_bytes)

    def _count(self, name: str) -> None:
        """Read the traffic of an application that is running."""
        if not self._session.apps.all[name].running:
            return
        host = self._session.apps.host_of(name).name
        if (count := self._bytes(host)) is not None:
            self._traffic[name].update(host, count)

    def _bytes(self, host: str) -> int | None:
        """The bytes that the NIC of `host` has sent and received; None if it does not answer."""
        try:
            counters = self._session.hosts[host].call("nic", command="counters", timeout=10)["counters"]
        except TestbedError:
            return None
        return int(counters.get("tx_bytes", 0)) + int(counters.get("rx_bytes", 0))

    def _count_move(self, name: str, source: str, to: str, before: int | None) -> None:
        """After a migration, count the rest of the bytes at `source`; `before` is the NIC's count at `to` before it."""
        if self._session.apps.host_of(name).name != to:
            return
        for host, count in ((source, self._bytes(source)), (to, before)):
            if count is not None:
                self._traffic[name].update(host, count)

    def _do(self, migration: ResolvedMigration) -> None:
        from testbed.migration import migrate

        session = self._session
        before = time.monotonic()
        blank = summary.Migration(
            index=migration.index,
            app=migration.app,
            from_host=migration.source,
            to_host=migration.to,
            address="keep" if migration.address == "keep" else "change",
            at_s=session.folder.since_start(before),
            ok=False,
            rolled_back=False,
        )
        app = session.apps.all[migration.app]
        if not app.running:
            error = f"{migration.app} {app.end_in_words()} before its migration was due"
            self.records.append(
                blank.model_copy(update={"error": error, "hint": "let the program run longer, or set an earlier `at`"})
            )
            session.folder.event("migration_finished", index=migration.index, ok=False, rolled_back=False, error=error)
            return
        counted = migration.app in self._traffic
        source, count_there = session.apps.host_of(migration.app).name, self._bytes(migration.to) if counted else None
        try:
            with captures.during_migration(session, migration.index):
                record = migrate(session, migration)
        except TestbedError as error:
            rolled_back = bool(getattr(error, "rolled_back", False))
            record = blank.model_copy(update={"error": error.message, "hint": error.hint, "rolled_back": rolled_back})
        except Exception as error:  # a defect: it is recorded, and the run is still taken down
            with contextlib.suppress(OSError):
                session.folder.log("migration-traceback").write_text(traceback.format_exc())
            record = blank.model_copy(update={"error": f"{type(error).__name__}: {error}"})
        self.records.append(record)
        if counted:
            self._count_move(migration.app, source, migration.to, count_there)

    def _on_event(self, event: object) -> None:
        """Collect flow changes for the summary."""
        if not isinstance(event, dict) or event.get("event") != "flow_change":
            return
        self.flow_changes.append(
            summary.FlowChange(
                t_s=event["t"],
                switch=event["switch"],
                action=event["action"],
                match=str(event["match"]),
                out=str(event.get("out") or ""),
                migration=event.get("migration"),
            )
        )
