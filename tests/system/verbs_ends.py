"""Two ends of an RDMA program on stock libibverbs (pyverbs): a TCP connection to talk over, a connected queue pair."""

from __future__ import annotations

import json
import random
import socket
import time
from typing import Any

import pyverbs.enums as e
from pyverbs.addr import GID, AHAttr, GlobalRoute
from pyverbs.cq import CQ, CompChannel
from pyverbs.device import Context
from pyverbs.mr import MR
from pyverbs.pd import PD
from pyverbs.qp import QP, QPAttr, QPCap, QPInitAttr
from pyverbs.srq import SRQ, SrqAttr, SrqInitAttr
from pyverbs.wr import SGE, RecvWR, SendWR

TCP_PORT = 18600
AREA = 4 << 20
ALL_ACCESS = (
    e.IBV_ACCESS_LOCAL_WRITE
    | e.IBV_ACCESS_REMOTE_WRITE
    | e.IBV_ACCESS_REMOTE_READ
    | e.IBV_ACCESS_REMOTE_ATOMIC
    | e.IBV_ACCESS_MW_BIND
)


def pattern(seed: object, length: int) -> bytes:
    """Bytes that differ from one seed to the next."""
    return random.Random(str(seed)).randbytes(length)


class Talk:
    """The TCP connection: JSON lines, and `swap` to wait for each other."""

    def __init__(self, server: str | None) -> None:
        if server is None:
            with socket.create_server(("", TCP_PORT)) as listener:
                listener.settimeout(30)
                self.socket, _ = listener.accept()
        else:
            deadline = time.monotonic() + 30
            while True:
                try:
                    self.socket = socket.create_connection((server, TCP_PORT), timeout=30)
                    break
                except OSError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.05)
        self.socket.settimeout(60)
        self._lines = self.socket.makefile("r")

    def swap(self, mine: Any = None) -> Any:
        """Give mine, get the other's."""
        self.socket.sendall(json.dumps(mine).encode() + b"\n")
        line = self._lines.readline()
        if not line:
            raise SystemExit("the other end went away")
        return json.loads(line)

    def close(self) -> None:
        """They have nothing to say any more."""
        self._lines.close()
        self.socket.close()


class End:
    """A connected RC queue pair with one memory region."""

    def __init__(self, talk: Talk, mtu: int = e.IBV_MTU_4096, srq: bool = False, events: bool = False) -> None:
        self.talk = talk
        self.doing = ""
        self.context = Context(name="rxe0")
        self.pd = PD(self.context)
        self.mr = MR(self.pd, AREA, ALL_ACCESS)
        self.channel = CompChannel(self.context) if events else None
        self.cq = CQ(self.context, 256, None, self.channel, 0)
        self.srq = SRQ(self.pd, SrqInitAttr(SrqAttr(max_wr=32))) if srq else None
        cap = QPCap(max_send_wr=64, max_recv_wr=64, max_send_sge=4, max_recv_sge=4, max_inline_data=128)
        init = QPInitAttr(qp_type=e.IBV_QPT_RC, scq=self.cq, rcq=self.cq, cap=cap, srq=self.srq)
        self.qp = QP(self.pd, init, QPAttr(port_num=1))
        attr = QPAttr(port_num=1)
        attr.qp_access_flags = ALL_ACCESS & 0xF
        self.qp.to_init(attr)
        gid = str(self.context.query_gid(port_num=1, index=1))
        mine = {"qpn": self.qp.qp_num, "gid": gid, "address": self.mr.buf, "rkey": self.mr.rkey, "psn": 0xFFFFF0}
        self.remote = talk.swap(mine)
        route = GlobalRoute(dgid=GID(self.remote["gid"]), sgid_index=1)
        attr.path_mtu, attr.dest_qp_num, attr.rq_psn = mtu, self.remote["qpn"], self.remote["psn"]
        attr.max_dest_rd_atomic, attr.min_rnr_timer = 4, 12
        attr.ah_attr = AHAttr(port_num=1, is_global=1, gr=route)
        self.qp.to_rtr(attr)
        attr.sq_psn, attr.timeout, attr.retry_cnt, attr.rnr_retry, attr.max_rd_atomic = mine["psn"], 14, 7, 7, 4
        self.qp.to_rts(attr)
        talk.swap()

    def wait(self, status: int = e.IBV_WC_SUCCESS) -> Any:
        """The next completion, within 20 s; it must have `status`."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            count, completions = self.cq.poll(1)
            if count:
                assert completions[0].status == status, f"status {completions[0].status}, expected {status}"
                return completions[0]
        raise AssertionError(f"no completion within 20 s ({self.doing})")

    def post(
        self, opcode: int, sges: list[SGE], flags: int = e.IBV_SEND_SIGNALED, offset: int = 0, **more: Any
    ) -> None:
        """Post one send request."""
        wr = SendWR(opcode=opcode, num_sge=len(sges), sg=sges, send_flags=flags, imm_data=more.get("imm", 0))
        if opcode in (e.IBV_WR_RDMA_WRITE, e.IBV_WR_RDMA_WRITE_WITH_IMM, e.IBV_WR_RDMA_READ):
            wr.set_wr_rdma(more.get("rkey", self.remote["rkey"]), self.remote["address"] + offset)
        elif opcode in (e.IBV_WR_ATOMIC_CMP_AND_SWP, e.IBV_WR_ATOMIC_FETCH_AND_ADD):
            wr.set_wr_atomic(self.remote["rkey"], self.remote["address"] + offset, more["add"], more.get("swap", 0))
        self.qp.post_send(wr)

    def receive(self, sges: list[SGE]) -> None:
        """Post one receive."""
        wr = RecvWR(num_sge=len(sges), sg=sges)
        (self.srq.post_recv if self.srq is not None else self.qp.post_recv)(wr)

    def sge(self, length: int, offset: int = 0) -> SGE:
        """A range of the own region."""
        return SGE(self.mr.buf + offset, length, self.mr.lkey)
