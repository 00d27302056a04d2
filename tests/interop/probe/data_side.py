"""What one end of a scenario works with: the talk with the other end, memory, queue pairs, completions as lines."""

from __future__ import annotations

import errno
import json
import random
import re
import signal
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pyverbs.enums as e
from pyverbs.addr import AH, GID, AHAttr, GlobalRoute
from pyverbs.cq import CQ, CompChannel
from pyverbs.device import Context
from pyverbs.mr import MR, MW
from pyverbs.pd import PD
from pyverbs.pyverbs_error import PyverbsError, PyverbsRDMAError
from pyverbs.qp import QP, QPAttr, QPCap, QPEx, QPInitAttr, QPInitAttrEx
from pyverbs.srq import SRQ
from pyverbs.wr import SGE, RecvWR, SendWR

LOCAL, WRITE, READ, ATOMIC, BIND = 1, 2, 4, 8, 16
EVERY = LOCAL | WRITE | READ | ATOMIC | BIND
TYPES = {"RC": e.IBV_QPT_RC, "UC": e.IBV_QPT_UC, "UD": e.IBV_QPT_UD}
STATES = {getattr(e, f"IBV_QPS_{name}"): name for name in ("RESET", "INIT", "RTR", "RTS", "SQD", "SQE", "ERR")}
STATUS = {getattr(e, n): n[7:] for n in dir(e) if re.fullmatch(r"IBV_WC_(SUCCESS|[A-Z_]+_ERR)", n) and "_TM_" not in n}
OPCODES = {
    getattr(e, f"IBV_WC_{name}"): name
    for name in ("SEND", "RDMA_WRITE", "RDMA_READ", "COMP_SWAP", "FETCH_ADD", "BIND_MW", "LOCAL_INV", "RECV",
                 "RECV_RDMA_WITH_IMM")
}  # fmt: skip
EVENTS = {getattr(e, name): name[10:] for name in dir(e) if name.startswith("IBV_EVENT_")}
QKEY = 0x1234
MOST_SGES = 32
"""More than any link here may have in a request."""
PATIENCE = 12.0
"""Seconds for what must come. An emulated machine on a busy one may take its time."""
FENCE_PATIENCE = 1.0
"""Seconds until rxe is reminded of a request that waits at a fence (`Link.remind`)."""


def pattern(seed: object, length: int) -> bytes:
    """Bytes that differ from one seed to the next."""
    return random.Random(str(seed)).randbytes(length)


def within(seconds: float, what: Callable[[], Any]) -> Any:
    """The result of a call that may never return, or None after `seconds`: the timer's signal ends its read."""
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.02)
    try:
        return what()
    except PyverbsError:
        return None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


class Talk:
    """The TCP connection between the ends: each gives a value and gets the other's."""

    def __init__(self, peer: str, port: int, listen: bool) -> None:
        deadline = time.monotonic() + PATIENCE
        if listen:
            with socket.create_server(("", port)) as listener:
                listener.settimeout(PATIENCE)
                self._socket, _ = listener.accept()
        else:
            while True:
                try:
                    self._socket = socket.create_connection((peer, port), timeout=PATIENCE)
                    break
                except OSError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.01)
        self._socket.settimeout(2 * PATIENCE)
        self._lines = self._socket.makefile("r")

    def swap(self, mine: Any = None) -> Any:
        """Give mine, get the other's."""
        self._socket.sendall(json.dumps(mine).encode() + b"\n")
        line = self._lines.readline()
        if not line:
            raise AssertionError("the other end gave up")
        return json.loads(line)

    def close(self) -> None:
        """The other end then knows that this one has ended."""
        self._lines.close()
        self._socket.close()


class Side:
    """One end of one scenario."""

    def __init__(self, talk: Talk, name: str, active: bool, gids: dict[str, int]) -> None:
        self.talk = talk
        self.name = name
        """`ours` or `rxe`."""
        self.active = active
        self.gids = gids
        self.lines: list[str] = []
        """What is compared."""
        self.qps: dict[int, str] = {0: "none"}
        self.keys: dict[int, str] = {}
        """Names for numbers that differ from one run to the next."""
        self.windows: list[MW] = []
        self.links: list[Link] = []
        self.areas: list[Area] = []
        self.context = Context(name="rxe0")
        self.pd = PD(self.context)

    def say(self, text: str) -> None:
        """A line to compare."""
        self.lines.append(text)

    def meet(self) -> None:
        """Both ends are here."""
        self.talk.swap()

    def check(self, right: object, what: str) -> None:
        """Something that must hold, whichever end plays the role."""
        if not right:
            raise AssertionError(what)

    def call(self, name: str, what: Callable[[], Any]) -> Any:
        """A call that may be refused: a line with ok or the errno."""
        try:
            result = what()
        except PyverbsRDMAError as error:
            found = re.search(r"Errno: (\d+)", str(error))
            number = abs(getattr(error, "error_code", 0) or 0) or (int(found[1]) if found else 0)
            self.say(f"{name}: {errno.errorcode.get(number, number)}")
            return None
        self.say(f"{name}: ok")
        return result

    def events(self, expected: int = 0) -> None:
        """The asynchronous events: waits for those expected, and a moment for others."""
        found = []
        while event := within(PATIENCE if len(found) < expected else 0.1, self.context.get_async_event):
            found.append(EVENTS.get(event.event_type, event.event_type))
            event.ack()
        self.say(f"events: {', '.join(map(str, found)) or 'none'}")

    def window(self, kind: int) -> MW:
        """A memory window, freed before everything else (rxe never finishes destroying a queue pair with a window)."""
        window = MW(self.pd, kind)
        self.windows.append(window)
        return window

    def close(self) -> None:
        """Everything goes."""
        for window in self.windows:
            window.close()
        for link in self.links:
            link.qp.close()
        self.context.close()
        self.talk.close()


class Area:
    """A memory region of its own, zeros at first."""

    def __init__(self, side: Side, length: int, access: int = EVERY) -> None:
        self.length = length
        self.mr = MR(side.pd, length, access)
        side.areas.append(self)  # or Python would try to free it while a window needs it

    def write(self, data: bytes, at: int = 0) -> None:
        """Put bytes there."""
        self.mr.write(data, len(data), at)

    def read(self, length: int, at: int = 0) -> bytes:
        """Look."""
        return bytes(self.mr.read(length, at)) if length else b""

    def number(self, at: int) -> int:
        """The eight bytes there as this machine's integer."""
        return int.from_bytes(self.read(8, at), "little")

    def sge(self, length: int, at: int = 0) -> SGE:
        """An element of it."""
        return SGE(self.mr.buf + at, length, self.mr.lkey)


class Link:
    """A queue pair, connected to the other end's (a UD one knows it), with a completion queue for each direction."""

    def __init__(
        self, side: Side, kind: str = "RC", *, area: Area | None = None, name: str = "own", srq: SRQ | None = None,
        sig_all: bool = False, sges: int = 4, depth: int = 64, inline: int = 0, access: int = WRITE | READ | ATOMIC,
        mtu: int = e.IBV_MTU_1024, reads: int = 16, retry: int = 7, rnr_retry: int = 7, timeout: int = 14,
        channel: CompChannel | None = None, operations: int = 0, gid: str = "4", send_cq: Any = None,
        recv_cq: Any = None,
    ) -> None:  # fmt: skip
        self.side, self.kind = side, kind
        self.area = area or Area(side, 1 << 17)
        self.send_cq = send_cq or CQ(side.context, 2 * depth)
        self.recv_cq = recv_cq or CQ(side.context, 2 * depth, None, channel, 0)
        self.srq = srq
        cap = QPCap(depth, depth, sges, sges, inline)
        ends = {"scq": self.send_cq, "rcq": self.recv_cq, "srq": srq, "sq_sig_all": int(sig_all)}
        if operations:
            mask = e.IBV_QP_INIT_ATTR_PD | e.IBV_QP_INIT_ATTR_SEND_OPS_FLAGS
            init = QPInitAttrEx(
                qp_type=TYPES[kind], cap=cap, pd=side.pd, comp_mask=mask, send_ops_flags=operations, **ends
            )
            self.qp = QPEx(side.context, init)
        else:
            self.qp = QP(side.pd, QPInitAttr(qp_type=TYPES[kind], cap=cap, **ends))
        side.links.append(self)
        self.numbers = {"send": 1, "recv": 101}
        """The next wr_id of each queue."""
        self.fenced = False
        """A request with a fence was posted."""
        self._connect(mtu, access, reads, retry, rnr_retry, timeout, side.gids[gid])
        side.qps[self.qp.qp_num] = name
        side.qps.setdefault(self.peer["qpn"], f"{name}'s peer")

    def _connect(self, mtu: int, access: int, reads: int, retry: int, rnr_retry: int, timeout: int, index: int) -> None:
        psn = 0xFFFFF0
        self.gid = str(self.side.context.query_gid(1, index))
        mine = {"qpn": self.qp.qp_num, "gid": self.gid, "key": self.area.mr.rkey, "address": self.area.mr.buf}
        self.peer = self.side.talk.swap(mine)
        route = GlobalRoute(dgid=GID(self.peer["gid"]), sgid_index=index, hop_limit=64)
        self.way = AHAttr(gr=route, is_global=1, port_num=1)
        attr = QPAttr(port_num=1)
        attr.qp_access_flags, attr.qkey = access, QKEY
        attr.path_mtu, attr.dest_qp_num, attr.rq_psn, attr.sq_psn = mtu, self.peer["qpn"], psn, psn
        attr.ah_attr, attr.min_rnr_timer, attr.max_dest_rd_atomic, attr.max_rd_atomic = self.way, 12, reads, reads
        attr.timeout, attr.retry_cnt, attr.rnr_retry = timeout, retry, rnr_retry
        extra = {"RC": (), "UC": (e.IBV_QP_ACCESS_FLAGS,), "UD": (e.IBV_QP_QKEY,)}[self.kind]
        if self.kind == "RC":
            self.qp.to_rts(attr)
        else:
            to_init = e.IBV_QP_PKEY_INDEX | e.IBV_QP_PORT | sum(extra)
            to_rtr = 0 if self.kind == "UD" else e.IBV_QP_AV | e.IBV_QP_PATH_MTU | e.IBV_QP_DEST_QPN | e.IBV_QP_RQ_PSN
            for state, mask in (("INIT", to_init), ("RTR", to_rtr), ("RTS", e.IBV_QP_SQ_PSN)):
                attr.qp_state = getattr(e, f"IBV_QPS_{state}")
                self.qp.modify(attr, e.IBV_QP_STATE | mask)
        self.side.meet()

    def handle(self) -> AH:
        """An address handle for the other end."""
        return AH(self.side.pd, attr=self.way)

    def number(self, queue: str) -> int:
        """A wr_id that has not been used."""
        self.numbers[queue] += 1
        return self.numbers[queue] - 1

    def request(self, name: str, sges: Sequence[SGE] = (), flags: str = "SIGNALED", **more: Any) -> SendWR:
        """A send work request. more: imm, at (offset at the peer), key, address, add, swap, to (handle, qpn, qkey)."""
        bits = sum(getattr(e, f"IBV_SEND_{flag}") for flag in flags.split())
        opcode = getattr(e, f"IBV_WR_{name}")
        self.fenced |= bool(bits & e.IBV_SEND_FENCE)
        wr = SendWR(self.number("send"), opcode, len(sges) or 1, more.get("imm", 0), list(sges) or [SGE(0, 0, 0)], bits)
        if not sges:
            wr.num_sge = 0
        key = more.get("key", self.peer["key"])
        address = more.get("address", self.peer["address"] + more.get("at", 0))
        if name.startswith("RDMA"):
            wr.set_wr_rdma(key, address)
        elif name.startswith("ATOMIC"):
            wr.set_wr_atomic(key, address, more["add"], more.get("swap", 0))
        elif "to" in more:
            wr.set_wr_ud(*more["to"])
        return wr

    def post(self, name: str, sges: Sequence[SGE] = (), flags: str = "SIGNALED", **more: Any) -> None:
        """Post one send request."""
        self.qp.post_send(self.request(name, sges, flags, **more))

    def receive(self, *sges: SGE) -> None:
        """Post one receive."""
        wr = RecvWR(self.number("recv"), len(sges) or 1, list(sges) or [SGE(0, 0, 0)])
        if not sges:
            wr.num_sge = 0
        (self.srq or self.qp).post_recv(wr)

    def line(self, queue: str, wc: Any) -> str:
        """A completion, with names for what is different in each run."""
        imm = self.side.keys.get(wc.imm_data, f"{wc.imm_data:#x}")
        own, source = (self.side.qps.get(number, f"{number:#x}") for number in (wc.qp_num, wc.src_qp))
        return (
            f"{queue} {wc.wr_id}: {STATUS.get(wc.status, wc.status)} {OPCODES.get(wc.opcode, wc.opcode)}"
            f" len {wc.byte_len} flags {wc.wc_flags} imm {imm} qp {own} from {source} vendor {wc.vendor_err}"
            f"{getattr(wc, 'more', '')}"
        )

    def poll(self, queue: str, count: int, seconds: float = PATIENCE) -> list[Any]:
        """Up to `count` completions that come in time."""
        cq = self.send_cq if queue == "send" else self.recv_cq
        begin = time.monotonic()
        reminder = begin + FENCE_PATIENCE
        found: list[Any] = []
        while len(found) < count:
            some = cq.poll(count - len(found))[1]
            found += some
            if not some:
                now = time.monotonic()
                if now > begin + seconds:
                    break
                if now > reminder and queue == "send" and self.fenced and self.side.name == "rxe":
                    self.remind()
                    reminder = now + FENCE_PATIENCE
                time.sleep(0.002)
        return found

    def remind(self) -> None:
        """Have rxe look at its send queue again, by a request that its library refuses and rings the doorbell for.

        rxe's requester notes that it waits at a fence only after it has looked what is still on its way. When the last
        answer is taken in between, nobody wakes it: seen in captures, about once in a thousand fences, as silence after
        answers that were complete, until the next doorbell. Real programs on rxe hang there too.
        """
        wr = SendWR(0, e.IBV_WR_SEND, 2 * MOST_SGES, 0, [SGE(0, 0, 0)] * (2 * MOST_SGES), 0)
        try:
            self.qp.post_send(wr)
        except PyverbsRDMAError:
            return
        raise AssertionError("a request with too many elements was taken")

    def take(self, queue: str, count: int = 1) -> list[Any]:
        """So many completions, each a line; what is missing is a line too."""
        found = self.poll(queue, count)
        for wc in found:
            self.side.say(self.line(queue, wc))
        if len(found) < count:
            self.side.say(f"{queue}: {count - len(found)} completions are missing")
        return found

    def quiet(self, *queues: str) -> None:
        """No completion comes any more: a line either way."""
        for queue in queues or ("send", "recv"):
            found = self.poll(queue, 1, 0.06)
            self.side.say(self.line(queue, found[0]) if found else f"{queue}: nothing more")

    def drain(self, *queues: str) -> None:
        """A line for each completion that still comes."""
        for queue in queues or ("send", "recv"):
            while found := self.poll(queue, 1, 0.1):
                self.side.say(self.line(queue, found[0]))

    def state(self) -> None:
        """A line with the queue pair's state."""
        attr, _ = self.qp.query(e.IBV_QP_STATE)
        self.side.say(f"state {STATES[attr.qp_state]}")

    def move(self, state: str, mask: int = 0, **values: Any) -> None:
        """ibv_modify_qp to a state, a line with what came of it."""
        attr = QPAttr(port_num=1)
        attr.qp_state = getattr(e, f"IBV_QPS_{state}")
        for name, value in values.items():
            setattr(attr, name, value)
        self.side.call(f"modify to {state}", lambda: self.qp.modify(attr, e.IBV_QP_STATE | mask))


def rooms(sizes: Iterable[int], gap: int = 16) -> list[tuple[int, int]]:
    """(where, size) for each, one after the other with gaps that nothing may touch."""
    found, at = [], gap
    for size in sizes:
        found.append((at, size))
        at += size + gap
    return found
