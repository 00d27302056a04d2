"""QP1. Invariants: MADs leave as rxe's do; whole MADs with QP1's Q_Key come through, after the data before them."""

from __future__ import annotations

from softroce_ext.simulation.hosts import BASE, ByteSink, Host
from softroce_ext.wire.headers import BTH_DETH
from tests.support.transport import rxe_captures as captures
from tests.support.transport.pairs import SEND, pair
from tests.support.transport.rxe_captures import parsed, path_of

MAD = captures.read("cm_rping")[0]
QKEY = 0x11111111
"""Not that of QP1."""


def test_a_mad_leaves_as_rxe_sends_it() -> None:
    packet = parsed(MAD.frame)
    engine = Host(1).engine
    path = path_of(MAD)
    engine.gsi._psn = packet.psn
    path.ip_id = MAD.ip_id
    engine.gsi.send(path, bytes(packet.payload))
    sink = ByteSink(1)
    assert engine.frames_to_send(0.0, sink) == 1
    assert sink.frames[0].hex() == MAD.frame.hex()


def test_only_mads_come_through() -> None:
    engine = Host(1).engine
    seen: list[tuple[int, bytes]] = []
    engine.receive(memoryview(MAD.frame), 0.0)
    engine.end_of_batch(0.0)
    assert engine.counters["refused_mad"] == 1, "there is no listener"
    engine.gsi.on_mad = lambda packet, source, mad, now: seen.append((source, bytes(mad)))
    engine.receive(memoryview(MAD.frame), 0.0)
    engine.end_of_batch(0.0)
    assert seen == [(1, bytes(parsed(MAD.frame).payload))]
    sink = ByteSink(4)
    sink.add(path_of(MAD), BTH_DETH.pack(0x6400FFFF, 1, 0, QKEY, 0x11), bytes(256), 0)
    sink.add(path_of(MAD), BTH_DETH.pack(0x6400FFFF, 1, 0, 0x80010000, 0x11), bytes(252), 0)
    for frame in sink.frames:
        engine.receive(memoryview(frame), 0.0)
    engine.end_of_batch(0.0)
    assert len(seen) == 1
    assert engine.counters["refused_qkey"] == 1 and engine.counters["refused_mad"] == 2


def test_data_are_there_before_the_mad_behind_them_is_heard() -> None:
    """A DREQ that comes in one batch with the last message: who hears of it finds the completion, and the data."""
    scene = pair()
    scene.there.receive(7, BASE + 4096, 1000)
    scene.here.post(SEND, 1, BASE, 1000)
    seen: list[tuple[int, bool]] = []

    def heard(*_: object) -> None:
        whole = scene.there.ram.data[4096:5096] == scene.here.ram.data[:1000]
        seen.append((len(scene.there.rcq.entries), whole))

    scene.there.host.engine.gsi.on_mad = heard
    scene.there.host.turn([MAD.frame, *scene.here.host.pull(0.0), MAD.frame], 0.0)
    assert seen == [(1, True)] * 2
