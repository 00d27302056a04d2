"""Requests that wait until the READs before them have been answered.

The IBA lets a responder execute what follows a READ before the READ's data are fetched: a requester that minds must set
the fence (9.5, table of orders). rxe executes strictly in order, though, and so do most programs expect it: a WRITE,
an atomic, or a SEND after which the program reuses the buffer, must not change what an earlier READ brings. READ
responses leave a few at a time, so what comes meanwhile is kept here, and looked at again when they have left.

Nothing is lost when it is dropped: it was not acknowledged. So it is in no image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softroce_ext.transport.context import ReadAnswer
from softroce_ext.wire.frame import Packet, parse
from softroce_ext.wire.opcodes import OpFlag

if TYPE_CHECKING:
    from softroce_ext.transport.engine import Engine
    from softroce_ext.transport.qp import QueuePair

_READ = int(OpFlag.READ)
_RESUME = int(OpFlag.RESUME)

MAX_HELD = 512
"""Packets of one queue pair that may wait; more than a partner has on the way."""
MAX_HELD_BY_ALL = 4096
"""Of all queue pairs of a NIC together: partners with very many of them must not fill its memory."""


def reading(qp: QueuePair) -> bool:
    """Whether READ responses have still to leave."""
    return any(isinstance(answer, ReadAnswer) for answer in qp.context.answers)


def waits(qp: QueuePair, packet: Packet, flags: int) -> bool:
    """Keep a request packet if its turn has not come; whether it was kept (or dropped: too many are). `flags`: OpFlag.

    READs need not wait for READs: their answers are a queue. Repeats and gaps are for the responder, unless something
    waits already: then they do too.
    """
    context = qp.context
    held = qp.held
    if flags & _RESUME or context.stopped:
        return False
    if not held and (flags & _READ or packet.psn != context.expected_psn or not reading(qp)):
        return False
    engine = qp.engine
    if len(held) >= MAX_HELD or engine.held >= MAX_HELD_BY_ALL:
        qp.counters["dropped_busy"] += 1
        return True
    if not held:
        engine.holding.append(qp)
    held.append(bytes(packet.raw))
    engine.held += 1
    return True


def forget(qp: QueuePair) -> None:
    """Nothing of this queue pair waits any more: it stands still, begins anew or goes, or the turn has come."""
    engine = qp.engine
    if qp.held:
        engine.held -= len(qp.held)
        engine.holding.remove(qp)
        qp.held = []


def release(engine: Engine, now: float) -> bool:
    """Let what waited, and need not any more, be received; whether there was any. It is a batch of its own."""
    due = [qp for qp in engine.holding if not reading(qp)]
    for qp in due:
        held = qp.held
        forget(qp)
        for frame in held:
            packet = parse(memoryview(frame))
            assert isinstance(packet, Packet)
            qp.receive(packet, now)
    if due:
        engine.end_of_batch(now)
    return bool(due)
