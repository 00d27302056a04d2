"""Scenarios whose requests all succeed: every operation, size, way to cut and to post."""

from __future__ import annotations

import ctypes
import itertools
import random

import pyverbs.enums as e
from data_side import READ, WRITE, Area, Link, Side, pattern, rooms
from pyverbs.wr import SGE

SIZES = (0, 1, 3, 4, 1023, 1024, 1025, 2048, 4097, 20000)
OPERATIONS = ("SEND", "SEND_WITH_IMM", "RDMA_WRITE", "RDMA_WRITE_WITH_IMM", "RDMA_READ")


def _only(side: Side, area: Area, places: list[tuple[int, int]], data: bytes, what: str) -> None:
    """The places hold their parts of `data`, and all the rest is still zero."""
    want = bytearray(area.length)
    for at, size in places:
        want[at : at + size] = data[at : at + size]
    got = area.read(area.length)
    wrong = next((at for at in range(area.length) if got[at] != want[at]), None) if got != want else None
    side.check(wrong is None, f"{what}: byte {wrong} is wrong")


def messages(side: Side, gid: str = "4") -> None:
    """Every operation with sizes around those of packets."""
    places = rooms(SIZES)
    area = Area(side, places[-1][0] + places[-1][1] + 16)
    link = Link(side, area=area, gid=gid)
    for name in OPERATIONS:
        taking = name not in ("RDMA_WRITE", "RDMA_READ")
        data = pattern(name, area.length)
        source = side.active != (name == "RDMA_READ")
        area.write(data if source else bytes(area.length))
        if taking and not side.active:
            for at, size in places:
                link.receive(*([area.sge(size, at)] if name.startswith("SEND") else []))
        side.meet()
        if side.active:
            for index, (at, size) in enumerate(places):
                link.post(name, [area.sge(size, at)], at=at, imm=0x01020304 + index if "IMM" in name else 0)
            link.take("send", len(places))
        elif taking:
            link.take("recv", len(places))
        side.meet()
        if not source:
            _only(side, area, places, data, name)
    link.quiet()


def messages_6(side: Side) -> None:
    """The same over IPv6."""
    messages(side, "6")


def _cut(total: int, count: int, seed: object) -> list[int]:
    """`count` lengths that make up `total`, some of them 0."""
    dice = random.Random(str(seed))
    cuts = sorted(dice.randrange(total) for _ in range(count - 1 - count // 4))
    cuts += [dice.choice(cuts or [0]) for _ in range(count // 4)]
    edges = [0, *sorted(cuts), total]
    return [after - before for before, after in itertools.pairwise(edges)]


def pieces(side: Side) -> None:
    """Up to 32 elements at both ends, cut differently, some empty; 33 are refused."""
    total = 9000
    area = Area(side, 1 << 14)
    link = Link(side, area=area, sges=32)
    for name in ("SEND", "RDMA_WRITE", "RDMA_READ"):
        for count in (1, 2, 7, 32):
            places = rooms(_cut(total, count, (name, count, side.active)), 5)
            if not side.active and name != "SEND":
                places = [(0, total)]
            whole = pattern((name, count), total)
            source = side.active != (name == "RDMA_READ")
            laid = bytearray(area.length)
            at = 0
            for start, size in places:
                laid[start : start + size] = whole[at : at + size]
                at += size
            area.write(bytes(laid) if source else bytes(area.length))
            elements = [area.sge(size, start) for start, size in places]
            if name == "SEND" and not side.active:
                link.receive(*elements)
            side.meet()
            if side.active:
                link.post(name, elements)
                link.take("send")
            elif name == "SEND":
                link.take("recv")
            side.meet()
            if not source:
                _only(side, area, places, bytes(laid), f"{name} in {count} pieces")
    side.call("33 elements to send", lambda: link.post("SEND", [area.sge(1)] * 33))
    side.call("33 elements to receive", lambda: link.receive(*[area.sge(1)] * 33))


def empty(side: Side) -> None:
    """Messages of no bytes, with no element, an empty one, one with a key of nobody; keys of nobody at the peer."""
    link = Link(side)
    nobody = SGE(0, 0, 0x12345600)
    if not side.active:
        for sges in ((), (link.area.sge(0),), (nobody,), (link.area.sge(10),), ()):
            link.receive(*sges)
    side.meet()
    if side.active:
        for name, sges in (("SEND", ()), ("SEND", (link.area.sge(0),)), ("SEND_WITH_IMM", (nobody,)),
                           ("RDMA_WRITE_WITH_IMM", ()), ("RDMA_WRITE", (nobody,)), ("RDMA_READ", (nobody,)),
                           ("SEND", (nobody, link.area.sge(0), nobody))):  # fmt: skip
            link.post(name, sges, key=0x55555500, imm=7 if "IMM" in name else 0)
        link.take("send", 7)
    else:
        link.take("recv", 5)
    side.meet()
    link.quiet()
    link.state()


def inline(side: Side) -> None:
    """Inline data come from memory that is not registered and free at once; too many are refused."""
    link = Link(side, inline=256)
    sizes = (0, 1, 100, 255, 256)
    places = rooms(sizes)
    data = pattern("inline", 1024)
    if not side.active:
        for at, size in places:
            link.receive(link.area.sge(size, at))
    side.meet()
    if side.active:
        own = ctypes.create_string_buffer(1024)
        start = ctypes.addressof(own)
        for name, shift in (("SEND", 0), ("RDMA_WRITE", 4096), ("RDMA_WRITE_WITH_IMM", 8192)):
            if name == "RDMA_WRITE_WITH_IMM":
                side.meet()
            for at, size in places:
                ctypes.memmove(own, data, 1024)
                third = size // 3
                elements = [SGE(start + at, third, 0), SGE(start + at + third, size - third, 0xDEAD)]
                link.post(name, elements, "SIGNALED INLINE", at=at + shift, imm=9 if "IMM" in name else 0)
                ctypes.memset(own, 0, 1024)
            link.take("send", len(sizes))
        side.call("257 bytes inline", lambda: link.post("SEND", [SGE(start, 257, 0)], "SIGNALED INLINE"))
    else:
        link.take("recv", len(sizes))
        for _ in sizes:
            link.receive()
        side.meet()
        link.take("recv", len(sizes))
    side.meet()
    if not side.active:
        for shift in (0, 4096, 8192):
            for at, size in places:
                side.check(link.area.read(size, at + shift) == data[at : at + size], f"inline {size} at {shift}")


def fence(side: Side) -> None:
    """A fenced SEND or WRITE of what a READ before it brings carries what the READ brought."""
    link = Link(side)
    count, size = 6, 6000
    data = pattern("fence", count * size)
    if not side.active:
        link.area.write(data)
        for index in range(0, count, 2):
            link.receive(link.area.sge(size, 65536 + index * size))
    side.meet()
    if side.active:
        for index in range(count):
            link.post("RDMA_READ", [link.area.sge(size, index * size)], at=index * size)
            name = "RDMA_WRITE" if index % 2 else "SEND"
            link.post(name, [link.area.sge(size, index * size)], "SIGNALED FENCE", at=65536 + index * size)
        link.take("send", 2 * count)
    else:
        link.take("recv", count // 2)
    side.meet()
    side.check(link.area.read(count * size, 0 if side.active else 65536) == data, "what was read is not what was sent")


def reads(side: Side) -> None:
    """READs of several packets among WRITEs, with one and with many of them on the way."""
    count, size = 12, 7001
    for limit in (1, 4, 16):
        link = Link(side, reads=limit, area=Area(side, 1 << 17, READ | WRITE | 1))
        data = pattern(("reads", limit), count * size)
        if not side.active:
            link.area.write(data)
        side.meet()
        if side.active:
            for index in range(count):
                link.post("RDMA_READ", [link.area.sge(size, index * size)], at=index * size)
                link.area.write(bytes([index] * 64), 100000 + 64 * index)
                link.post("RDMA_WRITE", [link.area.sge(64, 100000 + 64 * index)], at=100000 + 64 * index)
            link.take("send", 2 * count)
            side.check(link.area.read(count * size) == data, f"{limit} READs: the data are wrong")
        side.meet()
        if not side.active:
            side.check(link.area.read(64 * count, 100000) == b"".join(bytes([i] * 64) for i in range(count)), "WRITEs")


def unfenced(side: Side) -> None:
    """What follows a READ without a fence does not change what the READ brings: the responder goes in order."""
    size = 200_000
    for name in ("RDMA_WRITE", "SEND", "SEND_WITH_IMM", "ATOMIC_FETCH_AND_ADD", "RDMA_WRITE_WITH_IMM"):
        taking = name not in ("RDMA_WRITE", "ATOMIC_FETCH_AND_ADD")
        link = Link(side, area=Area(side, 1 << 19))
        before, after = pattern((name, "before"), size), pattern((name, "after"), size)
        if side.active:
            link.area.write(after, 1 << 18)
        else:
            link.area.write(before)
            for _ in range(2 * taking):
                link.receive(link.area.sge(size))
        side.meet()
        if side.active:
            for _ in range(2):
                link.post("RDMA_READ", [link.area.sge(size)])
                link.post(name, [link.area.sge(8 if "ATOMIC" in name else size, 1 << 18)], add=1, imm=5)
                link.take("send", 2)
                side.check(link.area.read(size) == before, f"a READ before {name} brought something else")
                side.meet()
                side.meet()
        else:
            for _ in range(2):
                if taking:
                    link.take("recv")
                side.meet()
                number = (int.from_bytes(before[:8], "little") + 1) % (1 << 64)
                want = number.to_bytes(8, "little") + before[8:] if "ATOMIC" in name else after
                side.check(link.area.read(size) == want, f"{name} after a READ left something else")
                link.area.write(before)
                side.meet()


def atomics(side: Side) -> None:
    """Every FETCH_AND_ADD counts once and returns what was before; CMP_AND_SWP changes only what it expects."""
    link = Link(side, reads=4)
    count, begin = 48, (1 << 64) - 100
    if not side.active:
        link.area.write(begin.to_bytes(8, "little"), 64)
    side.meet()
    if side.active:
        for index in range(count):
            link.post("ATOMIC_FETCH_AND_ADD", [link.area.sge(8, 8 * index)], at=64, add=7)
        link.take("send", count)
        for index in range(count):
            side.check(link.area.number(8 * index) == (begin + 7 * index) % (1 << 64), f"addition {index}")
        end = (begin + 7 * count) % (1 << 64)
        for index, (expected, new) in enumerate(((end, 5), (6, 1), (5, 1 << 63), (5, 2))):
            link.post("ATOMIC_CMP_AND_SWP", [link.area.sge(8, 8 * index)], at=64, add=expected, swap=new)
        link.take("send", 4)
        found = [link.area.number(8 * index) for index in range(4)]
        side.check(found == [end, 5, 5, 1 << 63], f"compare and swap returned {found}")
        side.call("not aligned", lambda: link.post("ATOMIC_FETCH_AND_ADD", [link.area.sge(8)], at=4, add=1))
    side.meet()
    if not side.active:
        side.check(link.area.number(64) == 1 << 63, f"{link.area.number(64):#x} is there at the end")
        side.check(link.area.number(56) == link.area.number(72) == 0, "the neighbours changed")


def largest(side: Side) -> None:
    """A message of 8 MiB, the largest one, written and read back, at the largest MTU."""
    size = 8 << 20
    link = Link(side, area=Area(side, size), mtu=e.IBV_MTU_4096)
    data = pattern("largest", size)
    if side.active:
        link.area.write(data)
        link.post("RDMA_WRITE", [link.area.sge(size)])
        link.take("send")
    side.meet()
    if not side.active:
        side.check(link.area.read(size) == data, "what was written is wrong")
    side.meet()


def beyond(side: Side) -> None:
    """Messages longer than the port says that it can: written, read back, and one sent."""
    size, longest = 9 << 20, 16 << 20
    area = Area(side, longest)
    link = Link(side, area=area, mtu=e.IBV_MTU_4096)
    data = pattern("beyond", longest)
    if not side.active:
        link.receive(area.sge(longest))
    side.meet()
    if side.active:
        area.write(data)
        link.post("RDMA_WRITE", [area.sge(size)])
        link.take("send")
        area.write(bytes(size))
        link.post("RDMA_READ", [area.sge(size)])
        link.take("send")
        side.check(area.read(size) == data[:size], "what was read is wrong")
        link.post("SEND", [area.sge(longest)])
        link.take("send")
    else:
        link.take("recv")
        side.check(area.read(longest) == data, "what was sent is wrong")
    side.meet()
    link.state()


def order(side: Side) -> None:
    """Completions for those that ask for one, or for all; all are executed in the order of posting."""
    for sig_all in (False, True):
        link = Link(side, sig_all=sig_all)
        count = 12
        if not side.active:
            for index in range(count):
                link.receive(link.area.sge(50, 50 * index))
        side.meet()
        if side.active:
            for index in range(count):
                link.area.write(bytes([index + 1] * 50), 50 * index)
                link.post("SEND", [link.area.sge(50, 50 * index)], "SIGNALED" if index % 4 == 3 else "")
                link.post("RDMA_WRITE", [link.area.sge(50, 50 * index)], "", at=60000)
            link.take("send", 2 * count if sig_all else count // 4)
            link.quiet("send")
        else:
            link.take("recv", count)
        side.meet()
        if not side.active:
            side.check(link.area.read(600) == b"".join(bytes([i + 1] * 50) for i in range(count)), "SENDs")
            side.check(link.area.read(50, 60000) == bytes([count] * 50), "the last WRITE is not the last")


SCENARIOS = (messages, messages_6, pieces, empty, inline, fence, reads, unfenced, atomics, largest, beyond, order)
