"""Scenarios whose completion queues are too small: what is lost, and what is reported to each end."""

from __future__ import annotations

from data_side import Area, Link, Side, pattern
from pyverbs.cq import CQ


def receives_overflow(side: Side) -> None:
    """A receive queue's completions into a completion queue of one: the message comes, its completion has no place.

    The sender is not told that it came: its retries end. What it wrote is there all the same. They last half a second,
    in which a busy machine's receiver must have acknowledged the message before.
    """
    for name in ("SEND", "RDMA_WRITE_WITH_IMM"):
        side.say(name)
        queue = CQ(side.context, 1) if not side.active else None
        area = Area(side, 1 << 14)
        link = Link(side, area=area, recv_cq=queue, retry=1, timeout=16)
        data = pattern(name, 3000)
        if side.active:
            area.write(data * 2)
        else:
            side.say(f"room for {queue.cqe if queue is not None else 0}")
            for index in range(4):
                link.receive(area.sge(3000, 4000 * index))
        side.meet()
        for index in range(3):
            if side.active:
                link.post(name, [area.sge(3000)], at=4000 * index, imm=index if "IMM" in name else 0)
                link.take("send")
                link.state()
            side.meet()
            if not side.active:
                side.check((area.read(3000, 4000 * index) == data) == (index < 2), f"message {index}")
        if not side.active:
            link.state()
            side.events(1)
            link.drain("recv")
        side.meet()


def sends_overflow(side: Side) -> None:
    """A send queue's completions into a completion queue of one: they are lost, and the queue pair continues."""
    queue = CQ(side.context, 1) if side.active else None
    link = Link(side, send_cq=queue)
    if side.active:
        link.area.write(bytes(range(100)))
        for index in range(4):
            link.post("RDMA_WRITE", [link.area.sge(100)], at=100 * index)
    side.meet()
    if side.active:
        side.events(3)
        link.drain("send")
        link.state()
        link.post("RDMA_WRITE", [link.area.sge(100)], at=400)
        link.take("send")
    side.meet()
    if not side.active:
        side.check(link.area.read(500) == bytes(range(100)) * 5, "what was written")
        link.state()


SCENARIOS = (receives_overflow, sends_overflow)
