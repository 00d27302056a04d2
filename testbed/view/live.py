"""The live view of a run: stages, applications, packets and bytes per NIC with rates, the migration's phases.

It only listens to events (`record.events`). On a terminal it is a rich view that is redrawn; elsewhere it prints one
plain line per event, so that a log stays readable. `RunState` accumulates the events, `draw` renders it, `line`
describes one event in words, and `LiveView` connects them to a stream.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, TextIO

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from testbed.record.events import STAGES
from testbed.record.summary import PHASES
from testbed.view import text

REDRAWS_PER_SECOND = 8
NOTES = 3
"""Number of the latest notes, limits and problems that the view shows."""


@dataclass
class NicState:
    """The counters of a NIC, and its rates in bytes per second between the last two readings."""

    t: float = 0.0
    counters: Mapping[str, int] = field(default_factory=dict)
    tx_rate: float | None = None
    rx_rate: float | None = None

    def update(self, t: float, counters: Mapping[str, int]) -> None:
        """Take a new reading of the counters, `t` seconds into the run."""
        if self.counters and t > self.t:
            span = t - self.t
            # A NIC that was restarted counts from 0 again, which must not give negative rates.
            self.tx_rate = max(counters.get("tx_bytes", 0) - self.counters.get("tx_bytes", 0), 0) / span
            self.rx_rate = max(counters.get("rx_bytes", 0) - self.counters.get("rx_bytes", 0), 0) / span
        self.t, self.counters = t, dict(counters)


@dataclass
class AppState:
    """The host that an application runs on, and how it ended."""

    host: str
    ended: str | None = None
    """`code 0` or `signal 9`, for example; None while it runs."""
    good: bool = True
    """It runs, or has ended with code 0."""


@dataclass
class MigrationState:
    """The progress of a migration."""

    title: str
    started: float
    phases: dict[str, float | None] = field(default_factory=dict)
    """Phase → its duration in ms, or None while it lasts."""
    outcome: str | None = None
    ok: bool = False


@dataclass
class RunState:
    """Everything that the view shows, built from the events alone."""

    topology: str = ""
    stage: str = ""
    detail: str = ""
    apps: dict[str, AppState] = field(default_factory=dict)
    nics: dict[str, NicState] = field(default_factory=dict)
    migrations: dict[int, MigrationState] = field(default_factory=dict)
    notes: deque[str] = field(default_factory=lambda: deque(maxlen=NOTES))

    def take(self, event: Mapping[str, Any]) -> None:
        """Update the state with one event."""
        match event["event"]:
            case "run_started":
                self.topology = event["topology"]
            case "stage":
                self.stage, self.detail = event["name"], event.get("detail") or ""
            case "host_ready" | "nic_ready":
                self.nics.setdefault(event["host"], NicState())
            case "counters":
                self.nics.setdefault(event["host"], NicState()).update(event["t"], event["counters"])
            case "app_started":
                self.apps[event["app"]] = AppState(event["host"])
            case "app_moved":
                self.apps[event["app"]] = AppState(event["to_host"])
            case "app_exited":
                self.apps[event["app"]] = AppState(event["host"], _ended(event), event.get("code") == 0)
            case "migration_started":
                title = f"{event['app']} {event['from_host']} → {event['to_host']}"
                self.migrations[event["index"]] = MigrationState(title, event["t"])
            case "phase_started" | "phase_finished" if event["index"] in self.migrations:
                self.migrations[event["index"]].phases[event["phase"]] = event.get("ms")
            case "migration_finished" if event["index"] in self.migrations:
                migration = self.migrations[event["index"]]
                migration.ok, migration.outcome = event["ok"], _outcome(event)
            case "note" | "limit" | "problem":
                self.notes.append(line(event) or "")


def _ended(event: Mapping[str, Any]) -> str:
    return f"signal {event['signal']}" if event.get("signal") is not None else f"code {event.get('code')}"


def _outcome(event: Mapping[str, Any]) -> str:
    if event["ok"]:
        gap, partner = event.get("blackout_ms"), event.get("partner_gap_ms")
        return f"done, blackout {text.ms(gap)} ms, at the peer {text.ms(partner)} ms"
    failure = "rolled back, continues at the source" if event.get("rolled_back") else "FAILED"
    return f"{failure}: {event.get('error') or 'no reason given'}"


def _stage(event: Mapping[str, Any]) -> str:
    detail = f" ({event['detail']})" if event.get("detail") else ""
    return f"{STAGES.get(event['name'], event['name'])}{detail}"


def _limit(event: Mapping[str, Any]) -> str:
    why = f" ({event['why']})" if event.get("why") else ""
    return f"not available here: {event['wanted']}; instead: {event['got']}{why}"


def _number(event: Mapping[str, Any]) -> str:
    return f"migration {event['index'] + 1}"


_IN_WORDS: Final[Mapping[str, Callable[[Mapping[str, Any]], str]]] = {
    "run_started": lambda e: f"{e['topology']}, seed {e['seed']}",
    "stage": _stage,
    "host_ready": lambda e: f"{e['host']}: host ready, {e.get('ip') or 'no address'}",
    "nic_ready": lambda e: f"{e['host']}: NIC ready",
    "app_started": lambda e: f"{e['host']}: {e['app']} started",
    "app_exited": lambda e: f"{e['host']}: {e['app']} ended with {_ended(e)}",
    "app_moved": lambda e: f"{e['to_host']}: {e['app']} arrived from {e['from_host']}",
    "migration_started": lambda e: f"{_number(e)}: {e['app']} {e['from_host']} → {e['to_host']}",
    "phase_finished": lambda e: f"{_number(e)}: {e['phase']} {text.ms(e.get('ms'))} ms",
    "migration_finished": lambda e: f"{_number(e)}: {_outcome(e)}",
    "flow_change": lambda e: f"{e['switch']}: flow {e['action']}, {e['match']} {e.get('out', '')}".rstrip(),
    "limit": _limit,
    "problem": lambda e: f"problem: {e['where']}: {e['error']}",
    "note": lambda e: str(e["text"]),
    "run_finished": lambda e: "all checks passed" if e["ok"] else "a check failed",
}
"""The events that the plain view shows → how it describes them."""


def line(event: Mapping[str, Any]) -> str | None:
    """An event in words, or None if the plain view does not show it."""
    in_words = _IN_WORDS.get(event["event"])
    return in_words(event) if in_words is not None else None


def draw(state: RunState, elapsed: float) -> RenderableType:
    """Render `state` as it is `elapsed` seconds into the run."""
    parts: list[RenderableType] = [
        Rule(Text(f"{state.topology} · {elapsed:.1f} s", style="bold"), align="left", style="blue"),
        Text(f"{STAGES.get(state.stage, state.stage)}" + (f" · {state.detail}" if state.detail else "")),
    ]
    if state.apps:
        parts += [Text(), _apps(state)]
    if state.nics:
        parts += [Text(), _nics(state)]
    for migration in state.migrations.values():
        parts += [Text(), *_migration(migration)]
    if state.notes:
        parts += [Text(), *(Text(note, style="yellow", overflow="ellipsis", no_wrap=True) for note in state.notes)]
    return Group(*parts)


def _table(*columns: tuple[str, bool]) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
    for name, right in columns:
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    return table


def _apps(state: RunState) -> Table:
    table = _table(("application", False), ("on", False), ("", False))
    for name, app in state.apps.items():
        table.add_row(name, app.host, Text(app.ended or "runs", style="green" if app.good else "bold red"))
    return table


def _nics(state: RunState) -> Table:
    table = _table(
        ("NIC", False), *((name, True) for name in ("packets out", "in", "bytes out", "in", "out now", "in now"))
    )
    for host, nic in state.nics.items():
        get = nic.counters.get
        table.add_row(
            host, text.count(get("tx_packets")), text.count(get("rx_packets")),
            text.size(get("tx_bytes")), text.size(get("rx_bytes")), text.rate(nic.tx_rate), text.rate(nic.rx_rate),
        )  # fmt: skip
    return table


def _migration(migration: MigrationState) -> Iterator[RenderableType]:
    yield Text(f"migration: {migration.title}", style="bold")
    steps: list[Text] = []
    for phase in PHASES:
        if phase in migration.phases:
            length = migration.phases[phase]
            if length is None:
                steps.append(Text(f"▸ {phase} …", style="yellow"))
            else:
                steps.append(Text(f"✓ {phase} {text.ms(length)} ms", style="green"))
        elif migration.outcome is None:
            steps.append(Text(f"· {phase}", style="dim"))
    yield Padding(Columns(steps, padding=(0, 2)), (0, 0, 0, 2))
    if migration.outcome is not None:
        yield Padding(Text(migration.outcome, style="green" if migration.ok else "bold red"), (0, 0, 0, 2))


class LiveView:
    """The view of a running run. Use: `with LiveView() as view: folder.subscribe(view.on_event); …`.

    It writes to `stream` (default: standard error, so that `--json` keeps standard output clean), and nothing if
    `quiet` is set.
    """

    def __init__(self, stream: TextIO | None = None, *, plain: bool | None = None, quiet: bool = False) -> None:
        """`plain`: print lines instead of the redrawn view (default: if `stream` is not a terminal)."""
        self._stream = stream or sys.stderr
        self._console = Console(file=self._stream, highlight=False, markup=False, emoji=False)
        self._plain = (not self._console.is_terminal or self._console.is_dumb_terminal) if plain is None else plain
        self._quiet = quiet
        self._lock = threading.Lock()
        self._state = RunState()
        self._clock_offset = time.monotonic()
        self._live: Live | None = None

    def on_event(self, event: Mapping[str, Any]) -> None:
        """Show one event; may be called from any thread. A closed stream (a pipe without a reader) is not an error."""
        if self._quiet:
            return
        with self._lock:
            self._state.take(event)
            self._clock_offset = time.monotonic() - event["t"]
            if self._plain and (words := line(event)) is not None:
                try:
                    print(f"[{event['t']:9.3f}] {words}", file=self._stream, flush=True)
                except (OSError, ValueError):
                    self._quiet = True

    def __rich__(self) -> RenderableType:
        with self._lock:
            return draw(self._state, time.monotonic() - self._clock_offset)

    def __enter__(self) -> LiveView:
        if not self._plain and not self._quiet:
            # Transient, because the report that follows repeats all of it.
            self._live = Live(self, console=self._console, refresh_per_second=REDRAWS_PER_SECOND, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
