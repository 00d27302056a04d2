"""Scenarios of the extended verbs: requests posted by ibv_wr_*, completions taken by ibv_start_poll."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pyverbs.enums as e
from data_keys import keep_key
from data_side import QKEY, READ, WRITE, Area, Link, Side, pattern
from pyverbs.cq import CQEX, CqInitAttrEx, PollCqAttr
from pyverbs.mr import MWBindInfo
from pyverbs.qp import DataBuffer
from pyverbs.wr import SGE

FIELDS = sum(
    getattr(e, f"IBV_WC_EX_WITH_{name}")
    for name in ("BYTE_LEN", "IMM", "QP_NUM", "SRC_QP", "SLID", "SL", "DLID_PATH_BITS")
)
EVERY_OPERATION = sum(
    getattr(e, f"IBV_QP_EX_WITH_{name}")
    for name in ("SEND", "SEND_WITH_IMM", "RDMA_WRITE", "RDMA_WRITE_WITH_IMM", "RDMA_READ", "ATOMIC_CMP_AND_SWP",
                 "ATOMIC_FETCH_AND_ADD", "LOCAL_INV", "BIND_MW", "SEND_WITH_INV")
)  # fmt: skip
AT, SIZE = 4096, 1000
"""Where windows lie."""


class Polled(CQEX):
    """An extended completion queue, asked as an ordinary one is: `poll`."""

    def __init__(self, side: Side, size: int = 30, fields: int = FIELDS, **more: int) -> None:
        super().__init__(side.context, CqInitAttrEx(cqe=size, wc_flags=fields, **more))
        self.there = False
        """All that is asked for is there. Otherwise one is taken at a time: when ibv_next_poll finds nothing, the
        driver of rdma-core 44 skips one that is not there yet."""

    def poll(self, count: int) -> tuple[int, list[Any]]:
        """Up to `count` completions."""
        found: list[Any] = []
        if self.start_poll(PollCqAttr()):
            return 0, found
        while True:
            path = self.read_slid(), self.read_sl(), self.read_dlid_path_bits()
            found.append(SimpleNamespace(
                wr_id=self.wr_id, status=self.status, opcode=self.read_opcode(), byte_len=self.read_byte_len(),
                wc_flags=self.read_wc_flags(), imm_data=self.read_imm_data(), qp_num=self.read_qp_num(),
                src_qp=self.read_src_qp(), vendor_err=self.read_vendor_err(), more=f" path {path}",
            ))  # fmt: skip
            if len(found) == count or not self.there:
                self.end_poll()
                return len(found), found
            if self.poll_next():
                raise AssertionError(f"{len(found)} completions, {count} had to be there")


def _post(link: Link, begin: Callable[[], Any], more: Callable[[], Any] | None = None, flags: int = 0) -> int:
    """One request between wr_start and wr_complete; its wr_id."""
    qp = link.qp
    qp.wr_id, qp.wr_flags = link.number("send"), e.IBV_SEND_SIGNALED | flags
    link.fenced |= bool(flags & e.IBV_SEND_FENCE)
    begin()
    if more is not None:
        more()
    return int(qp.wr_id)


def extended(side: Side) -> None:
    """Posting with ibv_wr_*: several requests of each kind at once, elements, lists of them and inline data."""
    link = Link(side, operations=EVERY_OPERATION, inline=64)
    area, qp = link.area, link.qp
    data = pattern("extended", 16384)
    if side.active:
        area.write(data)
    else:
        area.write((40).to_bytes(8, "little"), 40000)
        area.write(data[::-1], 65536)
        for index in range(3):
            link.receive(area.sge(4000, 4000 * index))
    side.meet()
    key, address = link.peer["key"], link.peer["address"]
    if side.active:
        qp.wr_start()
        for number, (begin, more) in enumerate((
            (qp.wr_send, lambda: qp.wr_set_sge(area.sge(3000))),
            (lambda: qp.wr_send_imm(0xABCD), lambda: qp.wr_set_sge_list(3, [area.sge(700, 3000)] * 3)),
            (lambda: qp.wr_rdma_write(key, address + 30000), lambda: qp.wr_set_sge(area.sge(2500, 100))),
            (lambda: qp.wr_rdma_write_imm(key, address + 33000, 3), lambda: qp.wr_set_sge(area.sge(7, 50))),
            (lambda: qp.wr_rdma_read(key, address + 65536), lambda: qp.wr_set_sge(area.sge(16384, 65536))),
            (lambda: qp.wr_atomic_fetch_add(key, address + 40000, 2), lambda: qp.wr_set_sge(area.sge(8, 90000))),
            (lambda: qp.wr_atomic_cmp_swp(key, address + 40000, 42, 9), lambda: qp.wr_set_sge(area.sge(8, 90008))),
        )):  # fmt: skip
            qp.wr_id, qp.wr_flags = number, e.IBV_SEND_SIGNALED
            begin()
            more()
        qp.wr_id, qp.wr_flags = 8, e.IBV_SEND_SIGNALED | e.IBV_SEND_INLINE
        qp.wr_rdma_write(key, address + 35000)
        qp.wr_set_inline_data(area.mr.buf + 10, 60)
        side.call("complete", qp.wr_complete)
        link.take("send", 8)
        side.check(area.read(16384, 65536) == data[::-1], "READ")
        side.check((area.number(90000), area.number(90008)) == (40, 42), "atomics")
        qp.wr_start()
        qp.wr_id = 9
        qp.wr_send()
        qp.wr_set_sge(SGE(0, 10, 1))
        qp.wr_abort()
        link.quiet("send")
    else:
        link.take("recv", 3)
    side.meet()
    if not side.active:
        side.check(area.read(3000) == data[:3000], "SEND")
        side.check(area.read(2100, 4000) == data[3000:3700] * 3, "SEND_WITH_IMM")
        side.check(area.read(2500, 30000) == data[100:2600], "RDMA_WRITE")
        side.check(area.read(7, 33000) == data[50:57], "RDMA_WRITE_WITH_IMM")
        side.check(area.read(60, 35000) == data[10:70], "inline")
        side.check(area.number(40000) == 9, "atomics")


def misaligned(side: Side) -> None:
    """An atomic at an odd address, which only ibv_wr_* lets through, is an invalid request."""
    link = Link(side, operations=e.IBV_QP_EX_WITH_ATOMIC_FETCH_AND_ADD)
    if side.active:
        link.qp.wr_start()
        link.qp.wr_id, link.qp.wr_flags = 1, e.IBV_SEND_SIGNALED
        link.qp.wr_atomic_fetch_add(link.peer["key"], link.peer["address"] + 4, 1)
        link.qp.wr_set_sge(link.area.sge(8))
        link.qp.wr_complete()
        link.take("send")
    side.meet()
    link.state()
    side.check(link.area.read(16) == bytes(16), "memory was changed")


def polled(side: Side) -> None:
    """Every kind of completion in extended completion queues, a few at a time; failed and flushed ones."""
    for name, more in {
        "no room": {"size": 0}, "too much": {"size": 40000}, "no field": {"fields": 0},
        "time": {"fields": FIELDS | e.IBV_WC_EX_WITH_COMPLETION_TIMESTAMP},
        "overruns": {"comp_mask": e.IBV_CQ_INIT_ATTR_MASK_FLAGS, "flags": e.IBV_CREATE_CQ_ATTR_IGNORE_OVERRUN},
        "one thread": {"comp_mask": e.IBV_CQ_INIT_ATTR_MASK_FLAGS, "flags": e.IBV_CREATE_CQ_ATTR_SINGLE_THREADED},
        "vector": {"comp_vector": 9999},
    }.items():  # fmt: skip
        if queue := side.call(name, lambda more=more: Polled(side, **more)):
            queue.close()
    link = Link(side, send_cq=Polled(side), recv_cq=Polled(side))
    names = ("SEND", "SEND_WITH_IMM", "RDMA_WRITE", "RDMA_WRITE_WITH_IMM", "RDMA_READ", "ATOMIC_FETCH_AND_ADD",
             "ATOMIC_CMP_AND_SWP")  # fmt: skip
    taking = [name for name in names if name in ("SEND", "SEND_WITH_IMM", "RDMA_WRITE_WITH_IMM")]
    for times in (1, 3, 6):  # the ring comes round
        if not side.active:
            for index in range(times * len(taking) + 1):
                link.receive(link.area.sge(3000, 3000 * (index % 20)))
        side.meet()
        for turn in range(times):
            if side.active:
                for name in names:
                    size = 8 if "ATOMIC" in name else 1500
                    link.post(name, [link.area.sge(size)], at=65536, imm=turn + 1 if "IMM" in name else 0, add=1)
                link.take("send", 3)
                link.take("send", len(names) - 3)
            side.meet()
            if not side.active:
                link.recv_cq.there = True
                link.take("recv", 2)
                link.take("recv", len(taking) - 2)
                link.recv_cq.there = False
            side.meet()
        if side.active:
            link.post("SEND", [], "SIGNALED SOLICITED")
            link.take("send")
        else:
            link.take("recv")
        link.quiet()
        side.meet()
    if not side.active:
        link.receive(link.area.sge(100))
        link.receive(link.area.sge(100))
    side.meet()
    if side.active:
        link.post("RDMA_WRITE", [link.area.sge(8)], key=link.peer["key"] ^ 0x55)
        link.post("SEND", [link.area.sge(8)])
        link.take("send", 2)
    side.meet()
    if not side.active:
        link.take("recv", 2)
    link.state()


def polled_datagrams(side: Side) -> None:
    """What an extended completion queue says of a datagram."""
    for family in ("4", "6"):
        link = Link(side, "UD", gid=family, send_cq=Polled(side), recv_cq=Polled(side))
        if not side.active:
            for _ in range(2):
                link.receive(link.area.sge(2000))
        side.meet()
        if side.active:
            to = (link.handle(), link.peer["qpn"], QKEY)
            link.post("SEND", [link.area.sge(1000)], to=to)
            link.post("SEND_WITH_IMM", [link.area.sge(10)], imm=0x01020304, to=to)
            link.take("send", 2)
        else:
            link.take("recv", 2)
        side.meet()


def posted_windows(side: Side) -> None:
    """A window bound by ibv_wr_bind_mw, its key sent behind it, used, and taken back; then bound again."""
    area = Area(side, 1 << 14)
    link = Link(side, area=area, operations=EVERY_OPERATION, inline=64)
    qp = link.qp
    window = side.window(e.IBV_MW_TYPE_2) if not side.active else None
    keys: list[int] = []
    for turn, taken_by in enumerate(("SEND_WITH_INV", "LOCAL_INV", "SEND_WITH_INV")):
        data = pattern(("posted", turn), SIZE)
        link.receive(area.sge(4000, 8192))
        side.meet()
        if window is not None:
            key = window.rkey & ~0xFF | (window.rkey + 1 + turn) & 0xFF
            area.write(key.to_bytes(4, "little"), 16000)
            info = MWBindInfo(area.mr, area.mr.buf + AT, SIZE, READ | WRITE)
            qp.wr_start()
            _post(link, lambda key=key, info=info: qp.wr_bind_mw(window, key, info))
            _post(link, qp.wr_send, lambda: qp.wr_set_inline_data(area.mr.buf + 16000, 4), e.IBV_SEND_INLINE)
            side.call("bind and send", qp.wr_complete)
            keep_key(window, key)
            link.take("send", 2)
            side.keys[key] = f"the window's {turn}"
            keys.append(key)
            link.take("recv")
            side.check(area.read(SIZE, AT) == data, "what came through the window")
            if taken_by == "LOCAL_INV":
                qp.wr_start()
                _post(link, lambda key=key: qp.wr_local_inv(key))
                side.call("invalidate", qp.wr_complete)
                link.take("send")
        else:
            link.take("recv")
            key = int.from_bytes(area.read(4, 8192), "little")
            keys.append(key)
            area.write(data)
            area.write(bytes(SIZE), 2000)
            at = link.peer["address"] + AT
            qp.wr_start()
            _post(link, lambda key=key, at=at: qp.wr_rdma_write(key, at), lambda: qp.wr_set_sge(area.sge(SIZE)))
            _post(link, lambda key=key, at=at: qp.wr_rdma_read(key, at), lambda: qp.wr_set_sge(area.sge(SIZE, 2000)))
            size = 3000 if turn == 2 else 10  # the last one takes the key back with its last packet
            answer = (lambda key=key: qp.wr_send_inv(key)) if taken_by == "SEND_WITH_INV" else qp.wr_send
            _post(link, answer, lambda size=size: qp.wr_set_sge(area.sge(size)), e.IBV_SEND_FENCE)
            side.call("write, read, send", qp.wr_complete)
            link.take("send", 3)
            side.check(area.read(SIZE, 2000) == data, "what was read through the window")
        side.meet()
    side.check(len({key >> 8 for key in keys}) == 1 and len(set(keys)) == 3, f"keys {keys}")
    if side.active:
        qp.wr_start()
        _post(link, lambda: qp.wr_rdma_write(keys[-1], link.peer["address"] + AT), lambda: qp.wr_set_sge(area.sge(8)))
        side.call("write with the last key", qp.wr_complete)
        link.take("send")
    side.meet()
    link.drain("recv")
    link.state()


def posted_lists(side: Side) -> None:
    """Elements, inline data, and requests at once: as many as there may be, and one more."""
    link = Link(side, operations=EVERY_OPERATION, inline=128, sges=4, depth=16)
    area, qp = link.area, link.qp
    data = pattern("lists", 8192)
    area.write(data if side.active else bytes(8192))
    own = ctypes.create_string_buffer(data[:512])
    start = ctypes.addressof(own)
    key, address = link.peer["key"], link.peer["address"]
    side.meet()
    if side.active:
        for count in (0, 1, 4, 8, 9):
            elements = [area.sge(300, 1000 * index) for index in range(count)]
            qp.wr_start()
            _post(link, lambda count=count: qp.wr_rdma_write(key, address + 10000 + 2400 * count),
                  lambda elements=elements: qp.wr_set_sge_list(len(elements), elements))  # fmt: skip
            if side.call(f"{count} elements", lambda: qp.wr_complete() or True):
                link.take("send")
        for size in (0, 1, 128, 129):
            qp.wr_start()
            _post(link, lambda: qp.wr_rdma_write(key, address + 40000),
                  lambda size=size: qp.wr_set_inline_data(start, size), e.IBV_SEND_INLINE)  # fmt: skip
            if side.call(f"{size} bytes inline", lambda: qp.wr_complete() or True):
                link.take("send")
        for lengths in ((), (0,), (128,), (60, 0, 68), (1,) * 100, (129,)):
            buffers = [DataBuffer(start + sum(lengths[:index]), size) for index, size in enumerate(lengths)]
            qp.wr_start()
            _post(link, lambda: qp.wr_rdma_write(key, address + 50000),
                  lambda buffers=buffers: qp.wr_set_inline_data_list(len(buffers), buffers),
                  e.IBV_SEND_INLINE)  # fmt: skip
            if side.call(f"{len(lengths)} pieces, {sum(lengths)} bytes inline", lambda: qp.wr_complete() or True):
                link.take("send")
        for count in (15, 16, 17, 31, 32, 33, 64):
            qp.wr_start()
            for index in range(count):
                qp.wr_id, qp.wr_flags = link.number("send"), e.IBV_SEND_SIGNALED if index == count - 1 else 0
                qp.wr_rdma_write(key, address + 60000 + 8 * index)
                qp.wr_set_sge(SGE(area.mr.buf + 8 * index, 8, area.mr.lkey))
            if side.call(f"{count} at once", lambda: qp.wr_complete() or True):
                link.take("send")
        link.quiet("send")
    side.meet()
    link.state()
    if not side.active:
        for count in (1, 4, 8):
            gathered = b"".join(data[1000 * index : 1000 * index + 300] for index in range(count))
            side.check(area.read(300 * count, 10000 + 2400 * count) == gathered, f"{count} elements")
        side.check(area.read(129, 40000) == data[:128] + b"\0", "inline data")
        # No look at the pieces: rdma-core 44 gives the driver no length for them.
        side.check(area.read(15 * 8, 60000) == data[: 15 * 8], "fifteen at once")


def posted_datagrams(side: Side) -> None:
    """Datagrams, and UC's requests, posted by ibv_wr_*."""
    both = e.IBV_QP_EX_WITH_SEND | e.IBV_QP_EX_WITH_SEND_WITH_IMM
    link = Link(side, "UD", operations=both, inline=64)
    area, qp = link.area, link.qp
    if not side.active:
        for index in range(3):
            link.receive(area.sge(2000, 2000 * index))
    area.write(pattern("datagrams", 1024) if side.active else bytes(8192))
    side.meet()
    if side.active:
        to = (link.handle(), link.peer["qpn"], QKEY)
        qp.wr_start()
        for begin, more, flags in (
            (qp.wr_send, lambda: qp.wr_set_sge(area.sge(1024)), 0),
            # rdma-core 44 takes the first element's length for that of each; rxe believes it.
            (lambda: qp.wr_send_imm(0x01020304), lambda: qp.wr_set_sge_list(2, [area.sge(5), area.sge(5, 5)]), 0),
            (qp.wr_send, lambda: qp.wr_set_inline_data(area.mr.buf, 64), e.IBV_SEND_INLINE),
        ):
            _post(link, begin, more, flags)
            qp.wr_set_ud_addr(*to)
        side.call("complete", qp.wr_complete)
        link.take("send", 3)
    else:
        link.take("recv", 3)
        for index, size in enumerate((1024, 10, 64)):
            side.check(area.read(size, 2000 * index + 40) == pattern("datagrams", 1024)[:size], f"datagram {index}")
    side.meet()
    link = Link(side, "UC", operations=both | e.IBV_QP_EX_WITH_RDMA_WRITE)
    area, qp = link.area, link.qp
    if not side.active:
        link.receive(area.sge(3000))
    area.write(pattern("UC", 3000) if side.active else bytes(8192))
    side.meet()
    if side.active:
        qp.wr_start()
        _post(link, lambda: qp.wr_rdma_write(link.peer["key"], link.peer["address"] + 4000),
              lambda: qp.wr_set_sge(area.sge(2500)))  # fmt: skip
        _post(link, lambda: qp.wr_send_imm(7), lambda: qp.wr_set_sge(area.sge(3000)))
        side.call("complete", qp.wr_complete)
        link.take("send", 2)
    else:
        link.take("recv")
        side.check(area.read(3000) == pattern("UC", 3000), "SEND")
        side.check(area.read(2500, 4000) == pattern("UC", 3000)[:2500], "RDMA_WRITE")
    side.meet()


SCENARIOS = (
    extended, misaligned, polled, polled_datagrams, posted_windows, posted_lists, posted_datagrams,
)  # fmt: skip
