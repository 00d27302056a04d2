"""Long runs: `python -m tests.fuzz [--minutes N | --rounds N] [--seed S] [TARGET…]`.

Every target gets the same share. The corpus is replayed first. Without options: CI's budget. Exit code 1 when an
invariant was violated; each failure names the seed that repeats it (`--seed S --rounds 1 TARGET`) and is shown as a
line for the corpus (`tests/fuzz/corpus/TARGET.jsonl`).
"""

from __future__ import annotations

import argparse
import sys
import time

from tests.fuzz.targets import TARGETS
from tests.support.fuzz.rounds import HEADING, Tally, corpus, run_rounds


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; default: all")
    parser.add_argument("--minutes", type=float, help="for all targets together")
    parser.add_argument("--rounds", type=int, help="rounds of each target (a round is some hundred cases)")
    parser.add_argument("--seed", type=int, help="of the first round; default: from the clock")
    options = parser.parse_args()
    unknown = set(options.targets) - set(TARGETS)
    if unknown:
        parser.error(f"unknown target {', '.join(sorted(unknown))}: there are {', '.join(TARGETS)}")
    names = options.targets or list(TARGETS)
    seed = options.seed if options.seed is not None else int(time.time())
    stored = {name: corpus(name) for name in names}
    print(f"seed {seed}, corpus: {sum(map(len, stored.values()))} inputs")
    tallies = []
    for name in names:
        target = TARGETS[name]
        tally = Tally(name, seed)
        for _, entry in stored[name]:
            target.replay(entry["scene"], entry["steps"], tally)
        if options.minutes:
            until = time.monotonic() + 60 * options.minutes / len(names)
            start = seed
            while time.monotonic() < until and not tally.failures:
                tally.seed = start
                run_rounds(tally, 10, target.one_round, target.replay)
                start += 10
            tally.seed = seed
        else:
            run_rounds(tally, options.rounds or target.rounds, target.one_round, target.replay)
        tallies.append(tally)
    print(HEADING)
    for tally in tallies:
        print(tally.row())
    for tally in tallies:
        for failure in tally.failures:
            print("\n" + failure)
    return int(any(tally.failures for tally in tallies))


if __name__ == "__main__":
    sys.exit(main())
