"""Reading traces of queue pairs (docs/trace.md), and matching each sent packet with its reception."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from testbed.base.errors import BadInput

VERSION: Final = 1
Line = dict[str, Any]
"""One line of a trace: `t`, `event`, and the other fields that docs/trace.md describes."""


@dataclass(slots=True)
class Trace:
    """One trace file, recorded by one NIC. `lines` are sorted by time."""

    path: Path
    start: Line
    """The first line, with version, addresses, and the queue pairs that were requested."""
    lines: list[Line] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The file's name without its suffix."""
        return self.path.stem

    def packets(self, direction: str | None = None, qpn: int | None = None) -> list[Line]:
        """The packet lines; optionally those of one direction (`sent` or `received`) and of one queue pair."""
        return [
            line
            for line in self.lines
            if line["event"] == "packet" and direction in (None, line["direction"]) and qpn in (None, line["qpn"])
        ]

    def qpns(self) -> list[int]:
        """The queue pairs of this end that sent or received packets, the busiest first."""
        count: dict[int, int] = defaultdict(int)
        for line in self.packets():
            count[line["qpn"]] += 1
        return sorted(count, key=lambda qpn: (-count[qpn], qpn))


def read(path: Path) -> Trace:
    """Read a trace. A truncated last line (the NIC was killed) is ignored. Raises BadInput."""
    try:
        texts = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not a text file"
        raise BadInput(f"cannot read the trace: {reason}", where=str(path)) from error
    lines: list[Line] = []
    for number, text in enumerate(texts, start=1):
        if not text:
            continue
        try:
            line = json.loads(text)
        except ValueError as error:
            if number == len(texts):
                break  # It has no newline, so it is truncated.
            raise BadInput(f"line {number} is not JSON: {error}", where=str(path)) from error
        if not isinstance(line, dict) or "event" not in line or not isinstance(line.get("t"), int | float):
            raise BadInput(
                f"line {number} is not a trace event", where=str(path), hint="docs/trace.md describes the fields"
            )
        lines.append(line)
    if not lines or lines[0]["event"] != "start":
        raise BadInput(
            "not a trace of queue pairs", where=str(path), hint="the first line of a trace must be a start event"
        )
    if lines[0].get("version") != VERSION:
        raise BadInput(
            f"unsupported version {lines[0].get('version')!r} of the format; allowed: {VERSION}",
            where=str(path),
            hint="record the trace with this version of the testbed",
        )
    return Trace(path, lines[0], sorted(lines[1:], key=lambda line: line["t"]))


@dataclass(slots=True)
class Flight:
    """One packet between two ends."""

    line: Line
    """The line of its sending, or of its reception if its sending was not traced."""
    sender: int | None
    """Index of the trace that has its sending; None if there is none."""
    receiver: int | None = None
    """Index of the trace that has its reception; None if there is none."""
    sent_at: float | None = None
    received_at: float | None = None
    copies: list[float] = field(default_factory=list)
    """Times at which duplicates of it were received."""
    counted: list[str] = field(default_factory=list)
    """Counters that the receiver incremented for it."""

    @property
    def at(self) -> float:
        """Time of its sending, or of its reception if its sending was not traced."""
        when = self.sent_at if self.sent_at is not None else self.received_at
        assert when is not None
        return when


def flights(traces: Sequence[Trace], qpns: frozenset[int]) -> list[Flight]:
    """Every packet between the queue pairs `qpns` in the order of sending, matched with its reception.

    A packet is recognised by opcode, PSN and IPv4 identification; IPv6 has none, so there the last one sent matches.
    """
    found: list[Flight] = []
    waiting: dict[tuple[Any, ...], list[Flight]] = defaultdict(list)
    for index, line in _merged(traces, qpns):
        key = (line["opcode"], line["psn"], line.get("ip_id"), line.get("syndrome"))
        if line["direction"] == "sent":
            flight = Flight(line, index, sent_at=line["t"])
            found.append(flight)
            waiting[line["remote_qpn"], *key].append(flight)
            continue
        # Two ends at one NIC differ in their QPNs, whereas two NICs may use the same QPN.
        candidates = [flight for flight in waiting[line["qpn"], *key] if flight.sender != index or len(qpns) == 2]
        open_ones = [flight for flight in candidates if flight.received_at is None]
        if open_ones:
            flight = open_ones[-1]
            flight.receiver, flight.received_at = index, line["t"]
            flight.counted = line.get("counted", [])
        elif candidates:
            candidates[-1].copies.append(line["t"])
        else:
            found.append(Flight(line, None, index, received_at=line["t"], counted=line.get("counted", [])))
    # At the same time, receptions come before sendings, which may be their answers.
    return sorted(found, key=lambda flight: (flight.at, flight.sender is not None))


def _merged(traces: Sequence[Trace], qpns: frozenset[int]) -> Iterator[tuple[int, Line]]:
    """(index of the trace, line) of all packets by time; at the same time, sent ones come first."""
    every = [
        (line["t"], line["direction"] != "sent", index, line)
        for index, trace in enumerate(traces)
        for line in trace.packets()
        if line["qpn"] in qpns
    ]
    every.sort(key=lambda item: item[:3])
    for _, _, index, line in every:
        yield index, line


def connection(traces: Sequence[Trace], qpn: int | None = None) -> frozenset[int]:
    """The two QPNs of `qpn`'s connection (None: of the busiest connection). Raises BadInput if there is none."""
    count: dict[frozenset[int], int] = defaultdict(int)
    for trace in traces:
        for line in trace.packets():
            if line.get("remote_qpn") is not None:
                count[frozenset((line["qpn"], line["remote_qpn"]))] += 1
    if not count:
        raise BadInput("no packets in the traces", where=", ".join(str(trace.path) for trace in traces))
    matching = [pair for pair in count if qpn is None or qpn in pair]
    if not matching:
        known = ", ".join(sorted({str(number) for pair in count for number in pair}))
        raise BadInput(f"no packets of QPN {qpn}", hint=f"QPNs in the traces: {known}")
    return max(matching, key=lambda pair: count[pair])
