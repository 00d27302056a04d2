"""Scenarios about queues: events, shared receives, receivers that are not ready, drained queue pairs."""

from __future__ import annotations

import time

import pyverbs.enums as e
from data_side import PATIENCE, Area, Link, Side, pattern, within
from pyverbs.cq import CompChannel
from pyverbs.srq import SRQ, SrqAttr, SrqInitAttr


def solicited(side: Side) -> None:
    """A completion queue that waits for solicited completions is not woken by others."""
    channel = CompChannel(side.context)
    link = Link(side, channel=channel)

    def woken(wanted: bool) -> None:
        def wait() -> bool:
            channel.get_cq_event(link.recv_cq)
            link.recv_cq.ack_events(1)
            return True

        side.say("event" if within(PATIENCE if wanted else 0.1, wait) else "no event")

    for name in ("SEND", "SEND_WITH_IMM", "RDMA_WRITE_WITH_IMM"):
        for only, asked, wakes in ((True, False, False), (True, True, True), (False, False, True)):
            if not side.active:
                link.receive(link.area.sge(5000))
                link.recv_cq.req_notify(only)
            side.meet()
            if side.active:
                flags = "SIGNALED SOLICITED" if asked else "SIGNALED"
                link.post(name, [link.area.sge(3000)], flags, imm=1 if "IMM" in name else 0)
                link.take("send")
            else:
                link.take("recv")
                woken(wakes)
            side.meet()
    if not side.active:
        link.receive(link.area.sge(1))
        link.recv_cq.req_notify(True)
        link.move("ERR")
        woken(True)
        link.take("recv")


def shared(side: Side) -> None:
    """Two queue pairs with one shared receive queue: each receive used once, in order, and one event at the limit."""
    srq = SRQ(side.pd, SrqInitAttr(SrqAttr(max_wr=16, max_sge=2))) if not side.active else None
    area = Area(side, 1 << 16)
    links = [Link(side, area=area, name=name, srq=srq) for name in ("first", "second")]
    count = 12
    if srq is not None:
        for index in range(count):
            links[0].receive(area.sge(1000, 2000 * index), area.sge(1000, 2000 * index + 1000))
        srq.modify(SrqAttr(srq_limit=5), e.IBV_SRQ_LIMIT)
    for index in range(count):
        link = links[index // 2 % 2]
        side.meet()
        if side.active:
            data = pattern(index, 1500)
            area.write(data)
            link.post("SEND_WITH_IMM", [area.sge(1500)], imm=index)
            link.take("send")
        else:
            link.take("recv")
            side.check(area.read(1500, 2000 * index) == pattern(index, 1500), f"receive {index}")
        side.meet()
    side.events(0 if side.active else 1)
    if srq is not None:
        side.say(f"limit {srq.query().srq_limit}")
    side.meet()
    # A failing queue pair leaves what is in the shared queue, and says that it uses no more of it.
    if not side.active:
        links[0].receive(area.sge(100))
        links[0].move("ERR")
        links[0].quiet("recv")
        side.events()
    side.meet()
    if side.active:
        links[1].post("SEND", [area.sge(100)])
        links[1].take("send")
    else:
        links[1].take("recv")
    side.meet()


def not_ready(side: Side) -> None:
    """A message that finds no receive: retried as often as the sender says; rnr_retry 7 never gives up."""
    for name in ("SEND", "RDMA_WRITE_WITH_IMM"):
        for retry in (0, 2):
            link = Link(side, rnr_retry=retry)
            if side.active:
                link.post("RDMA_WRITE", [link.area.sge(10)])
                link.post(name, [link.area.sge(10)])
                link.post("SEND", [link.area.sge(10)])
                link.take("send", 3)
                link.quiet("send")
            side.meet()
            link.state()
    link = Link(side, rnr_retry=7)
    data = pattern("late", 6000)
    if side.active:
        link.area.write(data)
        link.post("SEND", [link.area.sge(6000)])
        link.post("RDMA_READ", [link.area.sge(6000, 10000)], at=0)
    side.meet()
    if side.active:
        link.take("send", 2)
        side.check(link.area.read(6000, 10000) == data, "READ before the SEND that came first")
    else:
        time.sleep(0.1)
        link.receive(link.area.sge(6000))
        link.take("recv")
        side.check(link.area.read(6000) == data, "the late SEND")
    side.meet()


def drained(side: Side) -> None:
    """SQD finishes what was started and starts nothing new; back in RTS, what was posted meanwhile goes out.

    With the next request, that is: rxe does not look into its queue before.
    """
    link = Link(side)
    if not side.active:
        for index in range(3):
            link.receive(link.area.sge(100, 100 * index))
    side.meet()
    if side.active:
        link.area.write(bytes(range(100)))
        link.post("SEND", [link.area.sge(100)])
        link.take("send")
        link.move("SQD", e.IBV_QP_EN_SQD_ASYNC_NOTIFY, en_sqd_async_notify=1)
        side.events(1)
        link.state()
        link.post("SEND", [link.area.sge(90)])
        link.quiet("send")
    side.meet()
    if not side.active:
        link.take("recv")
        link.quiet("recv")
    side.meet()
    if side.active:
        link.move("RTS")
        link.post("SEND", [link.area.sge(80)])
        link.take("send", 2)
        link.state()
    else:
        link.take("recv", 2)
        for index, size in enumerate((100, 90, 80)):
            side.check(link.area.read(size, 100 * index) == bytes(range(size)), f"SEND {index}")
    side.meet()


SCENARIOS = (solicited, shared, not_ready, drained)
