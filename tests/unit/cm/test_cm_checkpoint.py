"""Programs that use rdma_cm are moved.

Invariants: dump → restore → dump is the identity; a held program's ids send nothing, and nothing is taken for them, so
that whatever a peer says meanwhile it says again afterwards; connecting, accepting, disconnecting and listening go on
at the new place as if nothing had happened, at whatever moment the program was frozen; a damaged record is refused with
nothing left.
"""

from __future__ import annotations

import copy
import random
import struct
from typing import Any

import pytest

from softroce_ext.cm import checkpoint, ucma
from softroce_ext.cm.connection import State
from softroce_ext.cm.ids import EventType
from softroce_ext.device.errors import ImageError
from softroce_ext.wire.path import Path
from tests.support.cm.net import (
    CONNECT_REQUEST,
    CONNECT_RESPONSE,
    DISCONNECTED,
    ESTABLISHED,
    PORT,
    STEPS,
    A,
    B,
    C,
    Net,
    Nic,
    Scene,
    connected,
    move,
)


@pytest.mark.parametrize("who", ["client", "server"])
@pytest.mark.parametrize("moment", range(1, len(STEPS) + 1))
def test_moved_at_any_moment(who: str, moment: int) -> None:
    """The programs hear the same, whichever moves and whenever; messages that came meanwhile are repeated."""
    scene = Scene()
    for number, step in enumerate(STEPS, 1):
        step(scene)
        if number == moment:
            scene.move(who)
    scene.step_settle()
    end = [DISCONNECTED, EventType.TIMEWAIT_EXIT.value]
    assert scene.heard["client"][-4:] == [CONNECT_RESPONSE, *end] or scene.heard["client"] == [
        0,
        2,
        CONNECT_RESPONSE,
        *end,
    ]
    assert scene.heard["server"] == [CONNECT_REQUEST, ESTABLISHED, *end]
    for nic in (scene.client, scene.server, scene.spare):
        assert not nic.cm.connections.by_id
        assert not nic.cm._timed


def test_round_trip() -> None:
    """Every field, with events that wait and a connection that is being made."""
    scene = Scene()
    scene.server.listen()
    scene.client.connect(B)
    scene.net.deliver()
    for nic in (scene.client, scene.server):
        image = nic.hold()
        assert image[0]["events"]
        assert any(item["connection"] for item in image[0]["ids"])
        before = copy.deepcopy(image)
        nic.cm.discard(nic.file.queue)
        assert not nic.cm.ids and not nic.cm.connections.by_id
        nic.restore(image)
        assert checkpoint.dump(nic.cm, [nic.file]) == before


def test_nothing_is_said_and_nothing_heard_meanwhile() -> None:
    scene = connected()
    scene.server.hold()
    scene.net.now += 3600
    scene.server.cm.on_timer(scene.net.now)
    assert scene.net.wire == []
    scene.step_disconnect()
    scene.net.deliver()
    assert scene.server.cm.counters["held"] == 1
    assert not scene.server.file.queue.events
    scene.server.cm.discard(scene.server.file.queue)
    assert scene.net.wire == []


def test_a_listener_goes_on_listening_and_the_device_is_the_one_that_it_knows() -> None:
    scene = connected()
    there = scene.server
    known = there.adapter.guid
    scene.move("server")
    there = scene.ends["server"]
    scene.ends["client"].connect(B, uid=4, qpn=19)
    scene.net.deliver()
    ((uid, handle, kind),) = there.events()
    assert (uid, kind) == (1, CONNECT_REQUEST)
    assert handle >> 20 == 3, "a new id has the number range of the NIC where it was made"
    route = there.call(ucma.Command.QUERY_ROUTE, struct.pack("<QII", 0, handle, 0))
    assert route[:8] == known != there.adapter.guid


def test_the_address_changes_and_the_peer_is_told() -> None:
    """RESUME tells the peer's NIC; from then on disconnecting goes to the new address and is accepted from it."""
    scene = connected()
    there, here = scene.server, scene.spare
    move(there, here, {B: C})
    scene.ends["server"] = here
    path = Path(bytes(6), here.mac, A, C, 0)
    scene.client.cm.connections.peer_moved(18, B, path)
    scene.step_disconnect()
    scene.step_settle()
    assert scene.heard["server"][-2:] == scene.heard["client"][-2:] == [DISCONNECTED, EventType.TIMEWAIT_EXIT.value]
    assert not here.cm.counters["unknown_connection"] + scene.client.cm.counters["unknown_connection"]


def test_what_is_here_is_not_overwritten() -> None:
    scene = connected()
    image = scene.server.hold()
    with pytest.raises(ImageError, match="is taken here; number bases must differ"):
        scene.server.restore(image)
    other = Nic(scene.net, 4, bytes((10, 77, 0, 4)))
    other.listen()
    with pytest.raises(ImageError, match=f"rdma_cm port {PORT} is taken here by another program"):
        other.restore(image)
    assert len(other.cm.ids) == 1 and not other.cm.connections.by_id


@pytest.mark.parametrize("over", [False, True], ids=["established", "over"])
def test_damaged_records_are_refused_whole(over: bool) -> None:
    """One value of the image changed to another of its kind, or of another: restored or refused, never half."""
    scene = connected()
    if over:
        scene.step_disconnect()
        scene.step_settle()
    image = scene.server.hold()
    assert [item["connection"]["path"] is None for item in image[0]["ids"] if item["connection"]] == [over]
    chance = random.Random(7)
    refused = 0
    for _ in range(600):
        damaged = copy.deepcopy(image)
        places: list[tuple[Any, Any]] = []

        def walk(item: Any, places: list[tuple[Any, Any]] = places) -> None:
            for key, value in item.items() if isinstance(item, dict) else enumerate(item):
                places.append((item, key))
                if isinstance(value, (dict, list)):
                    walk(value, places)

        walk(damaged)
        holder, key = chance.choice(places)
        holder[key] = chance.choice((None, -1, 0, 1, 2, 1 << 70, "", "ff", "zz", [], {}, True, 1.5, "\x00" * 9000))
        nic = Nic(Net(), 3, C)
        try:
            nic.restore(damaged)
        except ImageError as error:
            refused += 1
            assert "\n" not in str(error)
            assert not nic.cm.ids and not nic.cm.connections.by_id and not nic.cm.groups.by_handle
            assert not nic.cm.ports._ids or not any(nic.cm.ports._ids.values())
        else:
            nic.release()
            nic.net.pass_time(30, nic)
            nic.cm.close(nic.file.queue, nic.net.now)
            nic.net.pass_time(200, nic)
            assert not nic.cm.ids
    assert refused > 300


def test_a_message_tells_where_the_peer_is_now() -> None:
    """A peer that was moved with its address has another MAC: its next message shows it."""
    scene = connected()
    (connection,) = scene.client.cm.connections.by_id.values()
    scene.move("server")
    here = scene.ends["server"]
    here.call(ucma.Command.DISCONNECT, struct.pack("<I", scene.handles["server"]))
    scene.net.deliver()
    assert scene.client.cm.connections.paths[connection.local_id].destination_mac == here.mac
    assert connection.state is State.TIMEWAIT
