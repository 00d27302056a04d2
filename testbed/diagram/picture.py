"""Drawing a sequence diagram as PNG, SVG or PDF: lifelines, slanted arrows, bands, and states beside them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Polygon
from PIL import Image

from testbed.diagram.layout import Arrow, Layout, Note
from testbed.view.plots import PALETTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION, YELLOW, BLACK, GREY = PALETTE
ROW_INCHES: Final = 0.165
COLUMN_INCHES: Final = 4.3
MARGIN_INCHES: Final = 1.75
FONT: Final = 6.5
DPI: Final = 100

STYLES: Final[dict[str, tuple[str, str, str]]] = {
    "request": (BLUE, "-", "request"),
    "retransmission": (BLUE, "--", "retransmission"),
    "response": (GREEN, "-", "response, ACK"),
    "nak": (ORANGE, "-", "NAK, RNR NAK"),
    "stopped": (VERMILION, "-", "NAK_STOPPED"),
    "resume": (PURPLE, "-", "RESUME and its ACK"),
}
"""Kind of arrow → colour, line style, legend."""
SPANS: Final = {
    "stopped": (VERMILION, "Stopped"),
    "paused": (ORANGE, "Paused"),
    "resuming": (PURPLE, "RESUME unanswered"),
    "rnr_wait": (YELLOW, "waiting after an RNR NAK"),
    "gone": ("white", ""),
}
"""Kind of span → colour, legend."""


def draw(layout: Layout, path: Path, title: str) -> Path:
    """Write the picture in the format of `path`'s suffix (.png, .svg or .pdf). Raises OSError."""
    columns = len(layout.columns)
    width = (columns - 1) * COLUMN_INCHES + 2 * MARGIN_INCHES
    height = layout.height * ROW_INCHES + 1.6
    figure = Figure(figsize=(width, height), dpi=DPI)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(-MARGIN_INCHES / COLUMN_INCHES, columns - 1 + MARGIN_INCHES / COLUMN_INCHES)
    axes.set_ylim(layout.height + 0.75 / ROW_INCHES, -0.85 / ROW_INCHES)
    _lifelines(axes, layout)
    for arrow in layout.arrows:
        _arrow(axes, arrow)
    for note in layout.notes:
        _note(axes, note, columns)
    _axis(axes, layout)
    left, top = -MARGIN_INCHES / COLUMN_INCHES + 0.03, -0.68 / ROW_INCHES
    axes.text(left, top, title, fontsize=9, weight="bold", va="center")
    if layout.left_out:
        axes.text(
            left, top + 1.1, f"{layout.left_out:,} more packets outside this window", fontsize=FONT, color="0.35",
            va="center",
        )  # fmt: skip
    handles = _legend(layout)
    figure.legend(
        handles=handles, loc="lower center", ncols=min(len(handles), 4 * columns - 3), frameon=False, fontsize=7,
        handlelength=2.6,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        # A line drawing needs few colours, and with a palette the file is a third of the size.
        whole = io.BytesIO()
        figure.savefig(whole, format="png")
        Image.open(whole).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    else:
        figure.savefig(path)
    return path


def _lifelines(axes: Axes, layout: Layout) -> None:
    for column, name in enumerate(layout.columns):
        axes.plot([column, column], [-0.5, layout.height], color="0.6", linewidth=1.2, zorder=1)
        axes.text(column, -1.1, name, ha="center", va="center", fontsize=9, weight="bold")
    for span in layout.spans:
        colour, _ = SPANS[span.kind]
        axes.plot(
            [span.column, span.column], [span.begin, span.end], color=colour, linewidth=5, solid_capstyle="butt",
            zorder=2,
        )  # fmt: skip
        if span.kind == "gone":
            axes.plot([span.column, span.column], [span.begin, span.end], color="0.6", linewidth=0.8, linestyle=":")


def _arrow(axes: Axes, arrow: Arrow) -> None:
    colour, line, _ = STYLES[arrow.kind]
    a, b = arrow.sender, arrow.receiver
    top, bottom = arrow.rows[0], arrow.rows[1]
    if arrow.count > 1:
        corners: list[tuple[float, float]] = [(a, top), (a, arrow.rows[2]), (b, arrow.rows[3]), (b, bottom)]
        if arrow.lost:
            corners = [(a, top), (a, arrow.rows[2]), (a + 0.55 * (b - a), arrow.rows[2] + 0.7)]
        hatch = "///" if arrow.kind == "retransmission" else None
        axes.add_patch(
            Polygon(corners, closed=True, facecolor=colour, alpha=0.22, edgecolor=colour, linewidth=0.6, hatch=hatch)
        )
        if arrow.lost:
            axes.plot(*corners[2], marker="x", color=BLACK, markersize=6, zorder=6)
    else:
        x, y = float(b), bottom
        if arrow.lost:
            x, y = a + 0.55 * (b - a), top + 0.7
            axes.plot(x, y, marker="x", color=BLACK, markersize=6, markeredgewidth=1.6, zorder=6)
        style: dict[str, Any] = {"arrowstyle": "-" if arrow.lost else "-|>", "color": colour, "linestyle": line}
        style |= {"shrinkA": 0, "shrinkB": 0, "linewidth": 1.1, "mutation_scale": 8}
        axes.annotate("", (x, y), xytext=(a, top), arrowprops=style, zorder=4)
        for copy in arrow.flight.copies[:1]:
            del copy
            axes.text((a + b) / 2, (top + bottom) / 2, "received twice", fontsize=FONT - 1, color="0.3", ha="center")
    side = 1 if b > a else -1
    if arrow.count > 1:
        top += 0.3  # inside the band
    # Slightly lower where the line slopes down, so that the line does not cross its label.
    slope = min(max(bottom - arrow.rows[0], 0.0), 2.0)
    axes.text(
        a + 0.02 * side, top - 0.08 + 0.03 * slope, arrow.label, fontsize=FONT, color=colour, zorder=5,
        ha="left" if side > 0 else "right", va="bottom",
        bbox={"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 0.3},
    )  # fmt: skip


def _note(axes: Axes, note: Note, columns: int) -> None:
    outward = -1 if note.column == 0 else 1
    if note.kind == "completion":
        axes.plot(note.column + 0.016 * outward, note.row, marker="o", color=GREEN, markersize=2.6, zorder=5)
        return
    colour = {"error": VERMILION, "timer": "0.25", "state": BLACK}[note.kind]
    axes.plot(note.column + 0.01 * outward, note.row, marker="_", color=colour, markersize=5, zorder=5)
    between = 0 < note.column < columns - 1
    axes.text(
        note.column + 0.025 * outward, note.row, note.text, fontsize=FONT, color=colour, va="center", zorder=6,
        ha="right" if outward < 0 else "left", style="italic" if note.kind == "timer" else "normal",
        weight="bold" if note.kind != "timer" else "normal",
        bbox={"facecolor": "white", "alpha": 0.85 if between else 0.0, "edgecolor": "none", "pad": 0.3},
    )  # fmt: skip


def _axis(axes: Axes, layout: Layout) -> None:
    """Draw the times at the left edge, and mark shortened waits on every lifeline."""
    left = -MARGIN_INCHES / COLUMN_INCHES + 0.03
    axes.text(left, -1.1, "ms", fontsize=7, color="0.35", va="center")
    for row, milliseconds in layout.ticks:
        axes.text(left, row, f"{milliseconds:,.3f}", fontsize=FONT, color="0.35", va="center", family="monospace")
    for row, milliseconds in layout.waits:
        axes.text(left, row, f"⋮ {milliseconds:,.1f} ms", fontsize=FONT, color="0.35", va="center", style="italic")
        for column in range(len(layout.columns)):
            axes.plot(column, row, marker=(2, 0, -60), color="white", markersize=9, markeredgewidth=3, zorder=3)
            for shift in (-0.14, 0.14):
                axes.plot(column, row + shift, marker=(2, 0, -60), color="0.5", markersize=7, zorder=3)


def _legend(layout: Layout) -> list[Any]:
    """The legend, limited to what the picture contains."""
    kinds = {arrow.kind for arrow in layout.arrows}
    found: list[Any] = [
        Line2D([], [], color=colour, dashes=(3, 2) if line == "--" else (None, None), label=label)
        for kind, (colour, line, label) in STYLES.items()
        if kind in kinds
    ]
    if any(arrow.lost for arrow in layout.arrows):
        found.append(Line2D([], [], color=BLACK, marker="x", linestyle="", label="lost"))
    if any(arrow.count > 1 for arrow in layout.arrows):
        found.append(Patch(facecolor=BLUE, alpha=0.22, edgecolor=BLUE, label="several similar packets"))
    if any(note.kind == "completion" for note in layout.notes):
        found.append(Line2D([], [], color=GREEN, marker="o", linestyle="", markersize=3, label="completion"))
    spans = {span.kind for span in layout.spans}
    found += [
        Line2D([], [], color=colour, linewidth=5, label=label)
        for kind, (colour, label) in SPANS.items()
        if kind in spans and label
    ]
    return found
