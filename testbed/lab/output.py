"""What known programs print: the numbers of ibv_*_pingpong and perftest, and complaints about wrong data.

These programs report in words only; the regular expressions here are the one place that reads them.
"""

from __future__ import annotations

import re
from typing import Final

Row = dict[str, float]

_BYTES: Final = re.compile(r"^(\d+) bytes in ([\d.]+) seconds = ([\d.]+) Mbit/sec$", re.MULTILINE)
_ITERATIONS: Final = re.compile(r"^(\d+) iters in ([\d.]+) seconds = ([\d.]+) usec/iter$", re.MULTILINE)
_WRONG_DATA: Final = re.compile(r"^invalid data in page.*$", re.MULTILINE)
_COLUMN: Final = re.compile(r"(?:BW |tps )?[#\w.%]+(?: percentile)?(?:\[[^\]]*\])?")
_NAMES: Final = {
    "#bytes": "bytes",
    "#iterations": "iterations",
    "BW peak": "bandwidth_peak",
    "BW average": "bandwidth",
    "MsgRate": "message_rate",
    "tps average": "transactions_per_s",
}
_UNITS: Final = {"usec": "us", "MB/sec": "MiB_per_s", "Gb/sec": "Gbit_per_s", "Mpps": "per_us", "": ""}
"""perftest's MB/sec means 2^20 bytes per second, its Gb/sec 10^9 bits; Mpps are messages per microsecond."""


def measured(argv: list[str], text: str) -> list[Row]:
    """Parse the numbers that a program has printed, one row per message size; empty for other programs.

    Keys are `bytes`, `iterations`, then the program's names with units: `bandwidth_MiB_per_s`, `t_typical_us`.
    """
    program = argv[0].rsplit("/", 1)[-1]
    if program.startswith("ibv_") and program.endswith("_pingpong"):
        return _pingpong(text)
    if re.fullmatch(r"(ib|raw_ethernet)_\w+", program):
        return _perftest(text)
    return []


def wrong_data(argv: list[str], text: str) -> str | None:
    """Return the first complaint about wrong data. ibv_*_pingpong -c only prints it, and still ends with code 0."""
    if not argv[0].rsplit("/", 1)[-1].startswith("ibv_"):
        return None
    found = _WRONG_DATA.search(text)
    return found.group() if found else None


def _pingpong(text: str) -> list[Row]:
    size, count = _BYTES.search(text), _ITERATIONS.search(text)
    if size is None or count is None:
        return []
    return [
        {
            "bytes": float(size[1]),
            "iterations": float(count[1]),
            "seconds": float(size[2]),
            "bandwidth_Mbit_per_s": float(size[3]),
            "iteration_us": float(count[3]),
        }
    ]


def _perftest(text: str) -> list[Row]:
    rows: list[Row] = []
    columns: list[str] = []
    for line in text.splitlines():
        if line.lstrip().startswith("#bytes"):
            columns = [_name(column) for column in _COLUMN.findall(line)]
            continue
        words = line.split()
        if columns and len(words) == len(columns):
            try:
                rows.append(dict(zip(columns, map(float, words), strict=True)))
            except ValueError:
                continue
    return rows


def _name(column: str) -> str:
    head, _, rest = column.partition("[")
    percentile = re.fullmatch(r"([\d.]+)% percentile", head)
    name = f"t_p{percentile[1]}" if percentile else _NAMES.get(head, head)
    unit = rest.removesuffix("]")
    unit = _UNITS.get(unit, unit.replace("/", "_per_"))
    return f"{name}_{unit}" if unit else name
