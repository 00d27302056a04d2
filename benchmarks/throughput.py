"""Compare RDMA with TCP throughput on the same path: `sudo .venv/bin/python benchmarks/throughput.py [--json]`.

The throughput of `ib_write_bw` (1 MiB messages, MTU 4096, one queue pair) is divided by that of `iperf3` (one TCP
stream). Both programs are unmodified and run in turn within one run, between the same two virtual hosts through the
same switch. `ratio_to_iperf3` is the median of the pairs' ratios; higher is better. TCP is that of the kernel, with
jumbo frames and, like all traffic of the testbed, without offloads on the veth.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from testbed.measure.bench import Bench, one_switch, script, with_hosts
from testbed.measure.numbers import bandwidth, iperf3
from testbed.record.stats import paired_ratio

WRITE = ["ib_write_bw", "-F", "-x", "1", "-s", "1048576", "-m", "4096", "--report_gbits"]


def measure(bench: Bench, pairs: int, seconds: int) -> dict[str, Any]:
    """Run both programs in turn; returns the numbers of each and their ratio."""
    rdma: list[float] = []
    tcp: list[float] = []
    address = bench.session.topology.hosts["h2"].ip
    argv = [*WRITE, "-D", str(seconds)]
    receiver = ["iperf3", "-s", "-1", "-B", address]
    sender = ["iperf3", "-c", address, "-t", str(seconds), "--json"]
    for _ in range(pairs):
        rdma.append(bandwidth(argv, bench.pair(("h2", argv), ("h1", [*argv, address]))))
        tcp.append(iperf3(bench.pair(("h2", receiver), ("h1", sender), rdma=False)))
    ratio = paired_ratio(rdma, tcp)
    return {
        "ratio_to_iperf3": ratio.median,
        "interval": [ratio.low, ratio.high],
        "n": ratio.n,
        "ib_write_bw_gbit_per_s": rdma,
        "iperf3_gbit_per_s": tcp,
        "command": " ".join(argv),
        "seconds_each": seconds,
    }


def main() -> int:
    """Run the benchmark and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print only the result, as JSON")
    parser.add_argument("--pairs", type=int, default=5, help="pairs of measurements (default: %(default)s)")
    parser.add_argument("--seconds", type=int, default=3, help="seconds per measurement (default: %(default)s)")
    options = parser.parse_args()
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        with_hosts(
            one_switch("throughput", {"h1": {}, "h2": {}}),
            lambda bench: result.update(measure(bench, options.pairs, options.seconds)),
            results=Path(folder),
        )
    if options.json:
        print(json.dumps(result))
    else:
        low, high = result["interval"]
        rows = zip(result["ib_write_bw_gbit_per_s"], result["iperf3_gbit_per_s"], strict=True)
        for number, (rdma, tcp) in enumerate(rows, start=1):
            print(f"pair {number}: ib_write_bw {rdma:.2f} Gbit/s, iperf3 {tcp:.2f} Gbit/s")
        interval = "" if low is None else f" [{low:.3f}, {high:.3f}]"
        print(f"ratio_to_iperf3 {result['ratio_to_iperf3']:.3f}{interval} n={result['n']} (higher is better)")
    return 0


if __name__ == "__main__":
    script(main)
