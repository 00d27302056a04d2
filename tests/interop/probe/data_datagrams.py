"""Scenarios of the unreliable services: what arrives is whole, what may not arrive does not."""

from __future__ import annotations

import ipaddress

import pyverbs.enums as e
from data_side import QKEY, Area, Link, Side, pattern
from pyverbs.wr import SGE

GRH = 40


def _unreliable(side: Side, all_of_them: bool) -> None:
    """Messages of one to three packets. Each receive that completes holds one of them, whole.

    A message of one packet that comes twice or late is delivered so: UC takes a FIRST or ONLY with any PSN.
    """
    count, room = 60, 4096
    area = Area(side, 2 * count * room)
    sizes = [(1500, 3000, 100)[index % 3] for index in range(count)]
    data = [index.to_bytes(4, "big") + pattern(index, sizes[index] - 4) for index in range(count)]
    for name in ("SEND_WITH_IMM", "RDMA_WRITE_WITH_IMM", "SEND"):
        link = Link(side, "UC", area=area, depth=128)
        area.write(b"".join(item.ljust(room, b"\0") for item in data) if side.active else bytes(area.length))
        if not side.active:
            for index in range(2 * count):
                link.receive(area.sge(room, index * room))
        side.meet()
        if side.active:
            for index in range(count):
                imm = {"imm": index + 1} if "IMM" in name else {}
                link.post(name, [area.sge(sizes[index], index * room)], at=index * room, **imm)
            link.take("send", count)
        side.meet()
        if side.active:
            continue
        found = link.poll("recv", count) if all_of_them else []
        while some := link.poll("recv", 1, 0.3):  # the sender knows only that they have left
            found += some
        if all_of_them:
            for wc in found:
                side.say(link.line("recv", wc))
        came = []
        for wc in found:
            side.check(wc.status == e.IBV_WC_SUCCESS, f"status {wc.status}")
            place = wc.wr_id - 101
            which = wc.imm_data - 1 if "IMM" in name else int.from_bytes(area.read(4, place * room), "big")
            side.check(0 <= which < count and wc.byte_len == sizes[which], f"message {which} of {wc.byte_len} bytes")
            at = which if "WRITE" in name else place
            side.check(area.read(sizes[which], at * room) == data[which], f"message {which} is not whole")
            came.append(which)
        side.check(not all_of_them or came == [*range(count)], f"there came {came}")
        # rxe may take no message any more after one that was cut short.
        side.check(side.name == "rxe" or len(came) >= count // 2, f"only {len(came)} messages came")


def unreliable(side: Side) -> None:
    """UC over a good link: everything arrives."""
    _unreliable(side, True)


def unreliable_lossy(side: Side) -> None:
    """UC over a bad link: a lost packet drops its message, and never damages another one."""
    _unreliable(side, False)


def unreliable_faults(side: Side) -> None:
    """What UC has no opcode for fails here; what the partner does not allow is dropped there, and both go on."""
    for name in ("RDMA_READ", "ATOMIC_FETCH_AND_ADD", "RDMA_WRITE", "RDMA_WRITE_WITH_IMM", "SEND"):
        side.say(name)
        link = Link(side, "UC")
        if not side.active:
            link.receive(link.area.sge(50, 5000))
            link.receive(link.area.sge(50, 6000))
        side.meet()
        if side.active:
            link.area.write(b"forbidden" * 10)
            wrong = {} if name == "SEND" else {"key": link.peer["key"] ^ 0x55}
            link.post(name, [link.area.sge(8 if "ATOMIC" in name else 60)], add=1, **wrong)
            link.take("send")
            link.state()
        side.meet()
        if not side.active:
            link.drain("recv")
            link.state()
            side.check(link.area.read(100) == bytes(100), "memory was changed")


def _grh(side: Side, link: Link, head: bytes, family: str) -> str:
    """A line about the 40 bytes before a datagram, without addresses (which are checked) and what counts up."""
    own, peer = (bytes(ipaddress.IPv6Address(gid).packed) for gid in (link.gid, link.peer["gid"]))
    if family == "4":
        ip = head[20:]
        side.check(ip[12:] == peer[12:] + own[12:], f"addresses {ip[12:].hex()}")
        length = int.from_bytes(ip[2:4], "big")
        return f"IPv4 {ip[0]:#x} tos {ip[1]} length {length} flags {ip[6] >> 5} ttl {ip[8]} protocol {ip[9]}"
    side.check(head[8:] == peer + own, f"addresses {head[8:].hex()}")
    return f"IPv6 {head[:4].hex()} length {int.from_bytes(head[4:6], 'big')} next {head[6]} hops {head[7]}"


def datagrams(side: Side) -> None:
    """UD over IPv4 and IPv6: sizes up to the MTU, immediates, the GRH before the data."""
    sizes = (0, 1, 100, 1023, 4096)
    for family in ("4", "6"):
        link = Link(side, "UD", gid=family)
        room = 8192
        if not side.active:
            for index in range(2 * len(sizes)):
                link.receive(link.area.sge(GRH, index * room), link.area.sge(4096, index * room + 100))
        side.meet()
        for index, (name, size) in enumerate((n, s) for n in ("SEND", "SEND_WITH_IMM") for s in sizes):
            data = pattern((family, index), size)
            if side.active:
                link.area.write(data)
                to = (link.handle(), link.peer["qpn"], QKEY)
                link.post(name, [link.area.sge(size)], imm=0x04030201 if "IMM" in name else 0, to=to)
                link.take("send")
            else:
                link.take("recv")
                side.check(link.area.read(size, index * room + 100) == data, f"datagram of {size} bytes")
                side.say(_grh(side, link, link.area.read(GRH, index * room), family))
            side.meet()
        link.quiet()


def dropped(side: Side) -> None:
    """Datagrams that must not be delivered: a wrong Q_Key, an unknown queue pair, too long, no receive, a short one."""
    before = side.context.query_port(1).qkey_viol_cntr
    for name in ("good", "no receive", "Q_Key", "queue pair", "too long", "nobody's key", "short receive"):
        side.say(name)
        link = Link(side, "UD")
        if not side.active and name != "no receive":
            link.receive(link.area.sge(GRH + 150))
        side.meet()
        if side.active:
            qpn, qkey = link.peer["qpn"], QKEY + (name == "Q_Key")
            to = (link.handle(), 0xABCDE if name == "queue pair" else qpn, qkey)
            size = {"too long": 4097, "short receive": 200}.get(name, 100)
            link.area.write(pattern(name, size))
            element = SGE(link.area.mr.buf, 100, 0x7777) if name == "nobody's key" else link.area.sge(size)
            link.post("SEND", [element], to=to)
            link.take("send")
            link.state()
        side.meet()
        if not side.active:
            if name == "good":
                link.take("recv")
            link.drain("recv")
            link.state()
            side.check((link.area.read(100, GRH) == pattern(name, 100)) == (name == "good"), "the data")
            side.say(f"Q_Key violations: {side.context.query_port(1).qkey_viol_cntr - before}")


SCENARIOS = (unreliable, unreliable_lossy, unreliable_faults, datagrams, dropped)
