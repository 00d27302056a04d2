"""Pictures: they exist without a display, begin at zero, and tell series apart by more than colour."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from testbed.record.folder import load_summary
from testbed.record.stats import Estimate, estimate
from testbed.record.summary import PHASES
from testbed.view import plots

SUMMARY = Path(__file__).parent / "migrated.json"
SIZES = (64, 4096, 1 << 20)


def some(middle: float, n: int = 5) -> Estimate:
    return estimate(np.random.default_rng(int(middle)).normal(middle, middle / 20, n).tolist())


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that a test's plots save, beside saving it."""
    kept: list[Figure] = []
    save = plots._save

    def keep(figure: Figure, path: Path, note: str = "") -> Path:
        kept.append(figure)
        return save(figure, path, note)

    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setattr(plots, "_save", keep)
    return kept


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_lines(tmp_path: Path, figures: list[Figure]) -> None:
    series = {f"{q} QPs": {float(size): some(300 + q) for size in SIZES} for q in (1, 4, 16)}
    path = plots.lines(tmp_path / "new" / "a.png", series, title="t", xlabel="x", ylabel="ms", log_x=True)
    assert is_png(path)
    (axes,) = figures[0].axes
    assert axes.get_ylim()[0] == 0
    markers = {container.lines[0].get_marker() for container in axes.containers}  # type: ignore[attr-defined]
    assert len(markers) == len(series)
    assert figures[0]._supxlabel.get_text().startswith("median of n = 5 runs per point")  # type: ignore[attr-defined]


def test_one_sample_has_no_whiskers_and_says_so(tmp_path: Path, figures: list[Figure]) -> None:
    plots.lines(tmp_path / "a.png", {"x": {1.0: estimate([3.0])}}, title="t", xlabel="x", ylabel="ms")
    assert "no interval" in figures[0]._supxlabel.get_text()  # type: ignore[attr-defined]


def test_stack_has_a_colour_for_each_phase(tmp_path: Path, figures: list[Figure]) -> None:
    bars = {f"{q} QP": {phase: some(10 + q) for phase in PHASES} for q in (1, 4)}
    assert is_png(plots.stacked_phases(tmp_path / "b.png", bars, title="t", whole={"1 QP": some(99)}))
    (axes,) = figures[0].axes
    assert axes.get_ylim()[0] == 0
    styles = {(patch.get_facecolor(), patch.get_hatch()) for patch in axes.patches}
    assert len(styles) == len(axes.patches) / len(bars) == 9, "twelve phases less prepare, commit and dump_nic"
    tops = [sum(patch.get_height() for patch in axes.patches[i::2]) for i in (0, 1)]
    assert tops == [pytest.approx(9 * some(11).median), pytest.approx(9 * some(14).median)]


def test_ratios_show_every_pair(tmp_path: Path, figures: list[Figure]) -> None:
    assert is_png(plots.ratios(tmp_path / "c.png", {"lat": some(1, 7), "bw": some(1, 7)}, title="t", ylabel="ratio"))
    (axes,) = figures[0].axes
    assert axes.get_ylim()[0] == 0
    dots = [line for line in axes.lines if line.get_marker() == "."]
    assert [len(line.get_xdata()) for line in dots] == [7, 7]  # type: ignore[arg-type]


def test_timeline(tmp_path: Path, figures: list[Figure]) -> None:
    summary = load_summary(SUMMARY)
    path = plots.run_timeline(tmp_path / "d.png", summary)
    assert path is not None and is_png(path)
    (axes,) = figures[0].axes
    assert axes.get_xlim()[0] == 0
    assert len(axes.patches) == len(PHASES)
    summary.migrations = []
    assert plots.run_timeline(tmp_path / "none.png", summary) is None
    assert not (tmp_path / "none.png").exists()
