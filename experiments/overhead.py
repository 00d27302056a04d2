"""Measure the overhead of the migration extension: `sudo .venv/bin/python experiments/overhead.py [--quick]`.

Four hosts are on one switch: h1 and h2 support MigrOS, h3 and h4 are stock (`nic: {migros: false}`, byte for byte rxe).
Each test runs on one pair and immediately afterwards on the other, starting with either in turn, so that slow drift of
the machine cancels out in the ratio. Nothing migrates meanwhile. The results are written to
results/overhead/<UTC>-<id>/: overhead.csv (every sample), overhead.json (medians, ratios with 95 % intervals),
overhead.png, and the folders of the runs.

According to the paper there is no overhead while nothing migrates. A ratio whose interval contains 1 agrees with that.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from testbed.measure.bench import Bench, one_switch, script, with_hosts
from testbed.measure.numbers import bandwidth, latency
from testbed.record.folder import RunFolder, load_summary
from testbed.record.stats import Estimate, estimate, paired_ratio
from testbed.view.plots import ratios

HOSTS = {"h1": {}, "h2": {}, "h3": {"nic": {"migros": False}}, "h4": {"nic": {"migros": False}}}
WITH, WITHOUT = ("h1", "h2"), ("h3", "h4")


@dataclass(frozen=True)
class Test:
    """One perftest program with its arguments."""

    label: str
    argv: list[str]
    read: Callable[[list[str], str], float]
    unit: str

    @property
    def more_is_better(self) -> bool:
        """Whether the test measures bandwidth rather than latency."""
        return self.read is bandwidth


def tests(quick: bool) -> list[Test]:
    """The tests: latency with completion events, and bandwidth of large and of small messages."""
    few, seconds = ("300", "1") if quick else ("1500", "3")
    common = ["-F", "-x", "1"]
    rate = [*common, "-D", seconds, "--report_gbits"]
    return [
        Test("ib_send_lat\n64 B", ["ib_send_lat", *common, "-s", "64", "-n", few, "-e"], latency, "us"),
        Test("ib_write_bw\n1 MiB", ["ib_write_bw", *rate, "-s", "1048576"], bandwidth, "Gbit/s"),
        Test("ib_send_bw\n4 KiB", ["ib_send_bw", *rate, "-s", "4096"], bandwidth, "Gbit/s"),
        Test("ib_read_bw\n64 KiB", ["ib_read_bw", *rate, "-s", "65536"], bandwidth, "Gbit/s"),
    ]


def once(bench: Bench, test: Test, hosts: tuple[str, str]) -> float:
    """Make one measurement between two hosts (client, server)."""
    client, server = hosts
    address = bench.session.topology.hosts[server].ip
    return test.read(test.argv, bench.pair((server, test.argv), (client, [*test.argv, address])))


def measure(bench: Bench, pairs: int, quick: bool, samples: dict[str, dict[str, list[float]]]) -> None:
    """Fill `samples` (test label → {"with": [...], "without": [...]}) pair by pair, in alternating order."""
    for number in range(pairs):
        for test in tests(quick):
            kept = samples.setdefault(test.label, {"with": [], "without": []})
            order = [("with", WITH), ("without", WITHOUT)]
            for name, hosts in order if number % 2 == 0 else reversed(order):
                value = once(bench, test, hosts)
                kept[name].append(value)
                title = test.label.replace("\n", " ")
                print(f"pair {number + 1}/{pairs}  {title:18} {name:8} {value:9.2f} {test.unit}", flush=True)


def write(folder: Path, samples: dict[str, dict[str, list[float]]], quick: bool) -> dict[str, Estimate]:
    """Write the data as CSV and JSON, and return the ratios (with the extension / without)."""
    chosen = {test.label: test for test in tests(quick)}
    found = {label: paired_ratio(kept["with"], kept["without"]) for label, kept in samples.items()}
    with (folder / "overhead.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["test", "pair", "unit", "with", "without", "ratio"])
        for label, kept in samples.items():
            for pair, values in enumerate(zip(kept["with"], kept["without"], strict=True), start=1):
                table.writerow([label.replace("\n", " "), pair, chosen[label].unit, *values, values[0] / values[1]])
    report = {
        label.replace("\n", " "): {
            "command": shlex.join(chosen[label].argv),
            "unit": chosen[label].unit,
            "more_is_better": chosen[label].more_is_better,
            "with": estimate(kept["with"]).model_dump(),
            "without": estimate(kept["without"]).model_dump(),
            "ratio": found[label].model_dump(),
        }
        for label, kept in samples.items()
    }
    (folder / "overhead.json").write_text(json.dumps(report, indent=2) + "\n")
    return found


def main() -> int:
    """Run the experiment and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="3 pairs of one second each, for a first impression")
    parser.add_argument("--pairs", type=int, help="pairs per test (default: 11, with --quick: 3)")
    parser.add_argument("--results", type=Path, help="folder for the results (default: ./results)")
    options = parser.parse_args()
    pairs = options.pairs or (3 if options.quick else 11)
    samples: dict[str, dict[str, list[float]]] = {}
    with RunFolder.create("overhead", seed=0, root=options.results) as folder:
        with_hosts(
            one_switch("overhead", HOSTS),
            lambda bench: measure(bench, pairs, options.quick, samples),
            results=folder.path / "runs",
        )
        found = write(folder.path, samples, options.quick)
        environment = load_summary(next((folder.path / "runs").glob("*/*/summary.json"))).environment
        folder.write_environment(environment)
        ratios(
            folder.path / "overhead.png",
            found,
            title="The NIC with the migration extension relative to the NIC without it",
            ylabel="with / without",
            note=f"Linux {environment.kernel}, {environment.cpus} CPUs; lower latency and higher bandwidth are better",
        )
    for label, ratio in found.items():
        print(f"{label.replace(chr(10), ' '):20} with/without {ratio.text()}")
    print(folder.path / "overhead.png")
    return 0


if __name__ == "__main__":
    script(main)
