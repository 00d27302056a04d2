"""Data and completions are the same whichever NIC moves them: ours or Linux rxe.

Invariant: every scenario of probe/data*.py gives the same lines in each of its two roles, completion by completion, as
when rxe plays both (in the guest, over its loopback), whichever end ours plays, and whatever the link does to frames;
and every byte that arrives is right. Where rxe is wrong, `ALLOWED` says what ours does instead, and why.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

from tests.interop.ends import End, OwnEnd, Program
from tests.interop.guest.boot import Guest
from tests.interop.lab import Lab, lab
from tests.interop.matrix import LINKS

PROBE = Path(__file__).with_name("probe")
FILES = sorted(PROBE.glob("data*.py"))
THERE = "/probe"
SECONDS = 60.0
CLEAN = (
    "messages", "messages_6", "pieces", "empty", "inline", "fence", "reads", "unfenced", "atomics",
    "largest", "order", "beyond", "solicited", "shared", "not_ready", "drained", "receives_overflow", "sends_overflow",
    "extended", "misaligned", "polled", "polled_datagrams", "posted_windows", "posted_lists", "posted_datagrams",
    "window_1", "window_bounds", "window_2", "binds", "invalidated", "windows_again", "read_then_invalidated",
    "not_invalidated", "refused", "own_faults", "bad_receives", "gone", "flushed",
    "unreliable", "unreliable_faults", "datagrams", "dropped",
)  # fmt: skip
BAD = ("messages", "pieces", "fence", "reads", "atomics", "windows_again", "unreliable_lossy")
"""Also over links that lose, reorder and double frames. None where a request is refused: the NAK is sent only once."""
HANGS = {
    ("fence", "rxe>ours", link): "rxe falls silent after a NAK that finds it waiting at a fence (seen in a capture)"
    for link in ("loss", "reorder")
}
"""Not played over such links: rxe's own fault."""
PAIRS = ("ours>rxe", "rxe>ours", "ours>ours")
"""active>passive."""
IMPAIRED = {name: {kind: 3 * rate for kind, rate in link.items()} for name, link in LINKS.items() if link}
ACTIVE, PASSIVE = 0, 1
ALLOWED: tuple[tuple[str, int, int, str, str, str], ...] = (
    ("invalidated", PASSIVE, PASSIVE, "flags 5", "flags 9",
     "rxe gives user space the kernel's number of WITH_INV, which there means IP_CSUM_OK"),
    ("posted_windows", PASSIVE, PASSIVE, "flags 5", "flags 9", "the same"),
    ("windows_again", PASSIVE, PASSIVE, "flags 5", "flags 9", "the same"),
    ("read_then_invalidated", PASSIVE, PASSIVE, "flags 5", "flags 9", "the same"),
    ("not_invalidated", PASSIVE, PASSIVE, "SUCCESS LOCAL_INV(.*)\n= state RTS",
     r"LOC_QP_OP_ERR SEND\1" "\n= recv 101: FLUSHED\n= recv 102: FLUSHED\n= state ERR",
     "rxe lets a queue pair invalidate the type 2 window of another one (IBA 10.6.7: only its own)"),
    ("not_invalidated", PASSIVE, PASSIVE, "SUCCESS RECV len 10 flags 5 imm another queue pair's(.*)\n= state RTS",
     r"REM_INV_REQ_ERR SEND len 0 flags 0 imm 0x0\1" "\n= recv 102: FLUSHED\n= state ERR",
     "the same for its partner"),
    ("window_bounds", PASSIVE, ACTIVE, r"SUCCESS RDMA_WRITE len \d+(.*\n= state )RTS",
     r"REM_ACCESS_ERR SEND len 0\1ERR",
     "rxe 6.1 compares with the bounds of the window's region, not with those of the window"),
    ("window_bounds", PASSIVE, PASSIVE, "state RTS", "state ERR", "the same at the other end"),
    ("refused", PASSIVE, PASSIVE, "events: none", f"events: {', '.join(['QP_ACCESS_ERR'] * 12 + ['QP_REQ_ERR'] * 3)}",
     "rxe does not report the affiliated errors of the responder (IBA 11.6.3.2)"),
    ("bad_receives", PASSIVE, PASSIVE, "events: none", f"events: {', '.join(['QP_FATAL'] * 6)}",
     "the same when its own receives are wrong"),
    ("shared", PASSIVE, PASSIVE, r"(nothing more\n= events: )none", r"\1QP_LAST_WQE_REACHED",
     "rxe does not report that a queue pair has left its shared receive queue (IBA 11.6.3.1)"),
    ("own_faults", ACTIVE, ACTIVE, "LOC_QP_OP_ERR", "LOC_PROT_ERR",
     "rxe tells a key of nobody from a wrong range; to the IBA (11.6.2) both are protection errors"),
    ("dropped", ACTIVE, ACTIVE, "LOC_QP_OP_ERR", "LOC_PROT_ERR", "the same for a datagram"),
    ("dropped", PASSIVE, PASSIVE, r"= recv 101: LOC_QP_OP_ERR.*\n(= state )ERR", r"\1RTS",
     "to rxe a datagram that its receive cannot hold ends the queue pair: any stranger could"),
)  # fmt: skip
"""Scenario, the role that ours plays, the role whose lines differ, what rxe says, what is expected instead, why."""
FLUSHED = "WR_FLUSH_ERR SEND len 0 flags 0 imm 0x0 qp own from none vendor 0"
Lines = tuple[list[str], list[str]]
"""Active, passive."""


class Player:
    """A probe that waits for orders at one end."""

    def __init__(self, end: End) -> None:
        self.end = end
        self._program: Program | None = None

    def order(self, **order: object) -> None:
        """Begin a role."""
        if self._program is None:
            path = f"{THERE}/data.py" if isinstance(self.end, Guest) else str(PROBE / "data.py")
            self._program = self.end.start("/usr/bin/python3", "-B", path)
            ready = self._program.line(SECONDS)
            assert ready is not None, self._program.output
            assert set(ready.split()[1:]) == {*CLEAN, *BAD}, "a scenario is never played"
        self._program.write(json.dumps(order) + "\n")

    def answer(self) -> tuple[list[str], str]:
        """The role's lines, and how it ended. One that does not end is killed."""
        assert self._program is not None
        lines: list[str] = []
        while (line := self._program.line(SECONDS)) is not None:
            if line.startswith("end "):
                return lines, line
            lines.append(line)
        self.close()
        return lines, "end failed: no answer"

    def close(self) -> None:
        """End the probe."""
        if self._program is not None:
            self._program.kill()
            self._program.wait(5)
            self._program = None


class Stage:
    """Both ends of a lab, and for rxe a second probe in the same guest."""

    def __init__(self, place: Lab) -> None:
        self.lab = place
        place.prepare(4096)
        if isinstance(place.b, Guest):
            place.b.run("mkdir", "-p", THERE)
            for file in FILES:
                place.b.put(f"{THERE}/{file.name}", file.read_text())
        place.meet()
        self._players = (Player(place.a), Player(place.b), Player(place.b))
        self._gids = {end: {str(family): end.gid_index(family) for family in (4, 6)} for end in (place.a, place.b)}
        self._port = 18700
        self._known: dict[str, Lines] = {}

    def play(self, scenario: str, pair: str, link: dict[str, float] | None = None) -> Lines:
        """The lines of both roles. Fails if either does."""
        a, b, b2 = self._players
        players = {"rxe>rxe": (b, b2), "ours>rxe": (a, b), "rxe>ours": (b, a), "ours>ours": (a, b)}[pair]
        self.lab.cable.impair(**link or {})
        self._port += 1
        for player, other, active in zip(players, reversed(players), (True, False), strict=True):
            player.order(
                scenario=scenario, name=player.end.name, active=active, peer=other.end.ip4, port=self._port,
                gids=self._gids[player.end],
            )  # fmt: skip
        answers = [player.answer() for player in players]
        for player in players:
            assert not isinstance(player.end, OwnEnd) or player.end.alive(), "our NIC has ended"
        ends = [f"{role} {end}" for role, (_, end) in zip(("active", "passive"), answers, strict=True)]
        if ends != ["active end ok", "passive end ok"]:
            for player in players:
                player.close()
            raise AssertionError("\n".join([*ends, *answers[0][0][-6:], "--", *answers[1][0][-6:]]))
        return answers[0][0], answers[1][0]

    def reference(self, scenario: str) -> Lines:
        """What rxe says in both roles."""
        if scenario not in self._known:
            self._known[scenario] = self.play(scenario, "rxe>rxe")
        return self._known[scenario]

    def close(self) -> None:
        """End the probes."""
        for player in self._players:
            player.close()


@pytest.fixture(scope="module")
def with_rxe(rxe_lab: Lab) -> Iterator[Stage]:
    """Ours and the guest."""
    stage = Stage(rxe_lab)
    yield stage
    stage.close()


@pytest.fixture(scope="module")
def by_ourselves() -> Iterator[Stage]:
    """Two NICs of ours."""
    with lab(None) as place:
        stage = Stage(place)
        yield stage
        stage.close()


def expected(scenario: str, pair: str, reference: Lines) -> list[str]:
    """The text of both roles: rxe's, but for what is allowed."""
    texts = ["\n".join(lines) for lines in reference]
    for name, ours, role, pattern, replacement, why in ALLOWED:
        if name == scenario and pair.split(">")[ours] == "ours":
            texts[role], count = re.subn(pattern, replacement.replace("FLUSHED", FLUSHED), texts[role])
            assert count, f"rxe does not do this any more: {why}"
    return texts


def compare(scenario: str, pair: str, reference: Lines, lines: Lines) -> None:
    """Fails with the differences."""
    found = [
        f"{role} {line}"
        for role, wanted, got in zip(("active", "passive"), expected(scenario, pair, reference), lines, strict=True)
        for line in difflib.unified_diff(wanted.splitlines(), got, "expected", "here", lineterm="", n=2)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("scenario", CLEAN)
def test_scenario(scenario: str, pair: str, with_rxe: Stage, by_ourselves: Stage) -> None:
    """Over a clean link."""
    stage = by_ourselves if pair == "ours>ours" else with_rxe
    compare(scenario, pair, with_rxe.reference(scenario), stage.play(scenario, pair))


@pytest.mark.parametrize(
    ("scenario", "pair", "link"), [case for case in product(BAD, PAIRS, IMPAIRED) if case not in HANGS]
)
def test_scenario_on_a_bad_link(scenario: str, pair: str, link: str, with_rxe: Stage, by_ourselves: Stage) -> None:
    """Losses, changes of order and duplicates change nothing that a program can see."""
    stage = by_ourselves if pair == "ours>ours" else with_rxe
    impaired = 0
    for seed in range(8):
        compare(
            scenario, pair, with_rxe.reference(scenario), stage.play(scenario, pair, {**IMPAIRED[link], "seed": seed})
        )
        impaired += sum(way[what] for way in stage.lab.cable.counts() for what in ("lost", "reordered", "duplicated"))
        if impaired >= 3:
            return
    assert impaired, "the link was not bad"
