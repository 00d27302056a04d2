"""Commands as they are (the kernel's write ABI, past the C library), events, and what a port says about its link.

Run like calls.py, whose lines it continues. It takes the interface down for a moment, so it comes last.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import struct
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyverbs.enums as e
from calls import Bench, call, run, values
from pyverbs.cq import CQ
from pyverbs.wr import SGE, RecvWR, SendWR

SYSFS = Path(os.environ.get("SYSFS_PATH", "/sys"))
EVENTS = {0: "CQ_ERR", 1: "QP_FATAL", 9: "PORT_ACTIVE", 10: "PORT_ERR", 18: "GID_CHANGE"}
GROUP = bytes(10) + b"\xff\xff" + bytes([239, 1, 2, 3])
GROUP6 = bytes([0xFF, 0x0E]) + bytes(13) + b"\x07"
UNICAST = bytes(10) + b"\xff\xff" + bytes([10, 9, 0, 77])
RC, UC, UD = 2, 3, 4


def descriptor(*ends: str) -> int:
    """The newest descriptor of this process whose link ends so."""
    found = -1
    for name in sorted(os.listdir("/proc/self/fd"), key=int):
        try:
            if os.readlink(f"/proc/self/fd/{name}").endswith(ends):
                found = int(name)
        except OSError:
            continue
    return found


class Raw:
    """The command descriptor of one context."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self.fd = descriptor("/dev/infiniband/uverbs0", "/queues")
        self._events = descriptor("infinibandevent]", "/async")
        self.memory = ctypes.create_string_buffer(1 << 16)
        self.page = (ctypes.addressof(self.memory) + 4095) & ~4095

    def command(self, number: int, body: bytes = b"", out: int = 0) -> bytes:
        """Write one command; its response. Raises OSError."""
        answer = ctypes.create_string_buffer(max(out, 8))
        pointer = struct.pack("<Q", ctypes.addressof(answer)) if out else b""
        size = 8 + len(pointer) + len(body)
        os.write(self.fd, struct.pack("<IHH", number, size // 4, out // 4) + pointer + body)
        return answer.raw[:out]

    def say(self, name: str, number: int, body: bytes = b"", out: int = 0) -> None:
        """Make a command and print what comes of it."""
        try:
            self.command(number, body, out)
        except OSError as error:
            print(f"{name}: {errno.errorcode.get(error.errno or 0, error.errno)}")
        else:
            print(f"{name}: ok")

    def events(self, wait: float = 0.0) -> Counter[str]:
        """How often each asynchronous event has come; acknowledged, since destroying waits for that."""
        time.sleep(wait)
        found: Counter[str] = Counter()
        while select.select([self._events], [], [], 0)[0]:
            event = self._context.get_async_event()
            found[EVENTS.get(event.event_type, str(event.event_type))] += 1
            event.ack()
        return found

    # The objects that the commands are about; handles.

    def pd(self) -> int:
        return int(struct.unpack("<I", self.command(3, b"", 4))[0])

    def cq(self, size: int = 16) -> int:
        return int(struct.unpack_from("<I", self.command(18, struct.pack("<QIIiI", 0xC0, size, 0, -1, 0), 24))[0])

    def qp(self, kind: int, pd: int, cq: int) -> int:
        body = struct.pack("<QIIIIIIIIIBBBx", 0xD0, pd, cq, cq, 0, 4, 4, 1, 1, 0, 0, kind, 0)
        return int(struct.unpack_from("<I", self.command(24, body, 64))[0])


def init(raw: Raw, qp: int) -> None:
    """A UD queue pair from RESET to INIT: state, P_Key index, port, Q_Key."""
    numbers = struct.pack("<IIIIIIIHH", qp, 1 | 1 << 4 | 1 << 5 | 1 << 6, 5, 0, 0, 0, 0, 0, 0)
    raw.command(26, bytes(64) + numbers + bytes([1, 0, 0, 0, 0, 0, 0, 0, 1] + [0] * 7))


def commands(b: Bench) -> None:
    """Commands that rxe does not have, truncated ones, and those that stand for a doorbell."""
    raw = Raw(b.context)
    for number in (6, 7, 10, 12, 15, 21, 22, 29, 36, 37, 38, 40, 41, 50, 60, 0xFF):
        raw.say(f"command {number}", number, bytes(64), 64)
    raw.say("command 0x80000063", 0x80000063, bytes(64))
    raw.say("command 0x10000001", 0x10000001, bytes(64))
    pd, cq = raw.pd(), raw.cq()
    for name, number, length in (
        ("REG_MR", 9, 32), ("CREATE_CQ", 18, 24), ("CREATE_QP", 24, 48), ("MODIFY_QP", 26, 112), ("QUERY_QP", 25, 8),
        ("DEALLOC_PD", 4, 4), ("ATTACH_MCAST", 30, 24), ("REQ_NOTIFY_CQ", 23, 8), ("ALLOC_MW", 14, 8),
    ):  # fmt: skip
        out = 0 if number in (4, 23, 26, 30) else 64
        raw.say(f"{name} cut", number, bytes(length - 4 if length > 4 else 0), out)
    raw.say("ALLOC_PD without room for its response", 3, bytes(8))
    for handle in (cq, pd, 0x7FFF):
        for solicited in (0, 1):
            what = {cq: "a CQ", pd: "a PD"}.get(handle, "nothing")
            raw.say(f"REQ_NOTIFY_CQ {solicited} of {what}", 23, struct.pack("<II", handle, solicited))
    raw.say("POLL_CQ", 21, struct.pack("<II", cq, 1), 64)
    for kind, name in ((RC, "RC"), (UD, "UD")):
        qp = raw.qp(kind, pd, cq)
        raw.say(f"POST_SEND {name} RESET", 28, struct.pack("<IIII", qp, 0, 0, 128), 4)
        raw.say(f"POST_SEND {name} RESET small wqe", 28, struct.pack("<IIII", qp, 0, 0, 16), 4)
        raw.say(f"POST_RECV {name}", 29, struct.pack("<IIII", qp, 0, 0, 32), 4)
    raw.say("POST_SEND nothing", 28, struct.pack("<IIII", 0x7FFF, 0, 0, 128), 4)
    raw.say("POST_SEND a PD", 28, struct.pack("<IIII", pd, 0, 0, 128), 4)
    raw.say("POST_SRQ_RECV", 36, struct.pack("<IIII", qp, 0, 0, 32), 4)
    for state in ("RESET", "INIT", "RTR", "RTS", "SQD", "ERR"):
        with b.qp_in("RC", state) as made:
            handle = newest(raw)
            raw.say(f"POST_SEND in {state}", 28, struct.pack("<IIII", handle, 0, 0, 128), 4)
            wr = struct.pack("<QIIIIQII", 1, 0, 2, 2, 0, 0, 0, 0) + bytes(88)
            raw.say(f"POST_SEND one in {state}", 28, struct.pack("<IIII", handle, 1, 0, len(wr)) + wr, 4)
            call(f"POST_SEND in {state}: still there", lambda made=made: made.qp_num > 0, True)


def newest(raw: Raw) -> int:
    """The handle of the queue pair that was made last: the highest that QUERY_QP knows."""
    for handle in range(400, -1, -1):
        try:
            raw.command(25, struct.pack("<II", handle, 1), 128)
        except OSError:
            continue
        return handle
    return -1


def ranges(b: Bench) -> None:
    """REG_MR of nothing and of odd ranges, REREG_MR."""
    raw = Raw(b.context)
    pd = raw.pd()
    other = raw.pd()
    for name, start, length, iova in (
        ("empty, at a page", raw.page, 0, raw.page), ("empty, inside a page", raw.page + 100, 0, raw.page + 100),
        ("empty, at 0", 0, 0, 0), ("one byte", raw.page + 1, 1, raw.page + 1),
        ("iova elsewhere, same place of the page", raw.page + 8, 64, 8), ("iova at another place", raw.page, 64, 8),
        ("wraps", raw.page, (1 << 64) - 1, raw.page), ("nothing there", 0x1000, 64, 0x1000),
        ("iova wraps", raw.page, 8192, (1 << 64) - 4096),
    ):  # fmt: skip
        raw.say(f"REG_MR {name}", 9, struct.pack("<QQQII", start, length, iova, pd, 1), 12)
    (mr,) = struct.unpack_from("<I", raw.command(9, struct.pack("<QQQII", raw.page, 4096, raw.page, pd, 1), 12))
    for flags in (0, 1, 2, 4, 6, 7, 8):
        body = struct.pack("<IIQQQII", mr, flags, raw.page, 4096, raw.page, other, 7)
        raw.say(f"REREG_MR flags {flags}", 11, body, 8)


def groups(b: Bench) -> None:
    """Multicast groups: addresses, LIDs, members, limits."""
    raw = Raw(b.context)
    pd, cq = raw.pd(), raw.cq()
    ud, rc = raw.qp(UD, pd, cq), raw.qp(RC, pd, cq)

    def both(name: str, qp: int, group: bytes, lid: int, leave: int | None = None) -> None:
        raw.say(f"ATTACH_MCAST {name}", 30, struct.pack("<16sIHH", group, qp, lid, 0))
        raw.say(f"DETACH_MCAST {name}", 31, struct.pack("<16sIHH", group, qp, lid if leave is None else leave, 0))

    for state in ("RESET", "INIT"):
        for lid in (0, 1, 0xBFFF, 0xC000, 0xFFFE, 0xFFFF):
            both(f"in {state} LID {lid:#x}", ud, GROUP, lid)
        both(f"in {state} IPv6", ud, GROUP6, 0)
        both(f"in {state} no group", ud, UNICAST, 0)
        both(f"in {state} of RC", rc, GROUP, 0)
        if state == "RESET":
            init(raw, ud)
    both("of nothing", 0x7FFF, GROUP, 0)
    both("of a PD", pd, GROUP, 0)
    both("left with another LID", ud, GROUP, 0, 5)
    raw.say("ATTACH_MCAST twice", 30, struct.pack("<16sIHH", GROUP, ud, 0, 0))
    raw.say("ATTACH_MCAST with a second LID", 30, struct.pack("<16sIHH", GROUP, ud, 7, 0))
    raw.say("DESTROY_QP of a member", 27, struct.pack("<II", ud, 0), 4)
    for lid in (7, 0, 0, 7):
        raw.say(f"DETACH_MCAST LID {lid} again", 31, struct.pack("<16sIHH", GROUP, ud, lid, 0))
    raw.say("DESTROY_QP", 27, struct.pack("<II", ud, 0), 4)
    made = [raw.qp(UD, pd, cq) for _ in range(58)]
    for number, qp in enumerate(made):
        raw.say(f"ATTACH_MCAST member {number}", 30, struct.pack("<16sIHH", GROUP, qp, 0, 0))
    for qp in made:
        try:
            raw.command(31, struct.pack("<16sIHH", GROUP, qp, 0, 0))
        except OSError:
            continue


def depths(b: Bench) -> None:
    """What ibv_query_qp says after ibv_modify_qp, in every state; responder resources rounded up."""
    skip = "ah_attr|sq_psn|rq_psn|cap|cur_qp_state"
    for kind in ("RC", "UC", "UD"):
        for state in ("RESET", "INIT", "RTR", "RTS", "SQD", "ERR"):
            with b.qp_in(kind, state) as qp:
                call(f"query {kind} in {state}", lambda qp=qp: values(qp.query(0x1FFFFF)[0], skip), True)
                call(f"query {kind} in {state}, cur_qp_state", lambda qp=qp: qp.query(0x1FFFFF)[0].cur_qp_state, True)
    for depth in (0, 1, 3, 5, 16, 33, 65, 127, 128):
        with b.qp_in("RC", "INIT") as qp:
            b.move(qp, "RC", "RTR", max_dest_rd_atomic=depth)
            b.move(qp, "RC", "RTS", max_rd_atomic=depth)
            call(f"query depth {depth}", lambda qp=qp: values(qp.query(0x1FFFFF)[0], "^(?!max_)"), True)


def overrun(b: Bench) -> None:
    """A completion queue that is full: events, and what becomes of the queue pairs."""
    raw = Raw(b.context)
    for posted, full in ((10, "send"), (10, "receive")):
        small, wide = CQ(b.context, 3), CQ(b.context, 100)
        b.cq = small if full == "send" else wide
        sender = b.qp("RC")
        b.cq = wide if full == "send" else small
        receiver = b.qp("RC")
        for qp, other in ((sender, receiver), (receiver, sender)):
            for to in ("INIT", "RTR", "RTS"):
                b.move(qp, "RC", to, dest_qp_num=other.qp_num, rq_psn=6)
        raw.events()
        for number in range(posted):
            receiver.post_recv(RecvWR(wr_id=number, num_sge=1, sg=[SGE(b.mr.buf, 64, b.mr.lkey)]))
        for number in range(posted):
            sge = SGE(b.mr.buf, 8, b.mr.lkey)
            sender.post_send(SendWR(wr_id=number, opcode=e.IBV_WR_SEND, num_sge=1, sg=[sge]))
        found = raw.events(1.0)
        print(f"overrun of the {full} queue, events: {found['CQ_ERR']} of {found.total()}")
        for name, queue in (("full", small), ("other", wide)):
            count, done = queue.poll(100)
            print(f"overrun of the {full} queue, the {name} one: {count} {[wc.status for wc in done]}")
        for name, qp in (("sender", sender), ("receiver", receiver)):
            print(f"overrun of the {full} queue, state of the {name}: {qp.query(e.IBV_QP_STATE)[0].qp_state}")
        print(f"overrun of the {full} queue, events after polling: {raw.events(0.2).total()}")


def ip(*words: str) -> str:
    """Run the program ip; what it says."""
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True).stdout


def links(b: Bench) -> None:
    """The interface goes down, comes up, changes its MTU: the port, its files, its events."""
    raw = Raw(b.context)
    port = SYSFS / "class" / "infiniband" / "rxe0" / "ports" / "1"
    own = ip("-6", "-o", "address", "show", "dev", "eth0", "scope", "global").split()[3]
    mtu = ip("-o", "link", "show", "dev", "eth0").split(" mtu ")[1].split()[0]

    def change(name: str, *words: str) -> None:
        raw.events()
        ip(*words)
        found = raw.events(0.7)
        for event in ("PORT_ERR", "PORT_ACTIVE"):
            print(f"{name}, events {event}: {found[event]}")
        print(f"{name}, GIDs changed: {found['GID_CHANGE'] > 0}")
        call(f"{name}, query_port", lambda: values(b.context.query_port(1), "gid_tbl|cap|cntr"), True)
        for file in ("state", "phys_state", "rate"):
            print(f"{name}, {file}: {(port / file).read_text().strip().replace(': ', ' ')}")

    change("at first", "link", "show", "dev", "eth0")
    for size in ("600", "9000", "4175", "4176"):
        change(f"MTU {size}", "link", "set", "eth0", "mtu", size)
    change("MTU as before", "link", "set", "eth0", "mtu", mtu)
    for count in (1, 2):
        for state in ("down", "down", "up", "up"):
            change(f"{state}, round {count}", "link", "set", "eth0", state)
    change("IPv6 address back", "-6", "address", "replace", own, "dev", "eth0", "nodad")
    change("one address more", "address", "add", "10.9.0.99/24", "dev", "eth0")
    change("one address less", "address", "del", "10.9.0.99/24", "dev", "eth0")


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    parts = (commands, ranges, groups, depths, overrun, links)
    run(*(part for part in parts if len(sys.argv) <= 1 or part.__name__ in sys.argv[1:]))
