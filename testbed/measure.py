"""Reading the numbers that programs print: perftest's tables, iperf3's JSON, ping's lines.

Every reader raises `Unreadable` with the end of the output when the program did not print what it prints on success.
"""

from __future__ import annotations

import json
import re
import statistics
from dataclasses import dataclass

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


class Unreadable(ValueError):
    """A program's output does not hold what was looked for (it failed, or another version prints differently)."""

    def __init__(self, program: str, output: str) -> None:
        tail = "\n".join(output.strip().splitlines()[-8:]) or "(nothing)"
        super().__init__(f"{program} printed no result; it ended with:\n{tail}")


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """A line of ib_{send,write,read}_bw with --report_gbits."""

    size: int
    """Bytes of a message."""
    iterations: int
    average: float
    """Gbit/s, decimal."""


@dataclass(frozen=True, slots=True)
class Latency:
    """A line of ib_{send,write,read}_lat, microseconds: half a round trip for send and write, a whole one for read."""

    size: int
    iterations: int
    typical: float
    """Median, perftest's t_typical; its t_avg when it was run for a duration (-D), where it prints no median."""
    average: float
    p99: float | None


def _rows(output: str, program: str) -> list[tuple[list[str], list[float]]]:
    """Column names and numbers of each table row below a header, which begins with `#bytes`."""
    names: list[str] = []
    rows: list[tuple[list[str], list[float]]] = []
    for text in output.splitlines():
        line = text.strip()
        if line.startswith("#bytes"):
            names = re.findall(r"#\w+|[A-Za-z0-9_.%]+(?: [a-z]+)*\s?\[[^\]]+\]|tps average", line)
        elif names and line and all(_NUMBER.fullmatch(word) for word in line.split()):
            rows.append((names, [float(word) for word in line.split()]))
    if not rows:
        raise Unreadable(program, output)
    return rows


def bandwidth(output: str) -> list[Bandwidth]:
    """Every row of a bandwidth test. Raises Unreadable, also when the test was not told --report_gbits."""
    found = []
    for names, row in _rows(output, "the bandwidth test"):
        column = next((i for i, name in enumerate(names) if name.replace(" ", "") == "BWaverage[Gb/sec]"), None)
        if column is None or column >= len(row):
            raise Unreadable("the bandwidth test", output)
        found.append(Bandwidth(int(row[0]), int(row[1]), row[column]))
    return found


def latency(output: str) -> list[Latency]:
    """Every row of a latency test. Raises Unreadable."""
    found = []
    for names, row in _rows(output, "the latency test"):
        at = {name.partition("[")[0].strip(): i for i, name in enumerate(names) if i < len(row)}
        average = at.get("t_avg")
        if average is None:
            raise Unreadable("the latency test", output)
        p99 = at.get("99% percentile")
        typical = at.get("t_typical", average)
        found.append(Latency(int(row[0]), int(row[1]), row[typical], row[average], None if p99 is None else row[p99]))
    return found


def iperf3(output: str) -> float:
    """Gbit/s that the receiver got, from `iperf3 --json`. Raises Unreadable."""
    try:
        report = json.loads(output)
        return float(report["end"]["sum_received"]["bits_per_second"]) / 1e9
    except (ValueError, KeyError, TypeError):
        raise Unreadable("iperf3", output) from None


def ping(output: str) -> list[float]:
    """Round trips in microseconds, in order. Raises Unreadable."""
    found = [float(text) * 1000 for text in re.findall(r"\btime=([\d.]+) ms", output)]
    if not found:
        raise Unreadable("ping", output)
    return found


def median(values: list[float]) -> float:
    """Plain median."""
    return statistics.median(values)
