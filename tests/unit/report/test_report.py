"""The terminal report of a fixed summary, as text: a change of the report is a diff of the golden file in review.

`python -m tests.unit.report.test_report` writes the golden files again.
"""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest

from testbed.record.folder import load_summary
from testbed.record.stats import estimate
from testbed.record.summary import Problem, RunReference, Summary
from testbed.view.report import print_report

HERE = Path(__file__).parent


def migrated() -> Summary:
    return load_summary(HERE / "migrated.json")


def rolled_back() -> Summary:
    """The same run, had the restore failed: the program continues at the source."""
    summary = migrated()
    summary.ok = False
    migration = summary.migrations[0]
    migration.ok, migration.rolled_back = False, True
    migration.error = "criu restore ended with status 1: no space left on device"
    migration.hint = "see logs/h3.restore.log; free space in /var/lib/migros-testbed"
    for phase in ("reroute", "thaw", "commit"):
        del migration.phases_ms[phase], migration.phases_at_ms[phase]
    migration.resumes = 1
    summary.apps[0].final_host = "h2"
    summary.flow_changes = []
    summary.problems = [
        Problem(where="migrations[0].restore_process", error=migration.error, hint=migration.hint),
    ]
    return summary


def repeated() -> Summary:
    """Three runs in one summary."""
    summary = migrated()
    summary.apps, summary.hosts, summary.flow_changes = [], [], []
    summary.repeats = [RunReference(path=f"run-{i}", ok=True, seed=i) for i in (1, 2, 3)]
    summary.statistics = {
        "migrations[0].blackout_ms": estimate([412.7, 398.2, 441.0]),
        "migrations[0].partner_gap_ms": estimate([415.2, 400.9, 444.1]),
        "migrations[0].phases_ms.restore_process": estimate([178.0, 170.3, 190.2]),
    }
    return summary


CASES = {"migrated": migrated, "rolled_back": rolled_back, "repeated": repeated}


def rendered(summary: Summary, width: int = 80) -> str:
    stream = io.StringIO()
    print_report(summary, stream, width=width)
    return stream.getvalue()


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str) -> None:
    assert rendered(CASES[name]()) == (HERE / f"{name}.txt").read_text()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("width", [80, 100, 132])
def test_no_line_is_wider_than_the_terminal(name: str, width: int) -> None:
    assert max(len(line) for line in rendered(CASES[name](), width).splitlines()) <= width


def test_a_pipe_gets_no_escape_codes_and_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    stream = io.StringIO()
    print_report(migrated(), stream)
    assert "\x1b" not in stream.getvalue()
    assert max(len(line) for line in stream.getvalue().splitlines()) <= 80


def test_forced_colour_says_the_same_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    coloured = rendered(migrated())
    assert "\x1b[" in coloured
    plain = "\n".join(line.rstrip() for line in re.sub(r"\x1b\[[0-9;]*m", "", coloured).splitlines())
    assert plain + "\n" == (HERE / "migrated.txt").read_text()


def test_an_ascii_terminal_can_show_the_bars() -> None:
    """Output to a stream that knows ASCII only must not raise, and the timeline must still be visible."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", errors="replace")
    print_report(migrated(), stream, width=80)
    stream.flush()
    row = next(line for line in raw.getvalue().decode("ascii").splitlines() if line.startswith("  restore_process"))
    assert "####" in row


def test_phases_without_starts_are_laid_end_to_end() -> None:
    """A run that did not note when phases began still gets bars that do not all start at zero."""
    summary = migrated()
    summary.migrations[0].phases_at_ms = {}
    rows = {line.split()[0]: line for line in rendered(summary).splitlines() if line.startswith("  ") and line.split()}
    at = {phase: float(rows[phase].split()[1]) for phase in ("prepare", "freeze", "stop", "transfer")}
    assert at["prepare"] == 0 and at["freeze"] == 61.3 and at["stop"] == 99.7
    assert at["transfer"] == pytest.approx(99.7 + 1.92 + 3.11 + 74.2, abs=0.1)


def test_an_empty_failed_run_still_says_that_it_failed() -> None:
    """A run that broke before anything existed has nothing but problems: they must be shown."""
    summary = Summary(ok=False, topology="t", run_id="r", started="2026-11-22T20:45:12Z", duration_s=0.1, seed=1)
    summary.problems = [Problem(where="h1", error="no NIC", hint="look at the log")]
    text = rendered(summary)
    assert "FAILED" in text and "no NIC" in text and "hint: look at the log" in text


def test_words_of_others_are_not_markup() -> None:
    """Errors and program output may contain brackets: shown letter for letter."""
    summary = migrated()
    summary.problems = [Problem(where="apps[x]", error="[red]open[/red] :warning: [errno 2] /etc", hint="[/bold]")]
    text = rendered(summary)
    assert "[red]open[/red] :warning: [errno 2] /etc" in text and "hint: [/bold]" in text and "apps[x]" in text


if __name__ == "__main__":
    for name, make in CASES.items():
        (HERE / f"{name}.txt").write_text(rendered(make()))
