"""Traffic through memory windows and keys that are taken back: `-m tests.system.verbs_windows SECONDS [SERVER-IP]`.

Runs on stock libibverbs (pyverbs) at both ends. The one without an address owns the memory. For each round it binds a
window of type 2 (BIND_MW in its send queue) to just the bytes of the round's message and sends an order behind it. The
client WRITEs the message through the window's key and READs it back, WRITEs the round's number through a window of type
1 that is bound for the whole run, and answers by SEND_WITH_INV; to every fourth order by a plain SEND, and the owner
takes the key back itself (LOCAL_INV). Keys that were taken back are tried on queue pairs of their own, which must end
so: once a second, and at the end those from the very beginning. They talk over TCP before the traffic only.

Ends with 0 and the line `ok N`, N the number of rounds.
"""

from __future__ import annotations

import struct
import sys
import time
from collections import deque
from typing import Any, NamedTuple

import pyverbs.enums as e
from pyverbs.addr import GID, AHAttr, GlobalRoute
from pyverbs.cq import CQ
from pyverbs.device import Context
from pyverbs.mr import MR, MW, MWBind, MWBindInfo
from pyverbs.pd import PD
from pyverbs.qp import QP, QPAttr, QPCap, QPInitAttr
from pyverbs.wr import SGE, RecvWR, SendWR

from tests.interop.probe.data_keys import keep_key
from tests.system.verbs_ends import ALL_ACCESS, Talk
from tests.system.verbs_traffic import message

MAIN, KEPT, RETURNED, REVOKED, FOREIGN, CONTROL = range(6)
"""Queue pairs: of the traffic; whose window stays bound; whose key the client, or the owner, took back at the
beginning; that tries another one's key; that says the end."""
SPARES = range(6, 14)
LINKS, WINDOWS = 14, 4
SLOT, LONGEST, NOTE = 8192, 6000, 4096
BACK, NOTES = WINDOWS * SLOT, 2 * WINDOWS * SLOT
"""Where a region has what was read back, and what is sent and received besides."""
RETURN, LEND, STALE, END = range(4)
"""Orders: use the key and take it back, use it only, try it in vain, no more."""
ORDER = struct.Struct("<IIQQII")
"""Order, slot, number, address, key, key of the window of type 1."""
ANSWER = struct.Struct("<IIQ")
"""Order, slot, number; a part of the message follows."""
WRITTEN = e.IBV_ACCESS_REMOTE_WRITE | e.IBV_ACCESS_REMOTE_READ
RECEIVE, BIND, TELL, TAKE, WRITE, READ, TRY, BYE = range(8)
"""What a work request is for; with the queue pair and the slot its wr_id."""
PSN, WAIT = 0xFFFFF0, 60


def part(data: bytes, number: int) -> bytes:
    """What of a message its answer repeats: so that there are answers of one, two and three packets."""
    return data[: number % 3 * 1200]


class Link:
    """A connected queue pair with a region of its own: a slot for each window, as many to read back, notes."""

    def __init__(self, end: End, number: int) -> None:
        self.number = number
        self.mr = MR(end.pd, NOTES + 4 * WINDOWS * NOTE, ALL_ACCESS)
        cap = QPCap(max_send_wr=64, max_recv_wr=16)
        self.qp = QP(end.pd, QPInitAttr(qp_type=e.IBV_QPT_RC, scq=end.cq, rcq=end.cq, cap=cap))
        self.doomed = self.fallen = False
        """A key is tried in vain, so this queue pair may fail; it has."""

    def connect(self, gid: str, qpn: int) -> None:
        """To RTS, with receives posted."""
        attr = QPAttr(port_num=1)
        attr.qp_access_flags = ALL_ACCESS & 0xF
        attr.path_mtu, attr.dest_qp_num, attr.rq_psn, attr.sq_psn = e.IBV_MTU_1024, qpn, PSN, PSN
        attr.max_dest_rd_atomic = attr.max_rd_atomic = 4
        attr.min_rnr_timer, attr.timeout, attr.retry_cnt, attr.rnr_retry = 12, 14, 7, 7
        attr.ah_attr = AHAttr(port_num=1, is_global=1, gr=GlobalRoute(dgid=GID(gid), sgid_index=1))
        self.qp.to_rts(attr)
        for slot in range(2 * WINDOWS):
            self.receive(slot)

    def _id(self, kind: int, slot: int) -> int:
        return self.number << 16 | kind << 8 | slot

    def _note(self, slot: int) -> int:
        return NOTES + slot * NOTE

    def receive(self, slot: int) -> None:
        """Post a receive."""
        sge = SGE(self.mr.buf + self._note(2 * WINDOWS + slot), NOTE, self.mr.lkey)
        self.qp.post_recv(RecvWR(wr_id=self._id(RECEIVE, slot), num_sge=1, sg=[sge]))

    def received(self, slot: int, length: int) -> bytes:
        """What came into a receive, which is posted again."""
        found = bytes(self.mr.read(length, self._note(2 * WINDOWS + slot)))
        self.receive(slot)
        return found

    def post(
        self, kind: int, slot: int, opcode: int, at: int = 0, length: int = 0, key: int = 0, to: int = 0, flags: int = 0
    ) -> None:
        """A request from or to `at` of the own region; key, to: of the partner; or the key that is taken back."""
        sges = [SGE(self.mr.buf + at, length, self.mr.lkey)] if length else []
        signaled = flags | e.IBV_SEND_SIGNALED
        request = SendWR(self._id(kind, slot), opcode, len(sges), key if not to else 0, sges, signaled)
        if to:
            request.set_wr_rdma(key, to)
        self.qp.post_send(request)

    def tell(self, kind: int, slot: int, data: bytes, opcode: int = e.IBV_WR_SEND, key: int = 0) -> None:
        """SEND a note; not before what was read has come."""
        self.mr.write(data, len(data), self._note(slot))
        self.post(kind, slot, opcode, self._note(slot), len(data), key, flags=e.IBV_SEND_FENCE)

    def bind(self, slot: int, window: MW, length: int) -> int:
        """Bind a window of type 2 to the begin of a slot, through the send queue; its key to be."""
        request = SendWR(self._id(BIND, slot), e.IBV_WR_BIND_MW, 0, 0, None, e.IBV_SEND_SIGNALED)
        request.set_bind_wr(window, MWBindInfo(self.mr, self.mr.buf + slot * SLOT, length, WRITTEN))
        self.qp.post_send(request)
        keep_key(window, request.rkey)
        return int(request.rkey)


class End:
    """All queue pairs of one end, with one completion queue."""

    def __init__(self, server: str | None) -> None:
        talk = Talk(server)
        self.context = Context(name="rxe0")
        self.pd = PD(self.context)
        self.cq = CQ(self.context, 2048)
        self.links = [Link(self, number) for number in range(LINKS)]
        self.marks = MR(self.pd, 8 * LINKS * WINDOWS, ALL_ACCESS)
        """A number for each slot of each queue pair: what the window of type 1 opens."""
        gid = str(self.context.query_gid(port_num=1, index=1))
        remote = talk.swap({"gid": gid, "qpns": [link.qp.qp_num for link in self.links], "marks": self.marks.buf})
        self.remote_marks = remote["marks"]
        for link, qpn in zip(self.links, remote["qpns"], strict=True):
            link.connect(remote["gid"], qpn)
        talk.swap()
        talk.close()
        self._done: deque[Any] = deque()

    def next(self) -> tuple[Link, int, int, Any]:
        """The next completion: queue pair, what it was for, slot, and itself. It is fine, or its queue pair doomed."""
        deadline = time.monotonic() + WAIT
        while not self._done:
            count, found = self.cq.poll(16)
            self._done.extend(found[:count])
            if not count:
                assert time.monotonic() < deadline, f"no completion for {WAIT} s"
                time.sleep(0.0002)
        wc = self._done.popleft()
        link, kind, slot = self.links[wc.wr_id >> 16], wc.wr_id >> 8 & 0xFF, wc.wr_id & 0xFF
        if wc.status != e.IBV_WC_SUCCESS:
            wanted = e.IBV_WC_REM_ACCESS_ERR if kind == TRY else e.IBV_WC_WR_FLUSH_ERR
            assert link.doomed and wc.status == wanted, f"queue pair {link.number}, request {kind}: status {wc.status}"
            link.fallen = True
        else:
            assert kind != TRY, f"queue pair {link.number}: a key that opens nothing let a WRITE through"
        return link, kind, slot, wc


class Round(NamedTuple):
    """A window that is open."""

    order: int
    number: int
    key: int
    missing: set[int]
    """Completions that must come before it is over."""


class Owner:
    """The end whose memory it is."""

    def __init__(self, end: End) -> None:
        self.end = end
        self.rounds = 0
        self.numbers = 0
        self.open: dict[tuple[int, int], Round] = {}
        self.keys: dict[int, int] = {}
        """The last key of each queue pair's first window."""
        self.windows = {
            (link, slot): MW(end.pd, e.IBV_MW_TYPE_2)
            for link in range(LINKS) for slot in range(WINDOWS if link == MAIN else 1)
        }  # fmt: skip
        self.wide = MW(end.pd, e.IBV_MW_TYPE_1)
        self.open_wide()

    def open_wide(self) -> None:
        """Bind the window of type 1, again perhaps, with another key."""
        info = MWBindInfo(self.end.marks, self.end.marks.buf, 8 * LINKS * WINDOWS, e.IBV_ACCESS_REMOTE_WRITE)
        bind = MWBind(info, e.IBV_SEND_SIGNALED, CONTROL << 16 | BIND << 8)
        self.end.links[CONTROL].qp.bind_mw(self.wide, bind)
        while True:
            link, kind, _, _ = self.end.next()
            if (link.number, kind) == (CONTROL, BIND):
                return
            assert link.doomed, f"queue pair {link.number}, request {kind}: nothing was posted"

    def tell(self, link: Link, slot: int, order: int, number: int, key: int, address: int = 0) -> None:
        """Send an order."""
        address = address or link.mr.buf + slot * SLOT
        link.tell(TELL, slot, ORDER.pack(order, slot, number, address, key, int(self.wide.rkey)))

    def begin(self, link_number: int, slot: int = 0, order: int | None = None, key: int | None = None) -> None:
        """Begin a round; key: of a window that is bound already."""
        link = self.end.links[link_number]
        missing = {TELL, RECEIVE}
        number, self.numbers = self.numbers, self.numbers + 1
        if order is None:
            order = LEND if number % 4 == 3 else RETURN
        if key is None:
            length = LONGEST if link_number == KEPT else len(message(number, LONGEST))
            key = link.bind(slot, self.windows[link_number, slot], length)
            missing.add(BIND)
        if not slot:
            self.keys[link_number] = key
        self.tell(link, slot, order, number, key)
        self.open[link_number, slot] = Round(order, number, key, missing)

    def step(self) -> None:
        """Deal with one completion."""
        link, kind, slot, wc = self.end.next()
        if link.doomed:
            return
        if kind == RECEIVE:
            answer = link.received(slot, wc.byte_len)
            order, slot, number = ANSWER.unpack_from(answer)
            assert answer[ANSWER.size :] == part(message(number, LONGEST), number), f"answer {number} is damaged"
            self._answered(link, slot, order, number, wc)
        at = link.number, slot
        if at in self.open:
            missing = self.open[at].missing
            missing.discard(kind)
            if not missing:
                del self.open[at]
                if link.number in SPARES:
                    self.fail(link.number, self.keys[link.number])

    def _answered(self, link: Link, slot: int, order: int, number: int, wc: Any) -> None:
        """The client says that it has done what it was told: look at the memory and at the key that it gave back."""
        found = self.open[link.number, slot]
        assert (order, number) == (found.order, found.number), f"an answer to {number}, expected {found.number}"
        data = message(number, LONGEST)
        assert link.mr.read(len(data), slot * SLOT) == data, f"message {number} is damaged"
        mark = self.end.marks.read(8, 8 * (link.number * WINDOWS + slot))
        assert int.from_bytes(mark, "little") == number, f"mark {int.from_bytes(mark, 'little')}, expected {number}"
        returned = bool(wc.wc_flags & e.IBV_WC_WITH_INV)
        assert returned == (order == RETURN), f"message {number}: flags {wc.wc_flags:#x}"
        assert not returned or wc.imm_data == found.key, f"key {wc.imm_data:#x} came back, not {found.key:#x}"
        self.rounds += 1
        if order == LEND and link.number != KEPT:
            found.missing.add(TAKE)
            link.post(TAKE, slot, e.IBV_WR_LOCAL_INV, key=found.key)

    def wait(self) -> None:
        """Until every round is over."""
        while self.open:
            self.step()

    def fail(self, link_number: int, key: int, address: int = 0) -> None:
        """Have the client try a key in vain, which ends the queue pair."""
        link = self.end.links[link_number]
        link.doomed = True
        self.tell(link, 0, STALE, 0, key, address)

    def finish(self) -> None:
        """The keys of the beginning, at the end."""
        links = self.end.links
        self.fail(FOREIGN, self.keys[KEPT], links[KEPT].mr.buf)
        while not links[FOREIGN].fallen:
            self.step()
        for order in (LEND, RETURN):  # still bound, and to this queue pair
            self.begin(KEPT, order=order, key=self.keys[KEPT])
            self.wait()
        self.windows[MAIN, 0].close()
        self.windows[MAIN, 0] = self.windows.pop((FOREIGN, 0))  # never bound so far
        self.begin(MAIN)
        self.wait()
        before = int(self.wide.rkey)
        self.open_wide()
        assert self.wide.rkey != before
        self.begin(CONTROL)
        self.wait()
        self.fail(MAIN, before, self.end.marks.buf)
        for number in (KEPT, RETURNED, REVOKED):
            self.fail(number, self.keys[number])
        while not all(link.fallen for link in links if link.doomed):
            self.step()
        for _ in [link for link in links if link.doomed]:
            event = self.end.context.get_async_event()
            assert event.event_type == e.IBV_EVENT_QP_ACCESS_ERR, f"event {event.event_type}"
            event.ack()

    def run(self, seconds: float) -> int:
        """All of it; the number of rounds."""
        self.begin(KEPT, order=LEND)
        self.begin(RETURNED, order=RETURN)
        self.begin(REVOKED, order=LEND)
        self.wait()
        begin = time.monotonic()
        spares = deque(SPARES)
        while (now := time.monotonic() - begin) < seconds:
            for slot in range(WINDOWS):
                if (MAIN, slot) not in self.open:
                    self.begin(MAIN, slot)
            if spares and now > (SPARES.stop - len(spares) - SPARES.start + 0.5) * seconds / len(SPARES):
                self.begin(spares.popleft())
            self.step()
        for number in spares:
            self.begin(number)
        self.wait()
        self.finish()
        self.tell(self.end.links[CONTROL], 0, END, self.rounds, 0)
        while True:
            link, kind, slot, _ = self.end.next()
            if (link.number, kind) == (CONTROL, RECEIVE):
                _, _, rounds = ANSWER.unpack(link.received(slot, ANSWER.size))
                assert rounds == self.rounds, "the ends count differently"
                break
        for window in (*self.windows.values(), self.wide):
            window.close()
        time.sleep(0.5)  # the acknowledgement of that is on its way
        return self.rounds


def use(end: End) -> int:
    """Run the client, which does what the server asks for; returns the number of rounds."""
    rounds = 0
    busy: dict[tuple[int, int], int] = {}
    while True:
        link, kind, slot, _ = end.next()
        if kind == BYE:
            return rounds
        if kind == READ:
            data = message(busy[link.number, slot], LONGEST)
            assert link.mr.read(len(data), BACK + slot * SLOT) == data, "what was read back is not what was written"
        elif kind == RECEIVE and not link.fallen:
            order, slot, number, address, key, wide = ORDER.unpack(link.received(slot, ORDER.size))
            if order == END:
                assert number == rounds, f"{rounds} rounds here, {number} there"
                link.tell(BYE, slot, ANSWER.pack(order, slot, rounds))
            elif order == STALE:
                link.doomed = True
                link.post(TRY, slot, e.IBV_WR_RDMA_WRITE, 0, 8, key, address)
            else:
                rounds += 1
                busy[link.number, slot] = number
                mark = link.number * WINDOWS + slot
                data = message(number, LONGEST)
                link.mr.write(data, len(data), slot * SLOT)
                link.post(WRITE, slot, e.IBV_WR_RDMA_WRITE, slot * SLOT, len(data), key, address)
                # A message begins with its number: the mark.
                link.post(WRITE, slot, e.IBV_WR_RDMA_WRITE, slot * SLOT, 8, wide, end.remote_marks + 8 * mark)
                link.post(READ, slot, e.IBV_WR_RDMA_READ, BACK + slot * SLOT, len(data), key, address)
                returns = order == RETURN
                opcode = e.IBV_WR_SEND_WITH_INV if returns else e.IBV_WR_SEND
                answer = ANSWER.pack(order, slot, number) + part(data, number)
                link.tell(TELL, slot, answer, opcode, key if returns else 0)


def main() -> None:
    """As the owner, or, with an address, as the client."""
    seconds = float(sys.argv[1])
    server = sys.argv[2] if len(sys.argv) > 2 else None
    end = End(server)
    print("ok", use(end) if server is not None else Owner(end).run(seconds), flush=True)


if __name__ == "__main__":
    main()
