"""Expands the table of programs into cases and runs them.

A case is one program with one size, path MTU, address family, direction and kind of link. It passes when both ends end
with 0, neither says that data were wrong, and our NIC is alive with nothing of the programs left in it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from tests.interop.ends import End, OwnEnd, Program
from tests.interop.lab import Lab
from tests.interop.programs import ROWS, SIZES, WRONG, Row, bytes_of

DIRECTIONS: Final = ("ours>rxe", "rxe>ours", "ours>ours")
"""client>server."""
LINKS: Final[dict[str, dict[str, float]]] = {
    "clean": {},
    "loss": {"loss": 0.01},
    "reorder": {"reorder": 0.02},
    "duplicate": {"duplicate": 0.02},
}
"""Probabilities for each RoCE frame, in both directions."""
KNOWN: Final = {
    ("mckey", direction, 6): "Linux itself refuses to join an IPv6 group over rxe (error 524, ENOTSUPP)"
    for direction in ("ours>rxe", "rxe>ours")
}
"""Failures that are not ours: shown as failed, but they do not fail the whole run. (program, direction, family)."""
NOT_LISTENING: Final = re.compile(r"REJECTED[;,] (status|error):? 8|UNREACHABLE; error: 1\b|[Ee]vent rejected")
"""Said by a client of rdma_cm that came before its server listened (IBA 12.6.7.2: reason 8, no such service).

perftest -R and qperf connect twice or more, and their servers listen again in between without any sign of it: a slow
server is then too late. Such a case is run again from the beginning, up to `_ATTEMPTS` times in all.
"""
_ATTEMPTS: Final = 6
_BAD_LINK_ATTEMPTS: Final = 2
"""Where frames are lost, one may be the ACK of the last message of all, to a program whose partner has ended with it:
its retransmissions go unanswered, whichever NICs are used. And over bad links rxe 6.1 may send a request by the PSN of
another one, which must be refused: the relay has seen it (`Result.renumbered`). No other failure is tried again: what
fails once in a hundred times is a fault too."""
MTUS: Final = (1024, 4096)
GROUPS: Final = {4: "239.9.0.1", 6: "ff05::9:1"}
GROUP_MACS: Final = ("01005e090001", "333300090001")
"""RFC 1112, RFC 2464."""
_SECONDS: Final = 60.0
_JOIN_SECONDS: Final = 0.8
"""From the interface's joining a group to the queue pair's: nothing tells of that."""


@dataclass(frozen=True)
class Case:
    """One thing to run."""

    row: Row
    size: str
    mtu: int
    family: int
    direction: str
    link: str = "clean"

    def __str__(self) -> str:
        return f"{self.row.name}, {self.size}, MTU {self.mtu}, IPv{self.family}, {self.direction}, {self.link}"


@dataclass(frozen=True)
class Result:
    """What came of it."""

    case: Case
    ok: bool
    seconds: float
    reason: str = ""
    """Of a failure, in a line."""
    outputs: tuple[str, str] = ("", "")
    """Server's and client's, of a failure."""
    frames: int = 0
    impaired: int = 0
    """RoCE frames that passed, and how many of them were lost, reordered or duplicated."""
    renumbered: int = 0
    """Requests of rxe that went by other requests' PSNs."""
    before: str = ""
    """Why it failed at its first try, when there were several."""


def rows(managed: bool) -> list[Row]:
    """The table; `managed`: with the programs that need rdma_cm."""
    return [row for row in ROWS if managed or not row.needs_cm]


def full(managed: bool = True) -> Iterator[Case]:
    """Every size, MTU, family and direction on a clean link; on bad links a message of several packets."""
    for direction in DIRECTIONS:
        for mtu in MTUS:
            for row in rows(managed):
                for family in row.families:
                    for size in row.sizes:
                        yield Case(row, size, mtu, family, direction)
                if not row.lossless:
                    for link in list(LINKS)[1:]:
                        yield Case(row, _several(row), mtu, 4, direction, link)


def _several(row: Row) -> str:
    """The size class for bad links."""
    return "mtus" if "mtus" in row.sizes else row.sizes[-1]


QUICK_SIZES: Final = ("ibv_rc_pingpong", "ib_write_bw", "ib_read_lat")
"""Programs that try every size in the quick matrix too."""
QUICK_BAD: Final = ("ibv_rc_pingpong", "ib_write_bw", "ib_read_bw", "ib_atomic_lat -A FETCH_AND_ADD", "rping")
"""Programs that try every bad link in the quick matrix."""
QUICK_6: Final = ("ibv_rc_pingpong", "ibv_uc_pingpong", "ibv_ud_pingpong", "ib_write_bw", "rping", "udaddy", "mckey")


def quick(managed: bool = True) -> Iterator[Case]:
    """A part for CI: each program in both directions with rxe, each dimension with a few of them."""
    for direction in DIRECTIONS:
        own = direction == "ours>ours"
        for row in rows(managed):
            if not own or row.name in QUICK_6:
                yield Case(row, _several(row), 1024, 4, direction)
            if row.name in QUICK_6:
                yield Case(row, _several(row), 1024, 6, direction)
            if row.name in QUICK_SIZES and not own:
                for size in SIZES:
                    if size != _several(row):
                        yield Case(row, size, 1024, 4, direction)
            if row.name in QUICK_BAD and not own:
                for link in list(LINKS)[1:]:
                    yield Case(row, _several(row), 1024, 4, direction, link)
        for row in rows(managed):
            if row.name in (*QUICK_SIZES, "ib_send_bw UD", "ib_send_bw UC") and not own:
                yield Case(row, _several(row), 4096, 4, direction)


def count(row: Row, size: int, bad: bool) -> int:
    """How many messages: enough for a bad link to have its effect, few enough for an emulated machine."""
    if size >= 1 << 20:
        return 5
    return (200 if bad and row.transport == "RC" else 40) // row.slow


def run(lab: Lab, case: Case, seed: int) -> Result:
    """Run one case in a lab that is prepared for its MTU and peer."""
    server, client = lab.ends(case.direction)
    size = bytes_of(case.size, case.mtu)
    values = {
        "mtu": case.mtu, "size": size, "group": GROUPS[case.family],
        "count": count(case.row, size, case.link != "clean"),
        # Programs that talk over TCP first do so over IPv4: what counts is the GID.
        "ip": server.ip(case.family if case.row.cm or case.row.steady else 4),
    }  # fmt: skip
    lab.cable.impair(**LINKS[case.link], seed=seed)
    begin = time.monotonic()
    try:
        gids = [end.gid_index(case.family) for end in (server, client)]
    except Exception as error:  # a missing GID is this case's failure, not the run's
        return Result(case, False, time.monotonic() - begin, str(error))
    listening = server.start(*case.row.words("server", gid=gids[0], own=server.ip(case.family), **values))
    calling = None
    try:
        _wait_for_listener(server, case.row, listening)
        calling = client.start(*case.row.words("client", gid=gids[1], own=client.ip(case.family), **values))
        called = calling.finish(_SECONDS)
        if case.row.steady:
            listening.kill()
        served = listening.finish(5 if called[0] else 20)
    finally:
        for program in (listening, calling):
            if program is not None and program.code is None:
                program.kill()
                program.wait(5)
    seconds = time.monotonic() - begin
    reason = _reason(case, served, called) or _harm(lab)
    counts = lab.cable.counts()
    return Result(
        case, not reason, seconds, reason, (served[1], called[1]) if reason else ("", ""),
        sum(way["roce"] for way in counts),
        sum(way[name] for way in counts for name in ("lost", "reordered", "duplicated")),
        counts[1]["renumbered"] if case.direction != "ours>ours" else 0,
    )  # fmt: skip


def _wait_for_listener(server: End, row: Row, listening: Program) -> None:
    if row.port:
        server.listens(row.port)
    if row.cm:
        there = (lambda: _in_group(server)) if row.name == "mckey" else server.listens_cm
        deadline = time.monotonic() + 15
        while not there() and listening.wait(0.05) is None and time.monotonic() < deadline:
            pass
    if row.name == "mckey":
        time.sleep(_JOIN_SECONDS)


def _in_group(end: End) -> bool:
    """Whether the interface takes the packets of a group of `GROUPS` (proc(5), /proc/net/dev_mcast)."""
    table = end.read("/proc/net/dev_mcast")
    return any(mac in table for mac in GROUP_MACS)


def _reason(case: Case, served: tuple[int, str], called: tuple[int, str]) -> str:
    for side, (code, output), steady in (("client", called, False), ("server", served, case.row.steady)):
        lines = [line.strip() for line in output.splitlines() if line.strip() and not line.startswith("---")]
        if code != 0 and not steady:
            return f"{side} ended with {code}: {lines[-1] if lines else 'no output'}"
        if found := WRONG.search(output):
            return f"{side} said: {found.group()}"
    return ""


def _harm(lab: Lab) -> str:
    """What a case has done to our NICs."""
    for end in (lab.a, lab.b):
        if isinstance(end, OwnEnd):
            if not end.alive():
                return "our NIC has ended"
            deadline = time.monotonic() + 10
            while end.contexts() and time.monotonic() < deadline:
                time.sleep(0.02)
            if end.contexts():
                return f"left in our NIC: {end.contexts()}"
    return ""


def tried(lab: Lab, case: Case, seed: int, *options: str) -> Result:
    """As `run`; again with fresh NICs and another seed if the failure has an outside cause. options: of our NIC."""
    result = run(lab, case, seed)
    for attempt in range(1, _ATTEMPTS):
        late = NOT_LISTENING.search(result.outputs[1]) is not None
        excused = case.link == "loss" or result.renumbered > 0
        if result.ok or not (late or (excused and attempt < _BAD_LINK_ATTEMPTS)):
            break
        lab.prepare(case.mtu, *options)
        lab.meet()
        reason = result.reason + (" (rxe gave PSNs to other requests)" if result.renumbered else "")
        result = replace(run(lab, case, seed + attempt), before=result.before or reason)
    return result


def run_all(lab: Lab, cases: Iterable[Case], seed: int, tell: Callable[[Result], None]) -> list[Result]:
    """Run cases of one peer, in the order given; NICs are recreated when the MTU changes and after a failure."""
    results: list[Result] = []
    prepared = 0
    for case in cases:
        if prepared != case.mtu:
            lab.prepare(case.mtu)
            lab.meet()
            prepared = case.mtu
        result = tried(lab, case, seed)
        results.append(result)
        tell(result)
        if not result.ok:
            prepared = 0
    return results
