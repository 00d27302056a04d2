"""Plots of results: drawn without a display, readable by colour-blind readers and in greyscale, with axes from zero.

Every plot states its number of samples and shows the 95 % interval of each median. Series differ in marker and hatch as
well as in colour (the Okabe–Ito palette). The functions take numbers and write one PNG; they do not read files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from testbed.record.stats import Estimate
from testbed.record.summary import BLACKOUT_PHASES, PHASES, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000", "#999999")
"""The colours of Okabe and Ito, "Color Universal Design" (2008), and a grey."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<")
HATCHES = ("", "//", "..", "xx", "\\\\", "--", "++", "oo", "||")
WIDTH, HEIGHT, DPI = 8.0, 4.8, 120


def _axes(title: str, xlabel: str, ylabel: str, *, height: float = HEIGHT) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11, pad=10)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    return figure, axes


def _save(figure: Figure, path: Path, note: str = "") -> Path:
    if note:
        figure.supxlabel(note, fontsize=8, color="0.35", x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _errors(estimates: Sequence[Estimate]) -> list[list[float]] | None:
    """Distances from each median to the ends of its interval, for errorbar; None if no point has an interval."""
    if all(e.low is None or e.high is None for e in estimates):
        return None
    low = [e.median - (e.median if e.low is None else e.low) for e in estimates]
    high = [(e.median if e.high is None else e.high) - e.median for e in estimates]
    return [low, high]


def _samples(estimates: Sequence[Estimate]) -> str:
    counts = sorted({e.n for e in estimates})
    number = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]}–{counts[-1]}"
    whiskers = "whiskers: 95 % bootstrap interval" if counts[-1] > 1 else "one sample each: no interval"
    runs = "run" if number == "1" else "runs"
    return f"median of n = {number} {runs} per point, {whiskers}"


def lines(
    path: Path,
    series: Mapping[str, Mapping[float, Estimate]],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    log_x: bool = False,
    tick: Any = None,
    note: str = "",
) -> Path:
    """Plot medians over x, one line per series (label → {x: estimate}), y from 0. `tick(x)` formats an x value."""
    figure, axes = _axes(title, xlabel, ylabel)
    every = [estimate for points in series.values() for estimate in points.values()]
    ticks = sorted({x for points in series.values() for x in points})
    place = {x: float(i) for i, x in enumerate(ticks)} if log_x else {x: x for x in ticks}
    for index, (label, points) in enumerate(series.items()):
        # Evenly spaced points of several series would cover each other's intervals.
        aside = 0.04 * (index - (len(series) - 1) / 2) if log_x else 0.0
        _series(axes, index, label, {place[x] + aside: points[x] for x in sorted(points)})
    axes.set_xticks([place[x] for x in ticks], [tick(x) if tick else f"{x:g}" for x in ticks])
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="0.9")
    if len(series) > 1:
        axes.legend(frameon=False)
    return _save(figure, path, "; ".join(part for part in (_samples(every), note) if part))


def _series(axes: Axes, index: int, label: str, points: Mapping[float, Estimate]) -> None:
    """Plot one series of `lines` (place on the x axis → estimate) in the colour and marker of its number."""
    estimates = list(points.values())
    axes.errorbar(
        list(points),
        [e.median for e in estimates],
        yerr=_errors(estimates),
        label=label,
        color=PALETTE[index % len(PALETTE)],
        marker=MARKERS[index % len(MARKERS)],
        capsize=3,
        linewidth=1.5,
    )


def stacked_phases(
    path: Path,
    bars: Mapping[str, Mapping[str, Estimate]],
    *,
    title: str,
    whole: Mapping[str, Estimate] | None = None,
    note: str = "",
) -> Path:
    """Plot one bar per configuration (label → phase → estimate in ms) with the phases of the blackout stacked.

    dump_nic overlaps dump_process and is left out of the stack. `whole` marks the measured blackout of each bar.
    """
    figure, axes = _axes(title, "", "ms", height=HEIGHT + 0.6)
    stacked = [phase for phase in BLACKOUT_PHASES if phase != "dump_nic"]
    labels = list(bars)
    base = [0.0] * len(labels)
    for index, phase in enumerate(stacked):
        heights = [bars[label][phase].median if phase in bars[label] else 0.0 for label in labels]
        if not any(heights):
            continue
        axes.bar(
            range(len(labels)), heights, 0.6, bottom=base, label=phase, color=PALETTE[index % len(PALETTE)],
            hatch=HATCHES[index % len(HATCHES)], edgecolor="white", linewidth=0.5,
        )  # fmt: skip
        base = [low + height for low, height in zip(base, heights, strict=True)]
    if whole:
        at = [i for i, label in enumerate(labels) if label in whole]
        estimates = [whole[labels[i]] for i in at]
        axes.errorbar(
            at, [e.median for e in estimates], yerr=_errors(estimates), fmt="_", color="black", markersize=26,
            markeredgewidth=2, capsize=3, label="measured blackout",
        )  # fmt: skip
    axes.set_xticks(range(len(labels)), labels)
    axes.set_ylim(bottom=0)
    handles, names = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], names[::-1], frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    every = [estimate for phases in bars.values() for estimate in phases.values()]
    return _save(figure, path, "; ".join(part for part in (_samples(every), note) if part))


def ratios(path: Path, found: Mapping[str, Estimate], *, title: str, ylabel: str, note: str = "") -> Path:
    """Plot one bar per test with the ratio's interval and every pair as a dot; y from 0, with a line at 1."""
    figure, axes = _axes(title, "", ylabel)
    estimates = list(found.values())
    axes.bar(range(len(found)), [e.median for e in estimates], 0.6, color=PALETTE[4], edgecolor=PALETTE[0])
    errors = _errors(estimates)
    if errors is not None:
        axes.errorbar(
            range(len(found)), [e.median for e in estimates], yerr=errors, fmt="none", color="black", capsize=5
        )
    for index, found_one in enumerate(estimates):
        spread = [index + 0.22 + 0.012 * (i % 5) for i in range(found_one.n)]
        axes.plot(spread, found_one.values, ".", color="0.35", markersize=4)
        # At the foot of the bar, clear of whiskers and dots.
        axes.annotate(
            f"{found_one.median:.3f}", (index, 0), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=9
        )
    axes.axhline(1.0, color=PALETTE[5], linewidth=1, linestyle="--")
    axes.set_xticks(range(len(found)), list(found))
    axes.set_ylim(bottom=0)
    sizes = sorted({e.n for e in estimates})
    count = f"n = {sizes[0]}" if len(sizes) == 1 else f"n = {sizes[0]}–{sizes[-1]}"
    base = f"median of {count} pairs per test, one dot each; whiskers: 95 % bootstrap interval"
    return _save(figure, path, "; ".join(part for part in (base, note) if part))


def run_timeline(path: Path, summary: Summary) -> Path | None:
    """Plot the phases of a run's migrations over time, with the gaps that both ends saw; None without a migration."""
    shown = [migration for migration in summary.migrations if migration.phases_ms]
    if not shown:
        return None
    rows = sum(len(migration.phases_ms) + 1 for migration in shown)
    title = f"{summary.topology}: migrations of run {summary.run_id}"
    figure, axes = _axes(title, "ms after the start of the migration", "", height=1.2 + 0.26 * rows)
    row = 0
    names: list[str] = []
    for migration in shown:
        names.append(f"{migration.app} {migration.from_host} → {migration.to_host}")
        gaps = []
        if migration.blackout_ms is not None:
            gaps.append(f"blackout {migration.blackout_ms:.0f} ms")
        if migration.partner_gap_ms is not None:
            gaps.append(f"gap at the peer {migration.partner_gap_ms:.0f} ms")
        if not migration.ok:
            gaps.append("rolled back" if migration.rolled_back else "failed")
        axes.annotate(" · ".join(gaps), (0, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
        moment = 0.0
        for phase in PHASES:
            if phase not in migration.phases_ms:
                continue
            row += 1
            names.append(phase)
            start, length = migration.phases_at_ms.get(phase, moment), migration.phases_ms[phase]
            moment = start + length
            frozen = phase in BLACKOUT_PHASES
            axes.barh(
                row, length, 0.7, left=start, color=PALETTE[0] if frozen else "0.8", hatch="" if frozen else "//",
                edgecolor="white",
            )  # fmt: skip
            axes.annotate(
                f"{length:.1f}", (moment, row), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7
            )
        row += 1
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.margins(x=0.08)
    axes.grid(axis="x", color="0.9")
    return _save(figure, path, "solid: the program is frozen; hatched: it runs")
