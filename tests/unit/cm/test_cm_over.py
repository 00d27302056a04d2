"""Connections that are over, answers that come too late, and images of them.

Invariants: what an id answers about a connection that is over is the same before and after a move; such a connection is
harmless at the new place; a connection whose request cannot have started it is refused with nothing left; an
answer for an id whose address is gone is reported as unreachable.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable

import pytest

from softroce_ext.cm import checkpoint
from softroce_ext.cm import messages as m
from softroce_ext.cm.commands import Command
from softroce_ext.cm.ids import PS_UDP, EventType
from softroce_ext.device.errors import ImageError, VerbsError
from tests.support.cm.net import A, Nic, Scene, connected


def over() -> Scene:
    """Both ends have seen the connection come and go."""
    scene = connected()
    scene.step_disconnect()
    scene.step_settle()
    return scene


def datagrams() -> Scene:
    """A server and a client of the UDP port space, and nothing done yet."""
    scene = Scene()
    for nic in (scene.client, scene.server, scene.spare):
        nic.port_space = PS_UDP
    return scene


def resolved() -> Scene:
    """The server has accepted, and the client knows."""
    scene = datagrams()
    scene.step_listen()
    scene.step_connect()
    scene.step_settle()
    assert scene.heard["client"][-1] == EventType.ESTABLISHED.value
    return scene


def answers(nic: Nic, handle: int) -> list[bytes | int]:
    """What the program is answered, or the errno."""
    found: list[bytes | int] = []
    for command, body in (
        (Command.QUERY_ROUTE, struct.pack("<QII", 0, handle, 0)),
        *((Command.INIT_QP_ATTR, struct.pack("<QII", 0, handle, state)) for state in (1, 2, 3)),
        (Command.NOTIFY, struct.pack("<II", handle, 4)),
        (Command.DISCONNECT, struct.pack("<I", handle)),
    ):
        try:
            found.append(nic.call(command, body))
        except VerbsError as error:
            found.append(error.number)
    return found


@pytest.mark.parametrize("who", ["client", "server"])
@pytest.mark.parametrize("make", [over, resolved])
def test_the_same_answers_before_and_after_a_move(make: Callable[[], Scene], who: str) -> None:
    scene = make()
    handle = scene.handles[who]
    before = answers(scene.ends[who], handle)
    assert before[-1] == b""  # it has a connection, though that is over
    scene.move(who)
    assert answers(scene.ends[who], handle) == before
    assert not scene.ends[who].cm.connections.by_id


def test_round_trip() -> None:
    for scene in (over(), resolved()):
        nic = scene.server
        image = nic.hold()
        assert [item["connection"]["state"] for item in image[0]["ids"] if item["connection"]] == ["closed"]
        nic.cm.discard(nic.file.queue)
        nic.restore(image)
        assert checkpoint.dump(nic.cm, [nic.file]) == image


def test_an_id_that_another_connection_has_by_now() -> None:
    """Ids of connections are random, and that of one that is over is free."""
    image = over().server.hold()
    here = Scene()
    here.step_listen()
    here.step_connect()
    here.net.deliver()
    nic = here.client
    (live,) = nic.cm.connections.by_id.values()
    (record,) = (item["connection"] for item in image[0]["ids"] if item["connection"])
    record["local_id"] = live.local_id
    program = nic.file
    for leave in (nic.cm.discard, lambda queue: nic.cm.close(queue, 0.0)):
        nic.restore(image)
        guest, nic.file = nic.file, program
        (handle,) = (cm_id.handle for cm_id in nic.cm.ids_of(guest.queue) if cm_id.connection is not None)
        nic.cm.disconnect(nic.cm.ids[handle], 0.0)
        leave(guest.queue)
        assert list(nic.cm.connections.by_id.values()) == [live]
        assert list(nic.cm._timed.values()) == [live]


@pytest.mark.parametrize(("make", "kind"), [(Scene, m.Kind.REQ), (datagrams, m.Kind.SIDR_REQ)])
@pytest.mark.parametrize("name", ["client", "server"])
def test_a_request_that_cannot_have_begun_it(make: Callable[[], Scene], kind: m.Kind, name: str) -> None:
    scene = make()
    scene.step_listen()
    scene.step_connect()
    scene.net.deliver()
    image = scene.ends[name].hold()
    (record,) = (item["connection"] for item in image[0]["ids"] if item["connection"])
    assert m.unpack(bytes.fromhex(record["request"])).kind is kind
    for other in m.Kind:
        record["request"] = m.Message(other, 0, {}).pack().hex()
        if other is not kind:
            with pytest.raises(ImageError, match="without a request, or with another's"):
                scene.spare.restore(image)
            assert not scene.spare.cm.ids
            assert not scene.spare.cm.connections.by_id


@pytest.mark.parametrize(
    ("field", "value"), [("passive", True), ("remaining", 1.0), ("path", {}), ("state", "timewait")]
)
def test_one_that_is_over_has_nothing_to_come(field: str, value: object) -> None:
    scene = over()
    image = scene.server.hold()
    (record,) = (item["connection"] for item in image[0]["ids"] if item["connection"])
    record[field] = value
    with pytest.raises(ImageError, match=r"connection 0x[0-9a-f]+: "):
        scene.spare.restore(image)
    assert not scene.spare.cm.ids


def test_an_answer_for_an_address_that_is_gone() -> None:
    scene = datagrams()
    scene.step_listen()
    scene.step_connect()
    scene.net.deliver()
    scene.client.events()
    scene.client.adapter.addressing.remove(A)
    ((_, child, _),) = scene.server.events()
    scene.server.accept(child, 3, struct.pack("<II256s8B", 18, 0, b"", 0, 0, 0, 0, 0, 0, 0, 1))
    scene.net.deliver()
    (event,) = scene.client.file.queue.events
    assert (event.kind, event.status) == (EventType.UNREACHABLE, -errno.ENODEV)
    assert not scene.client.cm.connections.by_id
