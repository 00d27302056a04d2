"""Single numbers out of what programs print, for benchmarks and experiments; on top of `testbed.lab.output`.

Every reader raises `Unreadable` with the end of the output when the program did not print what it prints on success.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence

from testbed.base.errors import RunFailed
from testbed.lab.output import Row, measured


class Unreadable(RunFailed):
    """A program's output does not hold what was looked for (it failed, or another version prints differently)."""

    def __init__(self, program: str, output: str) -> None:
        tail = "\n".join(output.strip().splitlines()[-8:]) or "(nothing)"
        super().__init__(f"`{program}` printed no result; it ended with:\n{tail}")


def _last(argv: Sequence[str], output: str, *names: str) -> float:
    """The first of `names` that the table's last row has."""
    rows: list[Row] = measured(list(argv), output)
    for name in names:
        if rows and name in rows[-1]:
            return rows[-1][name]
    raise Unreadable(shlex.join(argv), output)


def bandwidth(argv: Sequence[str], output: str) -> float:
    """Average Gbit/s (decimal) of a perftest bandwidth test's last row; it must have been given --report_gbits."""
    return _last(argv, output, "bandwidth_Gbit_per_s")


def latency(argv: Sequence[str], output: str) -> float:
    """Typical (median) microseconds of a perftest latency test's last row.

    Half of a round trip for send and write, a whole one for read. With -D perftest prints a mean only: that, then.
    """
    return _last(argv, output, "t_typical_us", "t_avg_us")


def iperf3(output: str) -> float:
    """Gbit/s that the receiver got, from `iperf3 --json`."""
    try:
        report = json.loads(output)
        return float(report["end"]["sum_received"]["bits_per_second"]) / 1e9
    except (ValueError, KeyError, TypeError):
        raise Unreadable("iperf3", output) from None


def ping(output: str) -> list[float]:
    """Round trips in microseconds, in order."""
    found = [float(text) * 1000 for text in re.findall(r"\btime=([\d.]+) ms", output)]
    if not found:
        raise Unreadable("ping", output)
    return found
