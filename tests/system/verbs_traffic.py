"""Numbered traffic that detects a message that was lost, duplicated or changed.

Run as `-m tests.system.verbs_traffic MODE [SECONDS] [SERVER-IP]` on stock libibverbs (pyverbs) at both ends; the one
without an address listens. Modes:

adder   RC: the client adds to a counter of the server by atomics, eight at a time; each must return the number before.
shared  RC: numbered messages into a shared receive queue, all of them, in order.
forked  the same from a program that has called ibv_fork_init and has a child.
uc, ud  numbered messages; some may be lost, but what comes is whole, once, and in order.
doomed  RC with three retries: the client streams until the server has gone, and must then see RETRY_EXC_ERR.
leaver  UD: the client says `ready`; at a line on its input it posts eight messages, says `posted`, frees all at once.

Ends with 0 and the line `ok N`, N the number of messages or additions.
"""

from __future__ import annotations

import ctypes
import os
import random
import select
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import pyverbs.enums as e
from pyverbs.addr import AH, GID, AHAttr, GlobalRoute
from pyverbs.cq import CQ
from pyverbs.device import Context
from pyverbs.mr import MR
from pyverbs.pd import PD
from pyverbs.qp import QP, QPAttr, QPCap, QPInitAttr
from pyverbs.srq import SRQ, SrqAttr, SrqInitAttr
from pyverbs.wr import SGE, RecvWR, SendWR

from tests.system.verbs_ends import Talk

KINDS = {"uc": e.IBV_QPT_UC, "ud": e.IBV_QPT_UD, "leaver": e.IBV_QPT_UD}
ACCESS = e.IBV_ACCESS_LOCAL_WRITE | e.IBV_ACCESS_REMOTE_WRITE | e.IBV_ACCESS_REMOTE_ATOMIC
DEPTH, SLOT = 32, 8192
GRH, QKEY, PSN = 40, 0x1234, 0xFFFFF0
WAIT = 60
"""Seconds without a completion after which something must be wrong."""


def message(number: int, longest: int) -> bytes:
    """The bytes of message `number`: its number, then what follows from it."""
    dice = random.Random(number)
    return number.to_bytes(8, "little") + dice.randbytes(dice.randrange(longest - 8))


class Endpoint:
    """One connected queue pair with a region of DEPTH slots and a counter behind them."""

    def __init__(self, talk: Talk, mode: str) -> None:
        self.talk = talk
        self.kind = KINDS.get(mode, e.IBV_QPT_RC)
        self.longest = 2000 if self.kind == e.IBV_QPT_UD else 6000
        self.lossless = self.kind == e.IBV_QPT_RC or mode == "leaver"
        self.context = Context(name="rxe0")
        self.pd = PD(self.context)
        self.mr = MR(self.pd, DEPTH * SLOT + 8, ACCESS)
        self.cq = CQ(self.context, 4 * DEPTH)
        self.srq = SRQ(self.pd, SrqInitAttr(SrqAttr(max_wr=DEPTH))) if mode in ("shared", "forked") else None
        cap = QPCap(max_send_wr=2 * DEPTH, max_recv_wr=2 * DEPTH)
        self.qp = QP(self.pd, QPInitAttr(qp_type=self.kind, scq=self.cq, rcq=self.cq, cap=cap, srq=self.srq))
        self.done: deque[Any] = deque()
        self._connect(retries=3 if mode == "doomed" else 7)

    def _connect(self, retries: int) -> None:
        attr = QPAttr(port_num=1)
        attr.qkey, attr.qp_access_flags = QKEY, ACCESS if self.kind != e.IBV_QPT_UD else 0
        self.qp.to_init(attr)
        gid = str(self.context.query_gid(port_num=1, index=1))
        mine = {"qpn": self.qp.qp_num, "gid": gid, "counter": self.mr.buf + DEPTH * SLOT, "rkey": self.mr.rkey}
        self.remote = self.talk.swap(mine)
        route = GlobalRoute(dgid=GID(self.remote["gid"]), sgid_index=1)
        way = AHAttr(port_num=1, is_global=1, gr=route)
        self.ah = AH(self.pd, attr=way) if self.kind == e.IBV_QPT_UD else None
        attr.path_mtu, attr.dest_qp_num, attr.rq_psn, attr.sq_psn = e.IBV_MTU_1024, self.remote["qpn"], PSN, PSN
        attr.max_dest_rd_atomic = attr.max_rd_atomic = 4
        attr.min_rnr_timer, attr.timeout, attr.retry_cnt, attr.rnr_retry = 12, 14, retries, 7
        attr.ah_attr = way
        self.qp.to_rts(attr)
        self.talk.swap()

    def sge(self, slot: int, length: int) -> SGE:
        """A slot of the region."""
        return SGE(self.mr.buf + slot * SLOT, length, self.mr.lkey)

    def receive(self, slot: int) -> None:
        """Post a receive."""
        request = RecvWR(wr_id=slot, num_sge=1, sg=[self.sge(slot, SLOT)])
        (self.srq or self.qp).post_recv(request)

    def send(self, slot: int, data: bytes) -> None:
        """Send from a slot."""
        self.mr.write(data, len(data), slot * SLOT)
        request = SendWR(wr_id=slot, opcode=e.IBV_WR_SEND, num_sge=1, sg=[self.sge(slot, len(data))])
        if self.ah is not None:
            request.set_wr_ud(self.ah, self.remote["qpn"], QKEY)
        self.qp.post_send(request)

    def add(self, slot: int, number: int) -> None:
        """Make the remote counter `number + 1`, by an addition or by an exchange."""
        swap = number % 16 == 15
        opcode = e.IBV_WR_ATOMIC_CMP_AND_SWP if swap else e.IBV_WR_ATOMIC_FETCH_AND_ADD
        request = SendWR(wr_id=slot, opcode=opcode, num_sge=1, sg=[self.sge(slot, 8)])
        first, second = (number, number + 1) if swap else (1, 0)
        request.set_wr_atomic(self.remote["rkey"], self.remote["counter"], first, second)
        self.qp.post_send(request)

    def completion(self, wait: float = WAIT) -> Any:
        """The next one; None after `wait` seconds. Sleeps in between: others want the processor too."""
        deadline = time.monotonic() + wait
        while not self.done:
            count, found = self.cq.poll(16)
            self.done.extend(found[:count])
            if not count:
                if time.monotonic() > deadline:
                    return None
                time.sleep(0.0002)
        return self.done.popleft()

    def good(self) -> Any:
        """The next one, which must be there and fine."""
        found = self.completion()
        assert found is not None, f"no completion for {WAIT} s"
        assert found.status == e.IBV_WC_SUCCESS, f"status {found.status}"
        return found


def adder(end: Endpoint, seconds: float) -> int:
    """The client of `adder`: additions in flight, each answered by the number before."""
    posted = answered = 0
    stop = time.monotonic() + seconds
    while answered < posted or time.monotonic() < stop:
        while posted - answered < 8 and time.monotonic() < stop:
            end.add(posted % DEPTH, posted)
            posted += 1
        slot = end.good().wr_id
        assert slot == answered % DEPTH, f"slot {slot} completed, {answered % DEPTH} was next"
        got = int.from_bytes(end.mr.read(8, slot * SLOT), "little")
        assert got == answered, f"addition {answered} found {got}"
        answered += 1
    return answered


def sender(end: Endpoint, seconds: float) -> int:
    """The client of the other modes: numbered messages, paced where nothing else limits them."""
    posted = completed = 0
    stop = time.monotonic() + seconds
    while completed < posted or time.monotonic() < stop:
        while posted - completed < 8 and time.monotonic() < stop:
            end.send(posted % DEPTH, message(posted, end.longest))
            posted += 1
            if end.kind != e.IBV_QPT_RC:
                time.sleep(0.002)
        end.good()
        completed += 1
    return posted


def receiver(end: Endpoint) -> int:
    """The server: checks what comes until the client has said how many it sent."""
    expected = received = 0
    sent = None
    header = GRH if end.kind == e.IBV_QPT_UD else 0
    while sent is None or (end.lossless and expected < sent):
        found = end.completion(0.05)
        if found is None:
            if sent is None and select.select([end.talk.socket], [], [], 0)[0]:
                sent = end.talk.swap()
            continue
        assert found.status == e.IBV_WC_SUCCESS, f"status {found.status}"
        data = end.mr.read(found.byte_len, found.wr_id * SLOT)[header:]
        number = int.from_bytes(data[:8], "little")
        assert data == message(number, end.longest), f"message {number} is damaged"
        assert number == expected if end.lossless else number >= expected, f"message {number}, expected {expected}"
        expected, received = number + 1, received + 1
        end.receive(found.wr_id)
    if not end.lossless:
        assert expected > sent - 200, f"{sent} were sent, and nothing came after {expected}"
        assert received > sent // 3, f"{received} of {sent} came"
    return received


def leaver(end: Endpoint) -> int:
    """The client that waits for nothing after it has posted: rxe sends from within ibv_post_send."""
    print("ready", flush=True)
    sys.stdin.readline()
    for number in range(8):
        end.send(number, message(number, end.longest))
    print("posted", flush=True)
    for item in (end.qp, end.ah, end.mr, end.cq, end.pd, end.context):
        item.close()
    return 8


def doomed(end: Endpoint) -> int:
    """The client whose server dies: everything is fine until RETRY_EXC_ERR, then everything is flushed."""
    good = 0
    for slot in range(8):
        end.send(slot, message(slot, end.longest))
    while (found := end.completion()).status == e.IBV_WC_SUCCESS:
        good += 1
        end.send(found.wr_id, message(7 + good, end.longest))
    assert found.status == e.IBV_WC_RETRY_EXC_ERR, f"status {found.status}"
    assert [end.completion().status for _ in range(7)] == [e.IBV_WC_WR_FLUSH_ERR] * 7
    assert end.qp.query(e.IBV_QP_STATE)[0].qp_state == e.IBV_QPS_ERR
    end.receive(5)  # no doorbell tells the NIC of it
    late = end.completion()
    assert (late.wr_id, late.status) == (5, e.IBV_WC_WR_FLUSH_ERR)
    return good


CLIENTS: dict[str, Callable[[Endpoint, float], int]] = {
    "adder": adder,
    "doomed": lambda end, _: doomed(end),
    "leaver": lambda end, _: leaver(end),
}


def main() -> None:
    """As the mode says."""
    mode, seconds = sys.argv[1], float(sys.argv[2])
    server = sys.argv[3] if len(sys.argv) > 3 else None
    child = 0
    if mode == "forked" and server is not None:
        assert ctypes.CDLL("libibverbs.so.1").ibv_fork_init() == 0
    end = Endpoint(Talk(server), mode)
    if mode == "forked" and server is not None:
        reading, writing = os.pipe()
        child = os.fork()
        if not child:  # lives until its parent is done, and touches nothing
            os.close(writing)
            os.read(reading, 1)
            os._exit(0)
    if server is None:
        if mode != "adder":
            for slot in range(DEPTH):
                end.receive(slot)
        end.talk.swap()
        if mode == "adder":
            count = end.talk.swap()
            total = int.from_bytes(end.mr.read(8, DEPTH * SLOT), "little")
            assert total == count, f"the counter is {total} after {count} additions"
        else:
            count = receiver(end)
    else:
        end.talk.swap()
        count = CLIENTS.get(mode, sender)(end, seconds)
        if mode != "doomed":
            end.talk.swap(count)
    if child:
        os.close(writing)
        assert os.waitpid(child, 0)[1] == 0, "the child has died"
    if mode != "doomed":
        end.talk.swap()
    print("ok", count, flush=True)


if __name__ == "__main__":
    main()
