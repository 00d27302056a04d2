"""A NAK that the link duplicates. Invariant: it counts once; retry counts are for losses, not for copies."""

from __future__ import annotations

from softroce_ext.simulation.hosts import BASE
from softroce_ext.transport.verbs import QpState, WcStatus
from tests.support.transport.pairs import SEND, WRITE, deliver, pair


def test_a_sequence_nak() -> None:
    scene = pair(retry_cnt=1)
    here, there = scene.here, scene.there
    for number in range(3):
        here.post(WRITE, number, BASE, 10)
    deliver(scene, here.host.pull(0.0)[1:])
    (nak,) = there.host.pull(0.0)
    deliver(scene, [nak], here=True)
    again = here.host.pull(0.0)
    deliver(scene, [nak], here=True)
    assert here.attributes.state == QpState.RTS and not here.host.pull(0.0), "sent a second time"
    deliver(scene, again)
    deliver(scene, there.host.pull(0.0), here=True)
    assert [wc.status for wc in here.scq.entries] == [WcStatus.SUCCESS] * 3


def test_a_receiver_not_ready_nak() -> None:
    scene = pair(rnr_retry=1)
    here, there = scene.here, scene.there
    here.post(SEND, 1, BASE, 10)
    deliver(scene, here.host.pull(0.0))
    (nak,) = there.host.pull(0.0)
    deliver(scene, [nak, nak], here=True)
    assert here.attributes.state == QpState.RTS
    there.receive(7, BASE, 10)
    scene.world.run(lambda: len(here.scq.entries) == 1)
    assert here.scq.entries[0].status == WcStatus.SUCCESS
