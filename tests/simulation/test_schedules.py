"""The simulator itself: a seed is a schedule, byte for byte; a broken core is caught; many queue pairs share a network.

What the schedules check is written in softroce_ext/simulation/schedule.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from softroce_ext.simulation.__main__ import attempt, main, run_chunk
from softroce_ext.simulation.schedule import Plan
from softroce_ext.transport import engine
from softroce_ext.transport.rc import completer, responder
from softroce_ext.transport.rc.queue_pair import RcQueuePair
from softroce_ext.wire.frame import Packet, parse
from softroce_ext.wire.headers import PSN_MASK
from softroce_ext.wire.icrc import SEED_IPV4, crc32


def run_command(*words: str, hash_seed: str = "0") -> str:
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    command = [sys.executable, "-m", "softroce_ext.simulation", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("words", [["--seed", "7"], ["--seed", "11", "--service", "uc"], ["--seed", "5", "--migrate"]])
def test_a_seed_is_a_schedule(words: list[str]) -> None:
    """Two processes with different hash seeds print the same packets."""
    first, second = (run_command("--trace", *words, hash_seed=seed) for seed in ("1", "2"))
    assert first == second
    assert "PSN" in first and "every invariant held" in first


def test_every_service_is_drawn_and_holds() -> None:
    sums, broken = run_chunk(0, 300, Plan())
    assert broken == []
    for name in ("schedules rc", "schedules uc", "schedules ud", "migrations", "frames lost", "frames duplicated"):
        assert sums[name] > 0, name


@pytest.mark.parametrize("service", ["rc", "uc", "ud"])
def test_thousands_of_queue_pairs(service: str) -> None:
    """2000 queue pairs on two NICs and one lossy wire."""
    outcome, reason, _ = attempt(3, Plan(service, qps=1000, messages=2, loss=0.02))
    assert outcome is not None, reason
    assert outcome.completions > 2000 and outcome.faults["lost"] > 10


@pytest.mark.parametrize("seed", [101447, 127593, 130516, 145505, 152566, 155622, 156076])
def test_an_rnr_nak_while_paused_does_not_silence_the_queue_pair(seed: int) -> None:
    """Seeds that found it: RNR NAK after a stale NAK_STOPPED; its wait ended unseen and nothing was sent any more."""
    _, reason, _ = attempt(seed, Plan(short_turns=False))
    assert reason == ""


def test_bad_arguments_are_told() -> None:
    with pytest.raises(SystemExit) as refused:
        main(["--schedules", "0"])
    assert refused.value.code == 2


# -- mutants: faults that a NIC could have; each must break an invariant within a few hundred seeds -------------------


def acknowledge_one_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = completer.acknowledge
    monkeypatch.setattr(completer, "acknowledge", lambda qp, until, now: honest(qp, until + 1 & PSN_MASK, now))


def complete_before_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = engine.Engine.end_of_batch

    def hasty(self: engine.Engine, now: float) -> None:
        self.publish()
        honest(self, now)

    monkeypatch.setattr(engine.Engine, "end_of_batch", hasty)


def execute_duplicate_atomics(monkeypatch: pytest.MonkeyPatch) -> None:
    honest: Callable[..., None] = responder._duplicate

    def again(qp: Any, packet: Packet, flags: int) -> None:
        if flags & responder._ATOMIC:
            responder._atomic(qp, packet)
        else:
            honest(qp, packet, flags)

    monkeypatch.setattr(responder, "_duplicate", again)


def believe_a_wrong_icrc(monkeypatch: pytest.MonkeyPatch) -> None:
    def trusting(frame: memoryview) -> Packet | str:
        packet = parse(frame)
        if packet != "icrc" or frame[12:14] != b"\x08\x00":
            return packet
        repaired = bytearray(frame)
        end = int.from_bytes(frame[16:18]) + 10
        head = bytearray(frame[16:50])
        head[6] = head[8] = head[9] = 0xFF
        head[24:26] = b"\xff\xff"
        head[30] = 0xFF
        repaired[end : end + 4] = crc32(bytes(frame[50:end]), crc32(bytes(head), SEED_IPV4)).to_bytes(4, "little")
        return parse(memoryview(repaired))

    monkeypatch.setattr(engine, "parse", trusting)


def execute_duplicate_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    honest: Callable[..., None] = responder._duplicate

    def again(qp: Any, packet: Packet, flags: int) -> None:
        if flags & responder._SEND and not qp.receiver.message:
            responder.execute_send(qp, packet, flags, 0.0)
        else:
            honest(qp, packet, flags)

    monkeypatch.setattr(responder, "_duplicate", again)


def take_what_is_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    honest: Callable[..., None] = responder.receive_request

    def hasty(qp: Any, packet: Packet, flags: int, now: float) -> None:
        if 0 < (packet.psn - qp.receiver.expected_psn & PSN_MASK) < 4 and flags & responder._WRITE:
            qp.receiver.expected_psn = packet.psn
        honest(qp, packet, flags, now)

    monkeypatch.setattr(responder, "receive_request", hasty)


def forget_what_a_full_turn_left(monkeypatch: pytest.MonkeyPatch) -> None:
    honest: Callable[..., int] = RcQueuePair.transmit

    def short(self: RcQueuePair, now: float, sink: engine.FrameSink, budget: int) -> int:
        sent = honest(self, now, sink, budget)
        if sent == budget and not self.receiver.answers:
            self.more = False
        return sent

    monkeypatch.setattr(RcQueuePair, "transmit", short)


@pytest.mark.parametrize(
    "mutant",
    [
        acknowledge_one_too_many,
        complete_before_the_data,
        execute_duplicate_atomics,
        believe_a_wrong_icrc,
        execute_duplicate_sends,
        take_what_is_ahead,
        forget_what_a_full_turn_left,
    ],
    ids=lambda mutant: mutant.__name__,
)
def test_a_broken_core_is_caught(mutant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    mutant(monkeypatch)
    for seed in range(1500):
        _, reason, _ = attempt(seed, Plan("rc"))
        if reason:
            return
    pytest.fail("1500 schedules did not notice")
