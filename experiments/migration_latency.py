"""Measure how long a migration stops a program: `sudo .venv/bin/python experiments/migration_latency.py [--quick]`.

In real runs, the server of a running `ib_write_bw` moves to a third host, for several message sizes (with one queue
pair) and several numbers of queue pairs (with 4 KiB messages), several times each. Each run measures the blackout at
the moved side (from freeze to thaw, because the target of RDMA WRITEs has no completions), the longest gap between
completions at its peer, and every phase. The results are written to results/migration_latency/<UTC>-<id>/:
migration_latency.csv (every run), migration_latency.json (medians with 95 % intervals), message_size.png,
queue_pairs.png, phases.png, and the complete folder of each run under runs/.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from testbed.measure.bench import one_switch, script
from testbed.record.folder import RunFolder
from testbed.record.stats import Estimate, estimate
from testbed.record.summary import PHASES, Summary
from testbed.view import text
from testbed.view.plots import lines, stacked_phases

SIZES = (64, 4096, 65536, 1 << 20)
QUEUE_PAIRS = (1, 4, 16, 64)
QUICK_SIZES, QUICK_QUEUE_PAIRS = (4096, 1 << 20), (1, 16)
SMALL = 4096
"""Message size in bytes in the series over the number of queue pairs."""
SECONDS, MOVE_AT = 8, "2s"


@dataclass
class Point:
    """One configuration and the summaries of its runs."""

    size: int
    qps: int
    runs: list[Summary] = field(default_factory=list)

    @property
    def label(self) -> str:
        """The configuration as a label of two lines."""
        return f"{text.size(self.size).replace('.00', '')}\n{self.qps} QP" + ("s" if self.qps > 1 else "")

    def values(self, name: str) -> list[float]:
        """The values of a field of the runs' only migration; runs without a value are left out."""
        found = [getattr(run.migrations[0], name) for run in self.runs]
        return [float(value) for value in found if value is not None]

    def phases(self) -> dict[str, Estimate]:
        """Phase → median and interval over the runs in ms."""
        return {
            phase: estimate([run.migrations[0].phases_ms[phase] for run in self.runs])
            for phase in PHASES
            if all(phase in run.migrations[0].phases_ms for run in self.runs)
        }


def topology(point: Point) -> dict[str, Any]:
    """Topology data with three hosts on one switch; the server of ib_write_bw moves from h2 to h3 under load."""
    # With many QPs and the default send queue of 128 large messages each, the queues would dominate the measurement.
    depth = 16 if point.size * point.qps >= 1 << 20 else 64
    command = f"ib_write_bw -F -x 1 -s {point.size} -q {point.qps} -t {depth} -D {SECONDS}"
    return {
        **one_switch("migration_latency", {"h1": {}, "h2": {}, "h3": {}}),
        "apps": {
            "server": {"host": "h2", "command": command},
            "client": {"host": "h1", "command": command + " {server.ip}", "after": "server"},
        },
        "migrations": [{"app": "server", "to": "h3", "at": MOVE_AT, "address": "keep"}],
    }


def run(point: Point, folder: Path, seed: int) -> Summary | None:
    """Do one complete `testbed run`; returns None if migration or program failed (reported on standard error)."""
    file = folder / "topologies" / f"size{point.size}-qps{point.qps}.yaml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(yaml.safe_dump(topology(point), sort_keys=False))
    command = [sys.executable, "-m", "testbed", "run", str(file), "--json", "--no-live", "--seed", str(seed)]
    done = subprocess.run([*command, "--results", str(folder / "runs")], capture_output=True, text=True, check=False)
    if done.returncode in (2, 3, 130):
        sys.stderr.write(done.stderr)
        sys.exit(done.returncode)
    try:
        summary = Summary.model_validate_json(done.stdout)
    except ValueError:
        print(f"the run wrote no summary; its last output:\n{done.stderr[-1500:]}", file=sys.stderr)
        return None
    if not summary.ok:
        reasons = "; ".join(problem.error for problem in summary.problems)
        print(f"run failed: {summary.folder}: {reasons}", file=sys.stderr)
        return None
    return summary


def points(quick: bool) -> Iterator[Point]:
    """All sizes with one queue pair, then all numbers of queue pairs with one size, without duplicates."""
    sizes, counts = (QUICK_SIZES, QUICK_QUEUE_PAIRS) if quick else (SIZES, QUEUE_PAIRS)
    yield from (Point(size, 1) for size in sizes)
    yield from (Point(SMALL, qps) for qps in counts if not (qps == 1 and SMALL in sizes))


def write(folder: Path, measured: list[Point]) -> None:
    """Write every run as CSV, and medians with intervals as JSON."""
    with (folder / "migration_latency.csv").open("w", newline="") as file:
        table = csv.writer(file)
        columns = ["blackout_ms", "partner_gap_ms", "image_bytes", "nic_image_bytes", "retransmissions"]
        table.writerow(["size", "qps", "run", *columns, *(f"{phase}_ms" for phase in PHASES)])
        for point in measured:
            for summary in point.runs:
                migration = summary.migrations[0]
                row = [getattr(migration, column) for column in columns]
                phases = [migration.phases_ms.get(phase) for phase in PHASES]
                table.writerow([point.size, point.qps, summary.run_id, *row, *phases])
    report = [
        {
            "size": point.size,
            "qps": point.qps,
            "n": len(point.runs),
            "blackout_ms": estimate(point.values("blackout_ms")).model_dump(),
            "partner_gap_ms": estimate(point.values("partner_gap_ms")).model_dump(),
            "image_bytes": estimate(point.values("image_bytes")).model_dump(),
            "phases_ms": {phase: found.model_dump() for phase, found in point.phases().items()},
        }
        for point in measured
    ]
    (folder / "migration_latency.json").write_text(json.dumps(report, indent=2) + "\n")


def draw(folder: Path, measured: list[Point]) -> list[Path]:
    """Draw the plots and return their paths."""
    environment = measured[0].runs[0].environment
    note = f"Linux {environment.kernel}, {environment.cpus} CPUs, CRIU {environment.criu}"
    both = {"moved side": "blackout_ms", "peer": "partner_gap_ms"}

    def series(chosen: list[Point], x: str) -> dict[str, dict[float, Estimate]]:
        return {
            label: {float(getattr(point, x)): estimate(point.values(name)) for point in chosen}
            for label, name in both.items()
        }

    by_size = [point for point in measured if point.qps == 1]
    by_count = [point for point in measured if point.size == SMALL]
    common: dict[str, Any] = {"ylabel": "blackout, ms", "log_x": True, "note": note}
    return [
        lines(
            folder / "message_size.png",
            series(by_size, "size"),
            title="Blackout of ib_write_bw's server against message size, 1 queue pair",
            xlabel="message size",
            tick=lambda size: text.size(size).replace(".00", ""),
            **common,
        ),
        lines(
            folder / "queue_pairs.png",
            series(by_count, "qps"),
            title="Blackout of ib_write_bw's server against queue pairs, 4 KiB messages",
            xlabel="queue pairs",
            **common,
        ),
        stacked_phases(
            folder / "phases.png",
            {point.label: point.phases() for point in measured},
            title="Phases of the blackout",
            whole={point.label: estimate(point.values("blackout_ms")) for point in measured},
            note=note,
        ),
    ]


def main() -> int:
    """Run the experiment and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer points and 2 runs each, for a first impression")
    parser.add_argument("--runs", type=int, help="runs per point (default: 7, with --quick: 2)")
    parser.add_argument("--results", type=Path, help="folder for the results (default: ./results)")
    options = parser.parse_args()
    repeats = options.runs or (2 if options.quick else 7)
    with RunFolder.create("migration_latency", seed=0, root=options.results) as folder:
        measured = list(points(options.quick))
        failed = 0
        for number in range(repeats):  # Round by round, so that slow drift of the machine affects all points equally.
            for point in measured:
                summary = run(point, folder.path, number)
                if summary is None:
                    failed += 1
                    continue
                point.runs.append(summary)
                migration = summary.migrations[0]
                print(
                    f"round {number + 1}/{repeats}  {point.label.replace(chr(10), ', '):20} blackout "
                    f"{text.ms(migration.blackout_ms)} ms, peer {text.ms(migration.partner_gap_ms)} ms",
                    flush=True,
                )
        measured = [point for point in measured if point.runs]
        if not measured:
            print("no run succeeded", file=sys.stderr)
            return 1
        write(folder.path, measured)
        folder.write_environment(measured[0].runs[0].environment)
        for path in draw(folder.path, measured):
            print(path)
        if failed:
            print(f"{failed} run{'s' if failed > 1 else ''} failed and left out of the data", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    script(main)
