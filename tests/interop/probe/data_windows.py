"""Scenarios about memory windows and keys that are taken back."""

from __future__ import annotations

import pyverbs.enums as e
from data_keys import keep_key
from data_side import BIND, EVERY, LOCAL, READ, WRITE, Area, Link, Side, pattern
from pyverbs.mr import MW, MWBind, MWBindInfo
from pyverbs.wr import SendWR

AT, SIZE = 4096, 1000
"""Where windows lie in their regions."""


def _bind(link: Link, window: MW, area: Area, at: int = AT, size: int = SIZE, access: int = WRITE) -> int:
    """Bind through the send queue, a line with what came of it; the key that was asked for."""
    number = link.number("send")
    info = MWBindInfo(area.mr, area.mr.buf + at, size, access)
    if window.type == e.IBV_MW_TYPE_1:
        side = link.side
        if side.call("bind_mw", lambda: link.qp.bind_mw(window, MWBind(info, e.IBV_SEND_SIGNALED, number)) or True):
            link.take("send")
        return int(window.rkey)
    wr = SendWR(number, e.IBV_WR_BIND_MW, 0, 0, None, e.IBV_SEND_SIGNALED)
    wr.set_bind_wr(window, info)
    link.qp.post_send(wr)
    link.take("send")
    return int(wr.rkey)


def _attempt(side: Side, link: Link, key: int, name: str = "RDMA_WRITE", at: int = AT, size: int = SIZE) -> None:
    """The active end uses a key of the passive one's; both tell how it ended."""
    side.meet()
    if side.active:
        side.say(f"{name} {size} at {at}")
        link.post(name, [link.area.sge(size)], at=at, key=key)
        link.take("send")
    side.meet()
    link.state()


def _offer(side: Side, key: int = 0) -> int:
    """The passive end's key, at both."""
    return int(side.talk.swap(key) or key)


def window_1(side: Side) -> None:
    """A window of type 1 opens its part to every queue pair of the domain, with its own rights, until it is unbound."""
    area = Area(side, 1 << 14)
    link = Link(side, area=area)
    window = side.window(e.IBV_MW_TYPE_1) if not side.active else None
    key = _offer(side, _bind(link, window, area) if window else 0)
    data = pattern("window", SIZE)
    if side.active:
        area.write(data)
    for name, at, size in (("RDMA_WRITE", AT, SIZE), ("RDMA_WRITE", AT + 999, 1), ("RDMA_READ", AT, SIZE)):
        _attempt(side, Link(side, area=area), key, name, at, size)
    if not side.active:
        side.check(area.read(SIZE, AT) == data[:-1] + data[:1], "what came through the window")
    again = _offer(side, _bind(link, window, area, AT, SIZE, READ) if window else 0)
    if window:
        side.say("another key" if again != key else "the same key")
    for used in (key, again):
        _attempt(side, Link(side, area=area), used, "RDMA_READ")
    _offer(side, _bind(link, window, area, AT, 0) if window else 0)
    _attempt(side, Link(side, area=area), again, "RDMA_READ")


def window_bounds(side: Side) -> None:
    """Nothing beyond a window can be reached through it, whatever its region holds there."""
    area = Area(side, 1 << 14)
    window = side.window(e.IBV_MW_TYPE_1) if not side.active else None
    key = _offer(side, _bind(Link(side, area=area), window, area) if window else Link(side, area=area) and 0)
    area.write(b"x" * 10 if side.active else bytes(10))
    for at, size in ((AT + 999, 2), (AT - 1, 2), (AT + SIZE, 1), (AT + SIZE - 1500, 1600)):
        _attempt(side, Link(side, area=area), key, "RDMA_WRITE", at, size)


def window_2(side: Side) -> None:
    """A window of type 2 is its queue pair's alone, and cannot be bound twice."""
    area = Area(side, 1 << 14)
    link, other = Link(side, area=area), Link(side, area=area)
    window = side.window(e.IBV_MW_TYPE_2) if not side.active else None
    key = _offer(side, _bind(link, window, area, access=READ | WRITE) if window else 0)
    _attempt(side, other, key)
    for name in ("RDMA_WRITE", "RDMA_READ"):
        _attempt(side, link, key, name)
    if window:
        _bind(link, window, area)
        link.state()
    side.meet()


def binds(side: Side) -> None:
    """What cannot be bound: beyond the region, more than it allows, nothing; the queue pair fails."""
    for kind in (e.IBV_MW_TYPE_1, e.IBV_MW_TYPE_2):
        for name, region, at, size, access in (
            ("beyond", EVERY, 1 << 14, 1, WRITE), ("no binding", LOCAL | READ | WRITE, 0, 10, READ),
            ("read only", BIND, 0, 10, WRITE), ("nothing", EVERY, 0, 0, WRITE), ("zero based", EVERY, 0, 9, 32),
        ):  # fmt: skip
            link = Link(side)
            if not side.active:
                side.say(f"type {kind}, {name}")
                _bind(link, side.window(kind), Area(side, 1 << 14, region), at, size, access)
                link.state()
            side.meet()


def invalidated(side: Side) -> None:
    """A key that LOCAL_INV or the partner's SEND_WITH_INV takes back opens nothing any more."""
    for name in ("LOCAL_INV", "SEND_WITH_INV"):
        area = Area(side, 1 << 14)
        link = Link(side, area=area)
        window = side.window(e.IBV_MW_TYPE_2) if not side.active else None
        key = _offer(side, _bind(link, window, area) if window else 0)
        side.keys[key] = "the window's"
        if not side.active:
            link.receive(area.sge(100))
            link.receive(area.sge(100))
        _attempt(side, link, key)
        if side.active and name == "SEND_WITH_INV":
            link.post(name, [area.sge(10)], imm=key)
            link.take("send")
        elif not side.active:
            if name == "LOCAL_INV":
                link.post(name, imm=key)
                link.take("send")
            else:
                link.take("recv")
        _attempt(side, link, key)
        if not side.active:
            link.take("recv", 1 if name == "SEND_WITH_INV" else 2)


def windows_again(side: Side) -> None:
    """A window bound, written and read through, taken back by SEND_WITH_INV and bound again with another key."""
    area = Area(side, 1 << 14)
    link = Link(side, area=area)
    window = side.window(e.IBV_MW_TYPE_2) if not side.active else None
    for turn in range(12):
        size = (10, 3000)[turn % 2]
        key = 0
        if window is not None:
            link.receive(area.sge(3000, 8192))
            key = _bind(link, window, area, access=READ | WRITE)
            keep_key(window, key)
        key = _offer(side, key)
        side.keys[key] = f"key {turn}"
        data = pattern(("again", turn), 3000)
        if side.active:
            area.write(data)
            link.post("RDMA_WRITE", [area.sge(SIZE)], at=AT, key=key)
            link.post("RDMA_READ", [area.sge(SIZE, 8192)], at=AT, key=key)
            link.take("send", 2)
            side.check(area.read(SIZE, 8192) == data[:SIZE], f"turn {turn}: what was read")
            link.post("SEND_WITH_INV", [area.sge(size)], imm=key)
            link.take("send")
        else:
            link.take("recv")
            side.check(area.read(SIZE, AT) == data[:SIZE], f"turn {turn}: what was written")
            side.check(area.read(size, 8192) == data[:size], f"turn {turn}: what was sent")
        side.meet()
    link.state()


def read_then_invalidated(side: Side) -> None:
    """A SEND_WITH_INV right behind a READ through the key that it takes back, without a fence: the READ is answered."""
    size = 100_000
    area = Area(side, 1 << 18)
    link = Link(side, area=area)
    window = side.window(e.IBV_MW_TYPE_2) if not side.active else None
    for turn in range(6):
        key = 0
        if window is not None:
            link.receive(area.sge(100, size))
            area.write(pattern(("then", turn), size), AT)
            key = _bind(link, window, area, at=AT, size=size, access=READ | WRITE)
            keep_key(window, key)
        key = _offer(side, key)
        side.keys[key] = f"key {turn}"
        if side.active:
            link.post("RDMA_READ", [area.sge(size)], at=AT, key=key)
            link.post("SEND_WITH_INV", [area.sge(50, size)], imm=key)
            link.take("send", 2)
            side.check(area.read(size) == pattern(("then", turn), size), f"turn {turn}: what was read")
        else:
            link.take("recv")
        side.meet()
    link.state()


def not_invalidated(side: Side) -> None:
    """Keys that cannot be taken back: nobody's, a region's, a window's of type 1 or of another queue pair."""
    for name in ("LOCAL_INV", "SEND_WITH_INV"):
        for what in ("nobody's", "a region's", "a type 1 window's", "another queue pair's"):
            area = Area(side, 1 << 14)
            link, other = Link(side, area=area), Link(side, area=area)
            key = 0x77777700
            side.say(f"{name} of {what}")
            if not side.active:
                if what == "a region's":
                    key = area.mr.rkey
                elif what != "nobody's":
                    window = side.window(e.IBV_MW_TYPE_1 if "type 1" in what else e.IBV_MW_TYPE_2)
                    key = _bind(other, window, area)
                link.receive(area.sge(100))
                link.receive(area.sge(100))
            key = _offer(side, 0 if side.active else key)
            side.keys[key] = what
            if side.active == (name == "SEND_WITH_INV"):
                link.post(name, [area.sge(10)] if side.active else [], imm=key)
                link.take("send")
            side.meet()
            link.drain()
            link.state()
            side.meet()
            for window in side.windows:
                window.close()
            side.windows.clear()


SCENARIOS = (
    window_1, window_bounds, window_2, binds, invalidated, windows_again, read_then_invalidated, not_invalidated,
)  # fmt: skip
