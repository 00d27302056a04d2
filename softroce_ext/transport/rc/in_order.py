"""Requests that wait until the READs before them have been answered.

The IBA lets a responder execute what follows a READ before the READ's data are fetched; a requester that needs the
order must set the fence (9.5, table of orders). rxe executes strictly in order, though, and most programs expect that:
a WRITE, an atomic, or a SEND after which the program reuses the buffer, must not change what an earlier READ returns.
READ responses leave a few at a time, so packets that arrive meanwhile are kept here and received when they have left.

Nothing is lost when a packet is dropped here: it was not acknowledged. So held packets are in no image.
"""

from __future__ import annotations

from softroce_ext.transport.rc.connection import Connection
from softroce_ext.wire.frame import Packet, parse
from softroce_ext.wire.opcodes import OpFlag

_READ = int(OpFlag.READ)
_RESUME = int(OpFlag.RESUME)

MAX_HELD = 512
"""Packets of one queue pair that may wait; more than a peer has outstanding."""
MAX_HELD_BY_ALL = 4096
"""Of all queue pairs of a NIC together: peers with very many of them must not fill its memory."""


def waits(qp: Connection, packet: Packet, flags: int) -> bool:
    """Keep a request packet if its turn has not come; whether it was kept (or dropped: too many are). `flags`: OpFlag.

    READs need not wait for READs: their answers are a queue. Duplicates and gaps are for the responder, unless
    something waits already: then they do too.
    """
    held = qp.held
    if flags & _RESUME or qp.movement.stopped:
        return False
    if not held and (flags & _READ or packet.psn != qp.receiver.expected_psn or not qp.receiver.reading()):
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


def forget(qp: Connection) -> None:
    """No packet of this queue pair waits any longer."""
    engine = qp.engine
    if qp.held:
        engine.held -= len(qp.held)
        engine.holding.remove(qp)
        qp.held = []


def release(qp: Connection, now: float) -> bool:
    """Receive the packets that waited if the READs have been answered; whether they have."""
    if qp.receiver.reading():
        return False
    held = qp.held
    forget(qp)
    for frame in held:
        packet = parse(memoryview(frame))
        assert isinstance(packet, Packet)
        qp.receive(packet, now)
    return True
