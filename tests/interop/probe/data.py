"""One end of scenarios that move data, for stock pyverbs: `python3 data.py`, then orders on standard input.

An order is a JSON line {"scenario", "name", "active", "peer", "port", "gids"}. The two ends of a scenario meet over
TCP; the passive one listens. Each prints what it saw, one `= text` for a line that must be the same whichever end plays
the role, and at last `end ok` or `end failed: why`. Numbers that differ from one run to the next have names instead.
"""

from __future__ import annotations

import json
import sys
import traceback
from typing import Any

import data_datagrams
import data_errors
import data_extended
import data_messages
import data_overflow
import data_queues
import data_windows
from data_side import Side, Talk

PARTS = (data_messages, data_queues, data_overflow, data_extended, data_windows, data_errors, data_datagrams)
SCENARIOS = {scenario.__name__: scenario for part in PARTS for scenario in part.SCENARIOS}


def play(order: dict[str, Any]) -> list[str]:
    """Play one role; the lines to print."""
    side: Side | None = None
    end = "end ok"
    try:
        talk = Talk(order["peer"], order["port"], not order["active"])
        side = Side(talk, order["name"], order["active"], order["gids"])
        SCENARIOS[order["scenario"]](side)
        side.meet()
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)
        where = next((frame for frame in reversed(place) if frame.name == order["scenario"]), place[-1])
        end = f"end failed: {type(error).__name__}: {error} (line {where.lineno})"
    lines = [f"= {line}" for line in side.lines] if side is not None else []
    try:
        if side is not None:
            side.close()
    except Exception as error:
        end = f"end failed: closing: {type(error).__name__}: {error}; {end}"
    return [*lines, end.replace("\n", " ")]


def main() -> None:
    """Orders until standard input ends."""
    print("ready", *SCENARIOS, flush=True)
    for line in sys.stdin:
        print("\n".join(play(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
