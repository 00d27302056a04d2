"""Compare RDMA latency with that of ping on the same path: `sudo .venv/bin/python benchmarks/latency.py [--json]`.

The typical latency of `ib_send_lat` (64 bytes, half a round trip) is divided by half of `ping`'s median round-trip
time. Both programs are unmodified and run in turn within one run, between the same two virtual hosts through the same
switch. `ratio_to_ping` is the median of the pairs' ratios; lower is better. By default `ib_send_lat` polls; `--events`
measures it with completion events (-e).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from testbed.measure.bench import Bench, one_switch, script, with_hosts
from testbed.measure.numbers import latency, ping
from testbed.record.stats import paired_ratio

SEND = ["ib_send_lat", "-F", "-x", "1", "-s", "64"]


def measure(bench: Bench, pairs: int, iterations: int, events: bool) -> dict[str, Any]:
    """Run both programs in turn; returns the numbers of each and their ratio."""
    rdma: list[float] = []
    half_pings: list[float] = []
    address = bench.session.topology.hosts["h2"].ip
    argv = [*SEND, "-n", str(iterations), *(["-e"] if events else [])]
    echo = ["ping", "-n", "-s", "64", "-i", "0.002", "-c", str(iterations), address]
    for _ in range(pairs):
        rdma.append(latency(argv, bench.pair(("h2", argv), ("h1", [*argv, address]))))
        half_pings.append(statistics.median(ping(bench.alone("h1", echo))) / 2)
    ratio = paired_ratio(rdma, half_pings)
    return {
        "ratio_to_ping": ratio.median,
        "interval": [ratio.low, ratio.high],
        "n": ratio.n,
        "ib_send_lat_us": rdma,
        "half_ping_us": half_pings,
        "command": " ".join(argv),
    }


def main() -> int:
    """Run the benchmark and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print only the result, as JSON")
    parser.add_argument("--pairs", type=int, default=5, help="pairs of measurements (default: %(default)s)")
    parser.add_argument("--iterations", type=int, default=1000, help="messages per measurement (default: %(default)s)")
    parser.add_argument("--events", action="store_true", help="let ib_send_lat wait for completion events (-e)")
    options = parser.parse_args()
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        with_hosts(
            one_switch("latency", {"h1": {}, "h2": {}}),
            lambda bench: result.update(measure(bench, options.pairs, options.iterations, options.events)),
            results=Path(folder),
        )
    if options.json:
        print(json.dumps(result))
    else:
        low, high = result["interval"]
        rows = zip(result["ib_send_lat_us"], result["half_ping_us"], strict=True)
        for number, (rdma, half) in enumerate(rows, start=1):
            print(f"pair {number}: ib_send_lat {rdma:.1f} µs, half of ping's round trip {half:.1f} µs")
        interval = "" if low is None else f" [{low:.2f}, {high:.2f}]"
        print(f"ratio_to_ping {result['ratio_to_ping']:.2f}{interval} n={result['n']} (lower is better)")
    return 0


if __name__ == "__main__":
    script(main)
