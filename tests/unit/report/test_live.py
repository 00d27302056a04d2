"""The live view, fed with events: what it shows on a terminal, and the plain lines everywhere else."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import pytest
from rich.console import Console

from testbed.record.events import EVENTS, STAGES, check
from testbed.record.summary import PHASES
from testbed.view.live import LiveView, RunState, draw, line

STORY: list[dict[str, Any]] = [
    {"t": 0.0, "event": "run_started", "topology": "migrate_pair", "seed": 1},
    {"t": 0.1, "event": "stage", "name": "network", "detail": "3 hosts, 1 switch"},
    {"t": 0.2, "event": "limit", "wanted": "OVS kernel datapath", "got": "userspace", "why": "no module [x]"},
    {"t": 0.5, "event": "nic_ready", "host": "h1"},
    {"t": 0.5, "event": "nic_ready", "host": "h2"},
    {"t": 0.9, "event": "stage", "name": "running"},
    {"t": 1.0, "event": "app_started", "app": "server", "host": "h2", "pid": 77},
    {"t": 1.0, "event": "counters", "host": "h1", "counters": {"tx_packets": 0, "tx_bytes": 0}},
    {"t": 2.0, "event": "counters", "host": "h1", "counters": {"tx_packets": 1500, "tx_bytes": 12_500_000}},
    {"t": 3.0, "event": "migration_started", "index": 0, "app": "server", "from_host": "h2", "to_host": "h3"},
    {"t": 3.0, "event": "phase_started", "index": 0, "phase": "prepare"},
    {"t": 3.1, "event": "phase_finished", "index": 0, "phase": "prepare", "ms": 61.3},
    {"t": 3.1, "event": "phase_started", "index": 0, "phase": "freeze"},
]
ENDING: list[dict[str, Any]] = [
    {"t": 3.5, "event": "app_moved", "app": "server", "from_host": "h2", "to_host": "h3"},
    {"t": 3.6, "event": "migration_finished", "index": 0, "ok": True, "blackout_ms": 412.7, "partner_gap_ms": 415.2},
    {"t": 9.0, "event": "app_exited", "app": "server", "host": "h3", "code": 0},
    {"t": 9.9, "event": "run_finished", "ok": True},
]


def seen(story: list[dict[str, Any]], width: int = 80) -> str:
    state = RunState()
    for event in story:
        check(event["event"], {key: value for key, value in event.items() if key not in ("t", "event")})
        state.take(event)
    console = Console(file=io.StringIO(), width=width, markup=False)
    console.print(draw(state, 3.2))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def row(text: str, start: str) -> str:
    return " ".join(next(line for line in text.splitlines() if line.strip().startswith(start)).split())


def test_during_a_migration() -> None:
    text = seen(STORY)
    assert row(text, "server") == "server h2 runs"
    assert row(text, "h1") == "h1 1,500 – 11.9 MiB – 100 Mbit/s 0 bit/s"
    assert row(text, "h2") == "h2 – – – – – –"
    assert "✓ prepare 61.3 ms" in text and "▸ freeze …" in text and "· commit" in text
    assert "not available here: OVS kernel datapath; instead: userspace (no module [x])" in text
    assert max(len(line) for line in text.splitlines()) <= 80


def test_after_it() -> None:
    text = seen(STORY + ENDING)
    assert row(text, "server") == "server h3 code 0"
    assert "done, blackout 413 ms, at the peer 415 ms" in text


def test_a_rollback_is_said() -> None:
    end = {"t": 3.6, "event": "migration_finished", "index": 0, "ok": False, "rolled_back": True, "error": "disk full"}
    assert "rolled back, continues at the source: disk full" in seen([*STORY, end])


def test_counters_that_start_again_give_no_negative_rate() -> None:
    restart = {"t": 3.2, "event": "counters", "host": "h1", "counters": {"tx_packets": 1, "tx_bytes": 100}}
    assert row(seen([*STORY, restart]), "h1").endswith("0 bit/s 0 bit/s")


def test_phases_of_a_migration_never_started_are_ignored() -> None:
    """A listener that joined late must not fail."""
    seen([{"t": 3.0, "event": "phase_started", "index": 4, "phase": "freeze"}])


def test_plain_lines_when_not_a_terminal() -> None:
    stream = io.StringIO()
    with LiveView(stream) as view:
        for event in STORY + ENDING:
            view.on_event(event)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "[    0.000] migrate_pair, seed 1"
    assert "[    3.100] migration 1: prepare 61.3 ms" in lines
    assert "[    3.600] migration 1: done, blackout 413 ms, at the peer 415 ms" in lines
    assert "\x1b" not in stream.getvalue()
    assert not any("counters" in text for text in lines), "periodic counters would drown a log"


def test_quiet_says_nothing() -> None:
    stream = io.StringIO()
    with LiveView(stream, quiet=True) as view:
        for event in STORY:
            view.on_event(event)
    assert stream.getvalue() == ""


def test_a_reader_that_went_away_does_not_end_the_run() -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    with LiveView(Broken(), plain=True) as view:
        for event in STORY:
            view.on_event(event)


def test_on_a_terminal_it_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Redrawn in place and wiped at the end, standard output untouched."""
    monkeypatch.setenv("TERM", "xterm-256color")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with LiveView(stream) as view:
        for event in STORY:
            view.on_event(event)
    output = stream.getvalue()
    assert "migrate_pair" in output
    assert output.rstrip().endswith("\x1b[2K") or "\x1b[1A\x1b[2K" in output, "the view is erased"


@pytest.mark.parametrize("name", EVENTS)
def test_every_event_can_be_shown(name: str) -> None:
    """With only its required fields, an event must not break the view."""
    values: Mapping[str, Any] = {
        "index": 0,
        "ms": 1.0,
        "ok": False,
        "counters": {},
        "phase": PHASES[0],
        "name": next(iter(STAGES)),
    }
    event = {"t": 1.0, "event": name, **{field: values.get(field, "x") for field in EVENTS[name][0]}}
    check(name, {key: value for key, value in event.items() if key not in ("t", "event")})
    RunState().take(event)
    assert line(event) is None or isinstance(line(event), str)
