"""Asynchronous events as a program reads them (struct ib_uverbs_async_event_desc).

Invariant: each event comes once, with the element that it is about; what is destroyed takes its unread events along.
"""

from __future__ import annotations

import os
import struct

from softroce_ext.device.completion import SharedReceiveQueue
from softroce_ext.transport.verbs import QpEvent
from softroce_ext.uverbs.abi import Command
from tests.support.nic.uverbs_program import Program

PORT_ACTIVE, PORT_ERR, GID_CHANGE, SRQ_LIMIT_REACHED = 9, 10, 18, 15


def events(program: Program) -> list[tuple[int, int]]:
    """(element, event type) of everything unread."""
    fifo = os.open(program.directory / "async", os.O_RDONLY | os.O_NONBLOCK)
    try:
        data = os.read(fifo, 65536)
    except BlockingIOError:
        return []
    finally:
        os.close(fifo)
    return [(element, event) for element, event, _ in struct.iter_unpack("<QII", data)]


def srq_of_eight(program: Program, limit: int) -> int:
    """A shared receive queue with 5 receives posted; its user handle is 0xE0. Returns its handle."""
    made = program.objects()
    answer = program.call(Command.CREATE_SRQ, struct.pack("<QIIII", 0xE0, made["pd"], 7, 1, limit), 40)
    handle, offset = struct.unpack_from("<I12xQ", answer)
    os.pwrite(program.queues, struct.pack("<I", 5), offset + 128)  # the producer index
    return int(handle)


def test_the_port_and_the_gid_table(program: Program) -> None:
    """Link down, link up, an address more and one less: four events of port 1."""
    program.objects()
    adapter = program.upper.adapter
    adapter.events.port_event(QpEvent.PORT_ERR)
    adapter.events.port_event(QpEvent.PORT_ACTIVE)
    adapter.addressing.add(bytes([10, 0, 0, 9]))
    adapter.addressing.add(bytes([10, 0, 0, 9]))  # known: no event
    adapter.addressing.remove(bytes([10, 0, 0, 9]))
    assert events(program) == [(1, PORT_ERR), (1, PORT_ACTIVE), (1, GID_CHANGE), (1, GID_CHANGE)]


def test_the_limit_of_a_shared_receive_queue(program: Program) -> None:
    """Below the limit, once; armed again, once more."""
    handle = srq_of_eight(program, 4)
    srq = program.context.get(handle, SharedReceiveQueue)
    assert srq.fetch() is not None  # 4 are left: not below 4
    assert events(program) == []
    assert srq.fetch() is not None
    assert srq.fetch() is not None
    assert events(program) == [(0xE0, SRQ_LIMIT_REACHED)]
    program.call(Command.MODIFY_SRQ, struct.pack("<IIIIQ", handle, 2, 0, 2, 0))
    assert srq.fetch() is not None
    assert events(program) == [(0xE0, SRQ_LIMIT_REACHED)]
    assert struct.unpack("<I", program.call(Command.DESTROY_SRQ, struct.pack("<II", handle, 0), 4)) == (2,)


def test_unread_events_go_with_their_object(program: Program) -> None:
    """The program waits for as many acknowledgements as it has read; an event that it did not read is not counted."""
    handle = srq_of_eight(program, 5)
    assert program.context.get(handle, SharedReceiveQueue).fetch() is not None
    program.upper.adapter.events.port_event(QpEvent.PORT_ERR)
    assert struct.unpack("<I", program.call(Command.DESTROY_SRQ, struct.pack("<II", handle, 0), 4)) == (0,)
    assert events(program) == [(1, PORT_ERR)], "other events stay"
