"""Limits, versions and times that the documents state are those of the code (docs/wire-protocol.md: a test of its own).

Each row is a pattern with one group; the document must have it, and every match must be the value of the code.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from softroce_ext.cm.server import MAX_FILES
from softroce_ext.device import image
from softroce_ext.device.numbers import FIRST_QPN, MAX_BASE, RANGE
from softroce_ext.device.window import PACKETS_IN_FLIGHT
from softroce_ext.port.packet_socket import LOOPBACK_LIMIT
from softroce_ext.process.loop import LOOPBACK_FULL
from softroce_ext.process.nic import MAX_WINDOW
from softroce_ext.simulation.schedule import TIME_LIMIT
from softroce_ext.trace import queue_pairs
from softroce_ext.transport.engine import EngineConfig
from softroce_ext.transport.rc.responder import MAX_PENDING_ANSWERS
from softroce_ext.uverbs.commands import MAX_CHANNELS
from softroce_ext.uverbs.hw_counters import FRESHNESS, RXE_NAMES
from softroce_ext.uverbs.server import MAX_CONTEXTS
from softroce_ext.wire import headers
from testbed.agent.move_destination import ACK_SECONDS
from testbed.controller.routes import GENERATION, TOP_PRIORITY
from testbed.lab.applications import READY_TIMEOUT
from tests.fuzz.targets import TARGETS
from tests.support.fuzz.rounds import corpus

ROOT = Path(__file__).resolve().parents[3]
DOCS = ROOT / "docs"
BITS = [headers.MIGROS_CAPABLE, headers.MIGROS_RESUMED, headers.MIGROS_RECEIVER]


def constant(file: str, name: str) -> int:
    """The integer that a module which cannot be imported here assigns to `name`."""
    for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name and node.value is not None:
            return int(ast.literal_eval(node.value))
    raise AssertionError(f"{file} has no {name}")


NUMBERS = [
    ("paper.md", r"rxe has 128 packets of a queue pair in flight \| (\d+),", MAX_WINDOW),
    ("paper.md", r"and (\d+) of all queue pairs of a NIC together", PACKETS_IN_FLIGHT),
    ("paper.md", r"rxe has (\d+) packets of a queue pair", EngineConfig().window),
    ("paper.md", r"it asks again every (\d+) ms", round(EngineConfig().stale_stop_pause * 1000)),
    ("paper.md", r"syndrome (0x[0-9a-f]+)", headers.NAK_STOPPED),
    ("trace.md", r"`version` (\d+)", queue_pairs.VERSION),
    ("trace.md", r"after ([\d,]+) lines", queue_pairs.DEFAULT_LIMIT),
    ("nic-control.md", r"limit=(\d+) lines", queue_pairs.DEFAULT_LIMIT),
    ("nic-control.md", r"NIC image \(format version (\d+)\)", image.VERSION),
    ("nic-control.md", r"context ids \(0–(\d+)\)", MAX_BASE),
    ("nic-control.md", r"QPN = (\d+) \+ K", FIRST_QPN),
    ("nic-control.md", r"K·(\d+) \+ i", RANGE),
    ("counters.md", r"at most (0\.\d+) s", FRESHNESS),
    ("counters.md", r"the same (\d+) names", len(RXE_NAMES)),
    ("hostile-input.md", r"(\d+) answers (?:wait|are waiting)", MAX_PENDING_ANSWERS),
    ("hostile-input.md", r"use (\d+) openings of verbs and of rdma_cm", MAX_CONTEXTS),
    ("hostile-input.md", r"use (\d+) openings of verbs and of rdma_cm", MAX_FILES),
    ("hostile-input.md", r"(\d+) completion channels", MAX_CHANNELS),
    ("hostile-input.md", r"beyond (\d+) that wait", LOOPBACK_LIMIT),
    ("hostile-input.md", r"\(from (\d+) on", LOOPBACK_FULL),
    ("hostile-input.md", r"the corpus \((\d+) inputs\)", sum(len(corpus(name)) for name in TARGETS)),
    ("hostile-input.md", r"holds (\d+) such lines", sum(len(corpus(name)) for name in TARGETS)),
    *(("hostile-input.md", rf"\| `{name}` \|.*\| (\d+) × \d+ \|", target.rounds) for name, target in TARGETS.items()),
    ("simulation.md", r"within (\d+) s of virtual time", TIME_LIMIT),
    ("agent.md", r"within (\d+) seconds", READY_TIMEOUT),
    ("migration.md", r"waits \((\d+) s at most\)", ACK_SECONDS),
    ("controller.md", r"starting at (\d+)", TOP_PRIORITY),
    ("controller.md", r"can move (\d+) times", TOP_PRIORITY // GENERATION - 1),
    ("controller.md", r"cookie `(0x[0-9a-f]+)`", constant("testbed/controller/openflow.py", "COOKIE")),
]
"""Document, pattern, value."""


def number(text: str) -> float:
    return float(int(text, 16) if text.startswith("0x") else text.replace(",", ""))


@pytest.mark.parametrize(("document", "pattern", "value"), NUMBERS, ids=[f"{row[0]}: {row[1]}" for row in NUMBERS])
def test_a_number_is_the_code_s(document: str, pattern: str, value: float) -> None:
    text = (DOCS / document).read_text(encoding="utf-8")
    found = re.findall(pattern, re.sub(r"(?<=[^|\n])\n(?![\n|*-]) *", " ", text))
    assert found, f"docs/{document} has nothing like {pattern!r} any more"
    assert {number(match) for match in found} == {value}


@pytest.mark.parametrize("document", ["trace.md"])
def test_bits_are_the_code_s(document: str) -> None:
    found = re.findall(r"reserved bits (0x\w+), (0x\w+), (0x\w+)", (DOCS / document).read_text(encoding="utf-8"))
    assert [[int(bit, 16) for bit in row] for row in found] == [BITS]
