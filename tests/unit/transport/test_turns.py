"""A queue pair's turn to send. Invariant: what can be sent is sent, wherever a turn ends, without a second doorbell."""

from __future__ import annotations

import pytest

from softroce_ext.simulation.hosts import BASE, ByteSink
from softroce_ext.transport.verbs import WcStatus
from tests.support.transport.pairs import READ, SEND, WRITE, deliver, pair


@pytest.mark.parametrize("packets", [1, 31, 32, 33, 63, 64, 65])
def test_a_request_behind_answers_that_fill_the_turn(packets: int) -> None:
    scene = pair(path_mtu=256)
    scene.here.post(READ, 1, BASE, 256 * packets)
    deliver(scene, scene.here.host.pull(0.0))
    scene.here.receive(7, BASE + 40000, 100)
    scene.there.post(SEND, 2, BASE, 10)
    scene.world.send(scene.there.host.pull(0.0))
    assert scene.there.sq.fetched == 1
    scene.world.run(lambda: len(scene.here.rcq.entries) == 1)


@pytest.mark.parametrize("room", range(1, 5))
def test_a_request_behind_an_ack_that_fills_the_room(room: int) -> None:
    scene = pair()
    scene.there.receive(7, BASE, 100)
    scene.here.post(SEND, 1, BASE, 10)
    deliver(scene, scene.here.host.pull(0.0))
    scene.there.post(WRITE, 2, BASE, 10)
    engine = scene.there.host.engine
    assert engine.frames_to_send(0.0, ByteSink(room)) == min(room, 2)
    assert engine.has_work() or room > 2
    scene.there.host.pull(0.0)
    assert scene.there.sq.fetched == 1


def test_a_resume_behind_answers_that_fill_the_turn() -> None:
    scene = pair()
    scene.here.post(WRITE, 1, BASE, 10)
    scene.there.post(WRITE, 1, BASE, 10)
    scene.world.settle(0.1)  # each knows that the other speaks MigrOS
    scene.here.post(WRITE, 2, BASE, 10)
    deliver(scene, scene.here.host.pull(0.0))
    scene.there.qp.stop()
    scene.there.qp.resume(None)
    engine = scene.there.host.engine
    assert engine.frames_to_send(0.0, ByteSink(1)) == 1
    assert len(scene.there.host.pull(0.0)) == 1 and engine.next_timer() is not None


@pytest.mark.parametrize("smaller", [2, 8, 16, 32, 64])
def test_a_window_that_shrinks_while_no_ack_was_requested(smaller: int) -> None:
    """Without an ACK timer nothing else would ever ask for one."""
    scene = pair(path_mtu=256, timeout=0)
    engine = scene.here.host.engine
    scene.here.post(WRITE, 1, BASE, 200 * 256)
    engine.config.quantum = 60  # fewer than the packets between two that ask for an ACK
    sink = ByteSink(60)
    engine.frames_to_send(0.0, sink)
    engine.window = smaller
    scene.world.send(sink.frames)
    scene.world.run(lambda: len(scene.here.scq.entries) == 1, 5.0)
    assert scene.here.scq.entries[0].status == WcStatus.SUCCESS
