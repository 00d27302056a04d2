"""Invariant: a queue pair has one connection. A peer requesting another forgot the old one (IBA 12.9.8.3.1)."""

from __future__ import annotations

import pytest

from softroce_ext.cm.connection import State
from softroce_ext.wire.path import Path
from tests.support.cm.net import PORT, A, B, C, Scene, connected, move


def states(scene: Scene) -> list[State]:
    """Of the server's connections, oldest first."""
    return [connection.state for connection in scene.ends["server"].cm.connections.by_id.values()]


def ask(scene: Scene, qpn: int, place: bytes = B) -> None:
    scene.ends["client"].connect(place, qpn=qpn)
    scene.net.deliver()


@pytest.mark.parametrize("qpn", [17, 19], ids=["the same queue pair", "another one"])
def test_a_queue_pair_that_requests_a_connection_again(qpn: int) -> None:
    scene = connected()
    ask(scene, qpn)
    old = State.TIMEWAIT if qpn == 17 else State.ESTABLISHED  # the client answers the DREQ of its connection
    assert states(scene) == [old, State.REQ_RCVD]


def test_after_the_client_has_moved() -> None:
    """Its queue pair is known at its new address, and at the old one no more."""
    scene = connected()
    there, here = scene.client, scene.spare
    move(there, here, {A: C})
    scene.ends["client"] = here
    scene.server.cm.connections.peer_moved(17, A, Path(scene.server.mac, here.mac, B, C, 0))
    stranger, scene.ends["client"] = there, there
    stranger.connect(B, qpn=17)
    scene.net.deliver()
    assert states(scene) == [State.ESTABLISHED, State.REQ_RCVD]
    scene.ends["client"] = here
    ask(scene, 17)
    assert states(scene) == [State.TIMEWAIT, State.REQ_RCVD, State.REQ_RCVD]


def test_after_the_server_has_moved() -> None:
    scene = connected()
    scene.move("server")
    ask(scene, 17)
    assert states(scene) == [State.TIMEWAIT, State.REQ_RCVD]


def test_nothing_is_left_of_what_is_over() -> None:
    scene = connected()
    scene.step_disconnect()
    scene.step_settle()
    for nic in (scene.client, scene.server):
        assert not nic.cm.connections._by_qp
        assert not nic.cm.connections._qps


def test_a_held_program_keeps_its_connection() -> None:
    """The REQ is for another program's listener: the held one's connection is frozen and sends nothing."""
    scene = connected()
    nic = scene.server
    nic.hold()
    held, nic.file = nic.file, nic.new_file(nic.adapter.guid, "2-1")
    nic.listen(port=PORT + 1)
    scene.client.connect(B, qpn=17, port=PORT + 1)
    scene.net.deliver()
    assert states(scene) == [State.ESTABLISHED, State.REQ_RCVD]
    assert not nic.cm._timed
    assert not held.queue.events
