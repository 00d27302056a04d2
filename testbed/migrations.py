"""The migrations of a run in time: waits until each is due, has it done, keeps the records."""

from __future__ import annotations

import contextlib
import threading
import time
import traceback
from typing import Final

from testbed import captures, summary
from testbed.errors import TestbedError
from testbed.session import Session
from testbed.topology import ResolvedMigration

POLL: Final = 0.02
"""Seconds between two looks at the clock, the applications and the byte counts."""


class Schedule:
    """One thread that carries the topology's migrations out, one after the other, as they become due."""

    def __init__(self, session: Session) -> None:
        self.records: list[summary.Migration] = []
        """One for each migration that was due or can no longer be, in the topology's order of time."""
        self.flow_changes: list[summary.FlowChange] = []
        self._session = session
        self._open = list(session.topology.migrations)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="migrations", daemon=True)
        self._bytes_at_start: dict[str, int] = {}
        session.folder.subscribe(self._on_event)

    def start(self) -> None:
        """Begin to watch the clock; the applications have started."""
        if self._open:
            self._thread.start()

    def finish(self) -> None:
        """Every application has ended: let the migration under way end; what is still open will never be due."""
        if self._thread.ident is not None:
            self._thread.join()

    def stop(self) -> None:
        """Begin no further migration and wait for the one under way."""
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
        """Those whose moment has come or whose program has ended, longest overdue first; each app's in order."""
        found: dict[str, tuple[float, ResolvedMigration]] = {}
        for migration in self._open:
            if migration.app not in found:
                found[migration.app] = (self._lateness(migration), migration)
        late = sorted((item for item in found.values() if item[0] >= 0), key=lambda item: -item[0])
        return [migration for _, migration in late]

    def _lateness(self, migration: ResolvedMigration) -> float:
        """Seconds (or, for a byte count, anything from 0) past the moment; negative before it."""
        app = self._session.apps.all[migration.app]
        if app.started is None:
            return -1.0
        if not app.running:
            return 0.0
        if migration.at_seconds is not None:
            return time.monotonic() - (app.started + migration.at_seconds)
        assert migration.at_bytes is not None
        return float(self._bytes(migration.app) - migration.at_bytes)

    def _bytes(self, name: str) -> int:
        """What the NIC of the application's host has sent and received since the application was first looked at."""
        host = self._session.apps.host_of(name)
        try:
            counters = host.call("nic", command="counters", timeout=10)["counters"]
        except TestbedError:
            return 0
        total = int(counters.get("tx_bytes", 0)) + int(counters.get("rx_bytes", 0))
        return total - self._bytes_at_start.setdefault(f"{name}@{host.name}", total)

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
            self.records.append(blank.model_copy(update={"error": error, "hint": "a longer run, or an earlier `at`"}))
            session.folder.event("migration_finished", index=migration.index, ok=False, rolled_back=False, error=error)
            return
        try:
            with captures.during_migration(session, migration.index):
                record = migrate(session, migration)
        except TestbedError as error:
            rolled_back = bool(getattr(error, "rolled_back", False))
            record = blank.model_copy(update={"error": error.message, "hint": error.hint, "rolled_back": rolled_back})
        except Exception as error:  # a defect: the run must still be taken down, and the defect seen
            with contextlib.suppress(OSError):
                session.folder.log("migration-traceback").write_text(traceback.format_exc())
            record = blank.model_copy(update={"error": f"{type(error).__name__}: {error}"})
        self.records.append(record)

    def _on_event(self, event: object) -> None:
        """Flow changes as the summary lists them."""
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
