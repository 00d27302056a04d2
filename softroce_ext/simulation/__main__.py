"""`python -m softroce_ext.simulation`: run many seeded schedules of the protocol core and check its invariants.

Exit codes: 0 if every invariant held, 1 if one was violated (its seed and the command that replays it are printed), 2
for bad input.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from typing import Any

from softroce_ext.simulation.schedule import Outcome, Plan, Schedule
from softroce_ext.wire.frame import address_text, parse
from softroce_ext.wire.opcodes import name_of

CHUNK = 500
"""Number of schedules that a process runs at a time."""


def attempt(seed: int, plan: Plan, trace: bool = False) -> tuple[Outcome | None, str, list[tuple[float, str, bytes]]]:
    """Run one schedule and return (outcome, "", log), or (None, what was violated, log)."""
    schedule = Schedule(seed, plan, trace)
    try:
        return schedule.run(), "", schedule.link.log or []
    except Exception as error:  # Any exception is a finding for this seed.
        return None, f"{type(error).__name__}: {error}", schedule.link.log or []


def run_chunk(first: int, count: int, plan: Plan) -> tuple[Counter[str], list[tuple[int, str]]]:
    """Run the `count` schedules from seed `first` on and return (sums, [(seed, what was violated)])."""
    sums: Counter[str] = Counter()
    broken = []
    for seed in range(first, first + count):
        outcome, reason, _ = attempt(seed, plan)
        sums["schedules"] += 1
        if outcome is None:
            broken.append((seed, reason))
            continue
        sums[f"schedules {outcome.service}"] += 1
        sums["packets"] += outcome.packets
        sums["completions"] += outcome.completions
        sums["migrations"] += outcome.migrations
        sums["virtual microseconds"] += int(outcome.virtual_seconds * 1e6)
        for name, times in outcome.faults.items():
            sums[f"frames {name}"] += times
    return sums, broken


def trace_lines(log: list[tuple[float, str, bytes]]) -> list[str]:
    """The packet trace of a schedule, one line per frame; the same seed gives the same trace, byte for byte."""
    lines = []
    for when, fate, frame in log:
        packet = parse(memoryview(frame))
        if isinstance(packet, str):
            continue
        ends = f"{address_text(packet.source_ip)} → {address_text(packet.destination_ip)}"
        what = f"QPN {packet.destination_qpn} PSN {packet.psn:06x} {len(packet.payload):>4} bytes"
        lines.append(f"{(when - 1000) * 1e6:>12.1f} us  {ends}  {name_of(packet.opcode):<34} {what}  {fate}".rstrip())
    return lines


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    p = argparse.ArgumentParser(prog="python -m softroce_ext.simulation", description=(__doc__ or "").splitlines()[0])
    p.add_argument("--seed", type=int, default=0, help="seed of the first schedule; the others count up from it")
    p.add_argument("--schedules", type=int, default=1000, help="number of schedules (default: %(default)s)")
    p.add_argument(
        "--service", choices=("mixed", "rc", "uc", "ud"), default="mixed", help="transport service (default: mixed)"
    )
    p.add_argument("--qps", type=int, default=1, help="connections per schedule (with more than 1, none is moved)")
    p.add_argument(
        "--messages",
        type=int,
        default=5,
        choices=range(1, 8),
        metavar="1..7",
        help="largest number of messages from each end",
    )
    p.add_argument("--loss", type=float, help="loss probability of each frame (default: drawn from the seed)")
    p.add_argument("--migrate", action="store_true", help="move one end in every RC schedule")
    p.add_argument("--jobs", type=int, default=2, help="number of processes (default: %(default)s)")
    p.add_argument("--trace", action="store_true", help="run only the first seed and print its packets")
    p.add_argument("--json", action="store_true", help="print the totals as JSON")
    return p


def replay(seed: int, options: argparse.Namespace) -> str:
    """The command that runs one seed again and prints its packets."""
    words = ["python -m softroce_ext.simulation --trace --seed", str(seed), "--service", options.service]
    for name, default in (("qps", 1), ("messages", 5), ("loss", None)):
        value = getattr(options, name)
        if value != default:
            words += [f"--{name}", str(value)]
    return " ".join(words + (["--migrate"] if options.migrate else []))


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    p = parser()
    options = p.parse_args(argv)
    if options.schedules < 1 or options.qps < 1 or options.jobs < 1 or not 0 <= (options.loss or 0) < 1:
        p.error("--schedules, --qps and --jobs must be at least 1, and --loss at least 0 and below 1")
    plan = Plan(options.service, options.qps, options.messages, options.loss, True if options.migrate else None)
    if options.trace:
        outcome, reason, log = attempt(options.seed, plan, trace=True)
        print("\n".join(trace_lines(log)))
        print(f"seed {options.seed}: {reason or 'every invariant held'}")
        if outcome is not None and options.json:
            print(json.dumps({key: value for key, value in asdict(outcome).items() if key != "log"}))
        return 1 if reason else 0
    sums: Counter[str] = Counter()
    broken: list[tuple[int, str]] = []
    started_at = time.monotonic()
    starts = range(options.seed, options.seed + options.schedules, CHUNK)
    with ProcessPoolExecutor(options.jobs) as pool:
        chunks = [
            pool.submit(run_chunk, first, min(CHUNK, options.seed + options.schedules - first), plan)
            for first in starts
        ]
        for chunk in chunks:
            more, failures = chunk.result()
            sums += more
            broken += failures
    _report(sums, broken, time.monotonic() - started_at, options)
    return 1 if broken else 0


def _report(sums: Counter[str], broken: list[tuple[int, str]], seconds: float, options: argparse.Namespace) -> None:
    if options.json:
        report: dict[str, Any] = {
            "seed": options.seed, "seconds": round(seconds, 1), **sums,
            "broken": [{"seed": seed, "reason": reason, "replay": replay(seed, options)} for seed, reason in broken],
        }  # fmt: skip
        print(json.dumps(report))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table("what", "number", title=f"seeds {options.seed} to {options.seed + options.schedules - 1}")
    table.columns[1].justify = "right"
    for name in sorted(sums, key=lambda name: (not name.startswith("schedules"), name)):
        if name == "virtual microseconds":
            table.add_row("virtual time", f"{sums[name] / 1e6:,.1f} s")
        else:
            table.add_row(name, f"{sums[name]:,}")
    table.add_row("real time", f"{seconds:,.1f} s ({sums['schedules'] / seconds:,.0f} schedules per second)")
    table.add_row("invariants violated", f"{len(broken):,}")
    console.print(table)
    for seed, reason in broken[:10]:
        console.print(f"seed {seed}: {reason}\n  {replay(seed, options)}", markup=False)


if __name__ == "__main__":
    sys.exit(main())
