"""The layout of a sequence diagram: its arrows, bands and notes, and their rows on the vertical axis.

The axis is linear in time between events that are close together; a wait longer than a few rows is shortened (and
marked), and labels are kept a row apart. `testbed.diagram.picture` draws what this module computes.
"""

from __future__ import annotations

import bisect
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from testbed.base.errors import BadInput
from testbed.diagram.axis import Axis, Point
from testbed.diagram.trace import Flight, Trace, connection, flights

MAX_ARROWS: Final = 45
"""Largest number of arrows and bands in a picture if no time window is given."""
MIN_RUN: Final = 5
"""Number of consecutive packets of one kind that become a band."""
FLIGHT_ROWS: Final = 1.2
"""Rows that correspond to the median time of flight."""

KINDS: Final = ("request", "retransmission", "response", "nak", "stopped", "resume")


@dataclass(slots=True)
class Arrow:
    """One packet, or a band of `count` similar packets. `layout` fills in the rows."""

    flight: Flight
    kind: str
    """One of KINDS."""
    label: str
    sender: int
    receiver: int
    """Column of the receiver; for a lost packet, of the end that it was sent to."""
    lost: bool
    last: Flight | None = None
    """Last packet of a band."""
    count: int = 1
    rows: list[float] = field(default_factory=list)
    """Rows of sending and reception; for a band, followed by those of its last packet."""

    def times(self) -> list[float]:
        """The times in seconds that `rows` belong to."""
        pair = [when for flight in (self.flight, self.last) if flight is not None for when in _ends(flight)]
        return pair


@dataclass(slots=True)
class Note:
    """An event at one end: a state, a timer, a completion."""

    at: float
    column: int
    text: str
    """The label; if it is empty, only a mark is drawn."""
    kind: str
    """One of state, timer, completion, error."""
    row: float = 0.0

    def put(self, row: float) -> None:
        """Take the row that the axis assigns."""
        self.row = row


@dataclass(slots=True)
class Span:
    """A coloured part of a lifeline, from row `begin` to row `end`; `kind` is a key of `picture.SPANS`."""

    column: int
    kind: str
    begin: float
    end: float


@dataclass(slots=True)
class Layout:
    """Everything to draw, top to bottom, rows from 0 to `height`."""

    columns: list[str]
    qpns: frozenset[int]
    arrows: list[Arrow]
    notes: list[Note]
    spans: list[Span]
    ticks: list[tuple[float, float]]
    """(row, milliseconds after the first packet of the traces)."""
    waits: list[tuple[float, float]]
    """(row, milliseconds) of waits that were shortened."""
    height: float
    left_out: int
    """Number of packets in the traces that are outside the window."""


def _ends(flight: Flight) -> tuple[float, float]:
    received = flight.received_at if flight.received_at is not None else flight.at
    return flight.at, received


def layout(
    traces: Sequence[Trace],
    qpn: int | None = None,
    begin_ms: float | None = None,
    end_ms: float | None = None,
) -> Layout:
    """Lay out the connection of `qpn` (None: the busiest) from `begin_ms` to `end_ms` after its first packet.

    Without a window, the picture has up to MAX_ARROWS arrows around the first unusual packet. Raises BadInput.
    """
    qpns = connection(traces, qpn)
    every = flights(traces, qpns)
    origin = every[0].at
    columns = [trace.name for trace in traces]
    if len(traces) == 1:
        columns.append("peer")
    arrows = _elide([_arrow(flight, traces) for flight in every])
    if begin_ms is None and end_ms is None:
        shown = _interesting(arrows)
    else:
        low = origin + (begin_ms or 0.0) / 1000
        high = origin + end_ms / 1000 if end_ms is not None else float("inf")
        shown = [arrow for arrow in arrows if low <= arrow.flight.at <= high]
        if len(shown) > 4 * MAX_ARROWS:
            raise BadInput(
                f"too many arrows for a picture: {len(shown)}; allowed: up to {4 * MAX_ARROWS}",
                hint="choose a narrower window with --from and --to, in ms after the first packet",
            )
    if not shown:
        last = (every[-1].at - origin) * 1000
        raise BadInput("no packet in this window", hint=f"the packets are between 0 and {last:.3f} ms")
    window = min(arrow.flight.at for arrow in shown), max(max(arrow.times()) for arrow in shown)
    notes = _notes(traces, qpns, *window)
    rows = _axis(shown, notes)
    left_out = sum(arrow.count for arrow in arrows) - sum(arrow.count for arrow in shown)
    return Layout(
        columns, qpns, shown, notes, list(_spans(traces, qpns, rows)), rows.ticks(origin), rows.waits,
        rows.height, left_out,
    )  # fmt: skip


# ---- packets ---------------------------------------------------------------------------------------------------------


def _arrow(flight: Flight, traces: Sequence[Trace]) -> Arrow:
    line = flight.line
    peer = len(traces) if len(traces) == 1 else None
    sender, receiver = flight.sender, flight.receiver
    if sender is None:
        sender = peer if peer is not None else _column_of(traces, line["remote_qpn"], flight.at, receiver)
    if receiver is None:
        receiver = peer if peer is not None else _column_of(traces, line["remote_qpn"], flight.at, sender)
    lost = flight.receiver is None and peer is None
    return Arrow(flight, kind_of(line), label_of(line), sender, receiver, lost)


def _column_of(traces: Sequence[Trace], qpn: int, when: float, other: int | None) -> int:
    """The column in which queue pair `qpn` was last seen before `when`, else the first that is not `other`."""
    best, seen = None, float("-inf")
    for index, trace in enumerate(traces):
        at = bisect.bisect_right([line["t"] for line in trace.lines if line.get("qpn") == qpn], when)
        own = [line for line in trace.lines if line.get("qpn") == qpn][:at]
        if index != other and own and own[-1]["event"] != "gone" and own[-1]["t"] > seen:
            best, seen = index, own[-1]["t"]
    return best if best is not None else next(i for i in range(len(traces) + 1) if i != other)


def kind_of(line: dict[str, Any]) -> str:
    """The kind of a packet, one of KINDS, which determines the colour of its arrow."""
    code = line.get("code", "ACK")
    if line["opcode"] == "RC_RESUME" or line.get("resumed"):
        return "resume"
    if code == "NAK_STOPPED":
        return "stopped"
    if code != "ACK":
        return "nak"
    if "RESPONSE" in line["opcode"] or "ACKNOWLEDGE" in line["opcode"]:
        return "response"
    return "retransmission" if line.get("retransmit") else "request"


def label_of(line: dict[str, Any]) -> str:
    """The label of a packet, such as `SEND_FIRST 1234` or `NAK_STOPPED 7`."""
    name = short_name(line)
    if line.get("resumed"):
        name = "ACK of RESUME"
    if "rnr_ms" in line:
        name += f" {line['rnr_ms']:g} ms"
    return f"{name} {line['psn']}" + (" again" if line.get("retransmit") else "")


def short_name(line: dict[str, Any]) -> str:
    """The opcode without its service; for an ACKNOWLEDGE, the kind of acknowledgement."""
    if line["opcode"] == "RC_ACKNOWLEDGE":
        return str(line["code"])
    name = str(line["opcode"])
    for prefix in ("RC_", "UC_", "UD_", "RDMA_"):
        name = name.removeprefix(prefix)
    return name.replace("_WITH_IMMEDIATE", "_IMM").replace("_WITH_INVALIDATE", "_INV")


def _elide(arrows: Sequence[Arrow]) -> list[Arrow]:
    """Replace runs of at least MIN_RUN packets of one kind from one end by bands."""
    runs: dict[int, list[Arrow]] = {}
    done: list[Arrow] = []

    def end_run(column: int) -> None:
        run = runs.pop(column, [])
        if len(run) < MIN_RUN:
            done.extend(run)
            return
        first, last = run[0], run[-1]
        again = " again" if first.kind == "retransmission" else ""
        what = short_name(first.flight.line)
        label = f"… {len(run)} × {what} {first.flight.line['psn']}–{last.flight.line['psn']}{again}"
        band = Arrow(first.flight, first.kind, label, first.sender, first.receiver, first.lost, last.flight, len(run))
        done.append(band)

    for arrow in arrows:
        for column, others in list(runs.items()):
            # Only a run of MIDDLE packets continues across packets from the other end; for others, joining would hide
            # which packet answers which.
            if column != arrow.sender and "MIDDLE" not in others[-1].flight.line["opcode"]:
                end_run(column)
        run = runs.get(arrow.sender)
        if run and _alike(run[-1], arrow):
            run.append(arrow)
            continue
        end_run(arrow.sender)
        runs[arrow.sender] = [arrow]
    for column in list(runs):
        end_run(column)
    return sorted(done, key=lambda arrow: arrow.flight.at)


def _alike(one: Arrow, other: Arrow) -> bool:
    a, b = one.flight, other.flight
    return (
        one.kind == other.kind
        and one.kind in ("request", "response", "retransmission")
        and (one.receiver, one.lost) == (other.receiver, other.lost)
        and short_name(a.line) == short_name(b.line)
        and 0 < (b.line["psn"] - a.line["psn"] & 0xFFFFFF) < 0x1000
        and b.at - a.at < 0.02
        and not (a.copies or b.copies)
    )


def _interesting(arrows: Sequence[Arrow]) -> list[Arrow]:
    """At most MAX_ARROWS arrows, a third of them before the first unusual one."""
    special = [
        index
        for index, arrow in enumerate(arrows)
        if arrow.lost or arrow.kind in ("stopped", "resume", "nak", "retransmission")
    ]
    first = max(0, (special[0] if special else 0) - MAX_ARROWS // 3)
    return list(arrows[first : first + MAX_ARROWS])


# ---- events at one end -----------------------------------------------------------------------------------------------


def _notes(traces: Sequence[Trace], qpns: frozenset[int], begin: float, end: float) -> list[Note]:
    notes = []
    for column, trace in enumerate(traces):
        before: dict[str, Any] = {}
        for line in trace.lines:
            if line.get("qpn") not in qpns:
                continue
            if line["event"] == "state":
                text = _state_text(before, line)
                before = line
                if text and begin <= line["t"] <= end:
                    notes.append(Note(line["t"], column, text, "state"))
            elif not begin <= line["t"] <= end:
                continue
            elif line["event"] == "timer":
                notes.append(Note(line["t"], column, f"{line['timer']} timer", "timer"))
            elif line["event"] == "completion":
                good = line["status"] == "SUCCESS"
                text = "" if good else line["status"]
                notes.append(Note(line["t"], column, text, "completion" if good else "error"))
            elif line["event"] == "gone":
                notes.append(Note(line["t"], column, "gone", "state"))
    return notes


def _state_text(before: dict[str, Any], now: dict[str, Any]) -> str:
    changes = []
    if now["state"] != before.get("state") and before:
        changes.append(now["state"])
    for name, begins, ends in (
        ("stopped", "Stopped", "resumes"),
        ("paused", "Paused", "continues"),
        ("rnr_wait", "RNR wait", ""),
    ):
        if now[name] and not before.get(name):
            changes.append(begins)
        elif before.get(name) and not now[name] and ends:
            changes.append(ends)
    if changes == ["Stopped"] and not before:
        changes = ["restored, Stopped"]
    if before and now.get("remote_ip") != before.get("remote_ip") and before.get("remote_ip"):
        changes.append(f"peer is at {now.get('remote_ip')}")
    return ", ".join(changes)


def _spans(traces: Sequence[Trace], qpns: frozenset[int], rows: Axis) -> Iterable[Span]:
    for column, trace in enumerate(traces):
        changes: list[tuple[float, str]] = [(float("-inf"), "gone")]  # Absent until its first line.
        for line in trace.lines:
            if line.get("qpn") not in qpns or line["event"] not in ("state", "gone"):
                continue
            kind = "gone" if line["event"] == "gone" else ""
            for name in ("stopped", "paused", "resuming", "rnr_wait"):
                if not kind and line.get(name):
                    kind = name
            changes.append((line["t"], kind))
        for (begin, kind), (end, _) in zip(changes, [*changes[1:], (float("inf"), "")], strict=True):
            top, bottom = rows.at(begin), rows.at(end)
            if kind and bottom > max(top, 0.0):
                yield Span(column, kind, top, bottom)


# ---- rows ------------------------------------------------------------------------------------------------------------


def _axis(arrows: Sequence[Arrow], notes: Sequence[Note]) -> Axis:
    """Assign rows to arrows and notes."""
    flight_times = [b - a for arrow in arrows for a, b in [_ends(arrow.flight)] if b > a]
    points = [Point(note.at, 1, 100 + note.column, bool(note.text), note.put) for note in notes]
    for arrow in arrows:
        times = arrow.times()
        arrow.rows = [0.0] * len(times)
        for index, when in enumerate(times):
            sent = index % 2 == 0
            # At the same time: receptions first, then what they cause, then receptions that were not seen.
            order = 1 if sent else 0 if when > times[index - 1] else 2
            side = arrow.sender if sent else arrow.receiver
            points.append(Point(when, order, side, index == 0, partial(arrow.rows.__setitem__, index)))
    return Axis(points, FLIGHT_ROWS / (statistics.median(flight_times) if flight_times else 1e-4))
