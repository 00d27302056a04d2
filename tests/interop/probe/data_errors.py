"""Scenarios whose requests fail: whose fault it is, what is reported to each end, and that no memory is touched."""

from __future__ import annotations

from collections.abc import Callable

from data_side import ATOMIC, EVERY, LOCAL, READ, WRITE, Area, Link, Side
from pyverbs.wr import SGE

REFUSED = (
    # name, request, offset, size, region's rights, queue pair's rights, change of the key
    ("a wrong key", "RDMA_WRITE", 0, 100, EVERY, EVERY, 0x55),
    ("a wrong key", "RDMA_READ", 0, 100, EVERY, EVERY, 0x55),
    ("a wrong key", "ATOMIC_FETCH_AND_ADD", 0, 8, EVERY, EVERY, 0x55),
    ("nobody's key", "RDMA_WRITE_WITH_IMM", 0, 3000, EVERY, EVERY, 0x12340000),
    ("one byte beyond", "RDMA_WRITE", 4000, 97, EVERY, EVERY, 0),
    ("one byte beyond", "RDMA_READ", 4000, 97, EVERY, EVERY, 0),
    ("one byte before", "RDMA_WRITE", -1, 2, EVERY, EVERY, 0),
    ("beyond", "ATOMIC_CMP_AND_SWP", 4096, 8, EVERY, EVERY, 0),
    ("second packet beyond", "RDMA_WRITE", 4096 - 1500, 2000, EVERY, EVERY, 0),
    ("a region without the right", "RDMA_WRITE", 0, 100, LOCAL | READ | ATOMIC, EVERY, 0),
    ("a region without the right", "RDMA_READ", 0, 100, LOCAL | WRITE | ATOMIC, EVERY, 0),
    ("a region without the right", "ATOMIC_FETCH_AND_ADD", 0, 8, LOCAL | WRITE | READ, EVERY, 0),
    ("a queue pair without the right", "RDMA_WRITE", 0, 100, EVERY, READ | ATOMIC, 0),
    ("a queue pair without the right", "RDMA_READ", 0, 100, EVERY, WRITE | ATOMIC, 0),
    ("a queue pair without the right", "ATOMIC_CMP_AND_SWP", 0, 8, EVERY, READ | WRITE, 0),
)


def refused(side: Side) -> None:
    """What the partner may not do: an error there with its reason, everything else flushed at both ends."""
    for name, request, at, size, region, rights, change in REFUSED:
        side.say(f"{request} with {name}")
        area = Area(side, 4096, region)
        link = Link(side, area=area, access=rights & 15)
        area.write(b"untouched" * 400)
        if not side.active:
            link.receive(area.sge(100))
            link.receive(area.sge(100))
        side.meet()
        if side.active:
            source = Area(side, 4096)
            link.post(request, [source.sge(size)], at=at, key=link.peer["key"] ^ change, add=1)
            link.post("SEND", [source.sge(9)])
            link.take("send", 2)
            link.quiet("send")
        side.meet()
        if not side.active:
            link.take("recv", 2)
        side.check(area.read(3600) == b"untouched" * 400, "memory was changed")
        link.state()
    side.events()


def own_faults(side: Side) -> None:
    """Requests that are wrong in themselves fail at their own end, and the peer continues."""
    faults: dict[str, Callable[[Link, Area], list[SGE]]] = {
        "nobody's key": lambda link, area: [SGE(area.mr.buf, 10, 0x7777)],
        "beyond": lambda link, area: [area.sge(2, 4095)],
        "second element wrong": lambda link, area: [area.sge(1500), SGE(0, 10, 5)],
    }
    for request in ("SEND", "RDMA_WRITE", "RDMA_READ"):
        for name, fault in faults.items():
            side.say(f"{request}: {name}")
            link, area = Link(side), Area(side, 4096)
            if not side.active:
                link.receive(link.area.sge(100))
                link.receive(link.area.sge(3000))
            side.meet()
            if side.active:
                link.post("SEND", [area.sge(10)])
                link.take("send")  # before the fault: rxe may hang when one is not acknowledged yet
                link.post(request, fault(link, area))
                if request != "RDMA_READ":  # what follows one may or may not have left before its answer comes
                    link.post("SEND", [area.sge(10)])
                link.take("send", 1 if request == "RDMA_READ" else 2)
                link.quiet("send")
            side.meet()
            if not side.active:
                link.take("recv")
                link.quiet("recv")
            link.state()
    side.say("READ into a region without local writes")
    link, area = Link(side), Area(side, 4096, READ)
    if side.active:
        link.post("RDMA_READ", [area.sge(100)])
        link.take("send")
    side.meet()
    link.state()


def bad_receives(side: Side) -> None:
    """Receives that cannot take the message: too short, wrong keys, no right to write."""
    for name, size in (("short", 3000), ("short", 60), ("second packet short", 1500), ("nobody's key", 60),
                       ("read only", 60), ("beyond", 60), ("RDMA_WRITE_WITH_IMM ignores it", 60)):  # fmt: skip
        side.say(f"{name}, {size} bytes")
        link = Link(side)
        other = Area(side, 4096, READ)
        if not side.active:
            element = {
                "short": link.area.sge(50), "second packet short": link.area.sge(1200),
                "nobody's key": SGE(link.area.mr.buf, 100, 0x7700), "read only": other.sge(100),
                "beyond": link.area.sge(100, link.area.length - 50),
            }.get(name, SGE(link.area.mr.buf, 100, 0x7700))  # fmt: skip
            link.receive(element)
            link.receive(link.area.sge(4000))
        side.meet()
        if side.active:
            link.post("RDMA_WRITE_WITH_IMM" if "ignores" in name else "SEND", [link.area.sge(size)], imm=0)
            link.post("SEND", [link.area.sge(10)])
            link.take("send", 2)
        else:
            link.take("recv", 2)
        side.meet()
        link.state()
    side.events()


def gone(side: Side) -> None:
    """A partner that does not answer: RETRY_EXC_ERR after the retries, the rest flushed."""
    for name in ("closed", "in ERR", "in RESET"):
        for request in ("SEND", "RDMA_READ"):
            side.say(f"{request} to a queue pair {name}")
            link = Link(side, retry=1, timeout=12)
            if not side.active:
                if name == "closed":
                    link.qp.close()
                else:
                    link.move(name.split()[1])
            side.meet()
            if side.active:
                link.post(request, [link.area.sge(10)])
                link.post("SEND", [link.area.sge(10)], "")
                link.take("send", 2)
                link.state()
                link.post("SEND", [link.area.sge(10)], "")
                link.take("send")
            side.meet()


def flushed(side: Side) -> None:
    """A queue pair in ERR gives everything back in order; RESET forgets it all."""
    link = Link(side)
    if not side.active:
        for _ in range(3):
            link.receive(link.area.sge(10))
        link.move("ERR")
        link.take("recv", 3)
    side.meet()
    link = Link(side)
    if side.active:
        for request in ("SEND", "RDMA_WRITE", "RDMA_READ", "ATOMIC_FETCH_AND_ADD", "SEND_WITH_IMM"):
            link.post(request, [link.area.sge(8)], "" if request == "RDMA_WRITE" else "SIGNALED", add=1)
        link.quiet("send")  # no receive there: all wait behind the first
        link.move("ERR")
        link.take("send", 5)
        link.move("RESET")
        link.state()
        link.quiet()
    side.meet()


SCENARIOS = (refused, own_faults, bad_receives, gone, flushed)
