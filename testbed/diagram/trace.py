"""Reading traces of queue pairs (docs/trace.md), and finding each sent packet at the end that received it."""

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
"""One line: `t`, `event`, and the fields of docs/trace.md."""


@dataclass(slots=True)
class Trace:
    """One file: what one NIC saw. `lines` are sorted by time."""

    path: Path
    start: Line
    """The first line: version, addresses, queue pairs asked for."""
    lines: list[Line] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return self.path.stem

    def packets(self, direction: str | None = None, qpn: int | None = None) -> list[Line]:
        """Packet lines, of one direction (`sent`, `received`) and one queue pair where given."""
        return [
            line
            for line in self.lines
            if line["event"] == "packet" and direction in (None, line["direction"]) and qpn in (None, line["qpn"])
        ]

    def qpns(self) -> list[int]:
        """Queue pairs of this end that sent or received something, the busiest first."""
        count: dict[int, int] = defaultdict(int)
        for line in self.packets():
            count[line["qpn"]] += 1
        return sorted(count, key=lambda qpn: (-count[qpn], qpn))


def read(path: Path) -> Trace:
    """Read a trace. A last line that is cut off (the NIC was killed) is left out. Raises BadInput."""
    try:
        texts = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise BadInput(f"cannot read the trace: {reason}", where=str(path)) from error
    lines: list[Line] = []
    for number, text in enumerate(texts, start=1):
        if not text:
            continue
        try:
            line = json.loads(text)
        except ValueError as error:
            if number == len(texts):
                break  # no newline after it
            raise BadInput(f"line {number} is not JSON: {error}", where=str(path)) from error
        if not isinstance(line, dict) or "event" not in line or not isinstance(line.get("t"), int | float):
            raise BadInput(f"line {number} is no line of a trace", where=str(path), hint="docs/trace.md has the fields")
        lines.append(line)
    if not lines or lines[0]["event"] != "start":
        raise BadInput("not a trace of queue pairs", where=str(path), hint="its first line has the event start")
    if lines[0].get("version") != VERSION:
        raise BadInput(f"version {lines[0].get('version')!r} of the format", where=str(path), hint=f"known: {VERSION}")
    return Trace(path, lines[0], sorted(lines[1:], key=lambda line: line["t"]))


@dataclass(slots=True)
class Flight:
    """One packet on its way between two ends."""

    line: Line
    """As it was sent (as it was received, when only that was seen)."""
    sender: int | None
    """Index of the trace that sent it; None: no trace of that end."""
    receiver: int | None = None
    """Index of the trace that received it; None: nobody's trace has it."""
    sent_at: float | None = None
    received_at: float | None = None
    copies: list[float] = field(default_factory=list)
    """When it was received once more (the link doubled it)."""
    counted: list[str] = field(default_factory=list)
    """What the receiver counted."""

    @property
    def at(self) -> float:
        """When it was sent, or (not seen) received."""
        when = self.sent_at if self.sent_at is not None else self.received_at
        assert when is not None
        return when


def flights(traces: Sequence[Trace], qpns: frozenset[int]) -> list[Flight]:
    """Every packet between the queue pairs `qpns`, in the order of sending, joined with its reception.

    A frame is known at the other end by opcode, PSN and IPv4 identification (IPv6 has none: then the last one sent).
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
        # (Both ends at one NIC are told apart by their numbers; two NICs may use the same number.)
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
    # Of one moment what was received comes before what was sent: that may be its answer.
    return sorted(found, key=lambda flight: (flight.at, flight.sender is not None))


def _merged(traces: Sequence[Trace], qpns: frozenset[int]) -> Iterator[tuple[int, Line]]:
    """Packets of all traces by time; of one moment the sent ones first."""
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
    """The two QPNs of `qpn`'s connection (None: the busiest). Raises BadInput when there is none."""
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
        raise BadInput(f"no packets of QPN {qpn}", hint=f"there are: {known}")
    return max(matching, key=lambda pair: count[pair])
