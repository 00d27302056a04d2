"""Single numbers from the output of programs, for benchmarks and experiments; based on `testbed.lab.output`.

Every function raises `Unreadable` with the end of the output if the program did not print what it prints on success.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence

from testbed.base.errors import RunFailed
from testbed.lab.output import Row, measured


class Unreadable(RunFailed):
    """A program's output lacks the expected result (it failed, or its version prints something else)."""

    def __init__(self, program: str, output: str) -> None:
        tail = "\n".join(output.strip().splitlines()[-8:]) or "(nothing)"
        super().__init__(f"`{program}` printed no result; it ended with:\n{tail}")


def _last(argv: Sequence[str], output: str, *names: str) -> float:
    """The first of the columns `names` that the table's last row has."""
    rows: list[Row] = measured(list(argv), output)
    for name in names:
        if rows and name in rows[-1]:
            return rows[-1][name]
    raise Unreadable(shlex.join(argv), output)


def bandwidth(argv: Sequence[str], output: str) -> float:
    """Average Gbit/s (decimal) in the last row of a perftest bandwidth test, which must be run with --report_gbits."""
    return _last(argv, output, "bandwidth_Gbit_per_s")


def latency(argv: Sequence[str], output: str) -> float:
    """Typical (median) latency in microseconds in the last row of a perftest latency test.

    It is half a round trip for send and write, a whole one for read. With -D perftest prints just a mean, which is
    then returned.
    """
    return _last(argv, output, "t_typical_us", "t_avg_us")


def iperf3(output: str) -> float:
    """Throughput at the receiver in Gbit/s, from `iperf3 --json`."""
    try:
        report = json.loads(output)
        return float(report["end"]["sum_received"]["bits_per_second"]) / 1e9
    except (ValueError, KeyError, TypeError):
        raise Unreadable("iperf3", output) from None


def ping(output: str) -> list[float]:
    """Round-trip times in microseconds, in order."""
    found = [float(text) * 1000 for text in re.findall(r"\btime=([\d.]+) ms", output)]
    if not found:
        raise Unreadable("ping", output)
    return found
