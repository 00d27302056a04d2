"""Invariant: whatever comes from the wire or from a program, the manager answers or refuses, and never raises else."""

from __future__ import annotations

import errno
import random
import struct
from types import SimpleNamespace
from typing import Any

import pytest

from softroce_ext.cm import manager, table
from softroce_ext.cm import messages as m
from softroce_ext.cm.ids import EventQueue
from softroce_ext.device.errors import VerbsError
from tests.support.cm.lab import Lab
from tests.support.cm.mads import CAPTURES, mads


def test_no_listener_is_rejected_as_rxe_rejects() -> None:
    request, reject = mads("cm_reject")
    lab = Lab()
    lab.mad(request)
    assert [message.pack() for message in lab.sent] == [reject]


def test_request_becomes_one_event_however_often_it_comes() -> None:
    lab = Lab()
    lab.listener()
    for _ in range(3):
        lab.mad(mads("cm_rping")[0])
    assert lab.told == 1
    event = lab.command(12, bytes(8))
    uid, handle, kind, status = struct.unpack_from("<QIIi", event)
    assert (uid, kind, status) == (7, 4, 0)
    assert lab.cm.ids[handle].connection is not None


def test_another_address_cannot_speak_for_a_connection() -> None:
    lab = Lab()
    lab.listener()
    lab.mad(mads("cm_rping")[0])
    (connection,) = lab.cm.connections.by_id.values()
    ids = {"local_comm_id": connection.remote_id, "remote_comm_id": connection.local_id}
    lab.mad(m.Message(m.Kind.REJ, 0, ids | {"reason": 28}).pack(), bytes((10, 77, 0, 9)))
    assert lab.cm.connections.by_id


def test_backlog_is_kept() -> None:
    lab = Lab()
    lab.listener()
    request = m.unpack(mads("cm_rping")[0])
    for number in range(20):
        lab.mad(m.Message(request.kind, 0, request.fields | {"local_comm_id": number + 1}, request.private).pack())
    assert lab.told == 8
    assert sum(message.kind is m.Kind.REJ for message in lab.sent) == 12


@pytest.mark.parametrize("name", CAPTURES)
def test_changed_mads(name: str) -> None:
    rng = random.Random(name)
    lab = Lab()
    lab.listener()
    for _ in range(500):
        mad = bytearray(rng.choice(mads(name)))
        for _change in range(rng.randrange(6)):
            mad[rng.randrange(256)] = rng.randrange(256)
        lab.mad(bytes(mad))
        lab.cm.on_timer(rng.random() * 100)


def test_random_commands() -> None:
    rng = random.Random(5)
    lab = Lab()
    lab.listener()
    refused = 0
    for _ in range(5000):
        body = bytearray(rng.randbytes(rng.choice((0, 3, 8, 12, 24, 40, 64, 144, 288, 320))))
        for at in range(0, len(body) - 3, 4):
            if rng.random() < 0.6:
                body[at : at + 4] = struct.pack("<I", rng.randrange(4))
        try:
            answer = lab.command(rng.randrange(26), bytes(body), 8)
            assert len(answer) <= 8
        except VerbsError as error:
            refused += 1
            assert error.number in errno.errorcode
    assert refused > 1000
    lab.cm.close(lab.file.queue, 0.0)
    assert not lab.cm.ids
    assert lab.told == 0


def test_foreign_ids_are_refused() -> None:
    lab = Lab()
    handle = lab.listener()
    lab.file = SimpleNamespace(queue=EventQueue(lambda _count: None))
    with pytest.raises(VerbsError) as refusal:
        lab.command(1, struct.pack("<QII", 0, handle, 0))
    assert refusal.value.number == errno.EINVAL


@pytest.mark.parametrize(("place", "limit", "value"), [(table, "MAX_CONNECTIONS", 0), (manager, "MAX_IDS", 1)])
def test_a_request_for_which_there_is_no_room_leaves_nothing(
    place: Any, limit: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = Lab()
    listener = lab.listener()
    monkeypatch.setattr(place, limit, value)
    request = m.unpack(mads("cm_rping")[0])
    for number in range(20):
        lab.mad(m.Message(request.kind, 0, request.fields | {"local_comm_id": number + 1}, request.private).pack())
    assert list(lab.cm.ids) == [listener]
    assert not lab.cm.connections.by_id
    assert [message.kind for message in lab.sent] == [m.Kind.REJ] * 20


def test_what_the_device_refuses_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a message asks for that the device does not have (any more), the NIC continues."""
    lab = Lab()

    def refuse(*_: object) -> None:
        raise VerbsError(errno.EINVAL, "it is gone")

    monkeypatch.setattr(lab.cm, "send", refuse)
    lab.mad(m.Message(m.Kind.DREQ, 0, {}).pack())
    assert lab.cm.counters["refused"] == 1
