"""RDMA programs of an unusual size on stock libibverbs, alone on one host.

Run as `-m tests.system.verbs_scale many COUNT | gigabyte`. Ends with 0 and the line `ok` when every byte was right.
"""

from __future__ import annotations

import sys
from typing import Any

import pyverbs.enums as e
from pyverbs.addr import AHAttr, GlobalRoute
from pyverbs.cq import CQ
from pyverbs.device import Context
from pyverbs.mr import MR
from pyverbs.pd import PD
from pyverbs.qp import QP, QPAttr, QPCap, QPInitAttr
from pyverbs.wr import SGE, RecvWR, SendWR

ACCESS = e.IBV_ACCESS_LOCAL_WRITE | e.IBV_ACCESS_REMOTE_WRITE | e.IBV_ACCESS_REMOTE_READ
GID_INDEX = 1


class Device:
    """One open device, a domain and a completion queue."""

    def __init__(self) -> None:
        self.context = Context(name="rxe0")
        self.pd = PD(self.context)
        self.cq = CQ(self.context, 4096)
        self.gid = self.context.query_gid(1, GID_INDEX)

    def queue_pair(self) -> Any:
        """An RC queue pair in INIT."""
        caps = QPCap(max_send_wr=1, max_recv_wr=1, max_send_sge=1, max_recv_sge=1)
        qp = QP(self.pd, QPInitAttr(qp_type=e.IBV_QPT_RC, scq=self.cq, rcq=self.cq, cap=caps))
        attributes = QPAttr(port_num=1)
        attributes.qp_access_flags = ACCESS
        qp.to_init(attributes)
        return qp

    def connect(self, qp: Any, remote_qpn: int) -> None:
        """To RTS, with a queue pair of this same host."""
        a = QPAttr(port_num=1)
        a.qp_access_flags = ACCESS
        a.dest_qp_num = remote_qpn
        a.path_mtu = e.IBV_MTU_1024
        a.max_rd_atomic = a.max_dest_rd_atomic = 1
        a.timeout, a.retry_cnt, a.rnr_retry, a.min_rnr_timer = 14, 7, 7, 12
        a.ah_attr = AHAttr(gr=GlobalRoute(dgid=self.gid, sgid_index=GID_INDEX), is_global=1, port_num=1)
        qp.to_rts(a)

    def poll(self, count: int) -> list[Any]:
        """Wait for `count` completions."""
        found: list[Any] = []
        while len(found) < count:
            number, completions = self.cq.poll(count - len(found))
            found += completions[:number]
        return found


def many(count: int) -> None:
    """`count` queue pairs, connected in pairs; one message over every fiftieth pair, to its end."""
    device = Device()
    region = MR(device.pd, 1 << 16, ACCESS)
    qps = [device.queue_pair() for _ in range(count)]
    assert len({qp.qp_num for qp in qps}) == count
    for here, there in zip(qps[::2], qps[1::2], strict=True):
        device.connect(here, there.qp_num)
        device.connect(there, here.qp_num)
    for number in range(0, count, 100):
        text = f"message {number:08}".encode()
        region.write(text, len(text), 0)
        qps[number + 1].post_recv(RecvWR(wr_id=2, num_sge=1, sg=[SGE(region.buf + 4096, 64, region.lkey)]))
        send = SendWR(wr_id=1, num_sge=1, sg=[SGE(region.buf, len(text), region.lkey)], opcode=e.IBV_WR_SEND)
        qps[number].post_send(send)
        done = device.poll(2)
        assert sorted(wc.wr_id for wc in done) == [1, 2] and all(wc.status == 0 for wc in done), done
        assert region.read(len(text), 4096) == text
    for qp in qps:
        qp.close()


def gigabyte() -> None:
    """1 GiB registered: written at its beginning, across its middle and to its last byte, and not a byte beyond."""
    device = Device()
    size = 1 << 30
    region, source = MR(device.pd, size, ACCESS), MR(device.pd, 1 << 16, ACCESS)
    here, there = device.queue_pair(), device.queue_pair()
    device.connect(here, there.qp_num)
    device.connect(there, here.qp_num)
    text = bytes(range(256)) * 20

    def write(offset: int, length: int) -> int:
        request = SendWR(wr_id=7, num_sge=1, sg=[SGE(source.buf, length, source.lkey)], opcode=e.IBV_WR_RDMA_WRITE)
        request.set_wr_rdma(region.rkey, region.buf + offset)
        here.post_send(request)
        return int(device.poll(1)[0].status)

    source.write(text, len(text), 0)
    for offset in (0, size // 2 - 100, size - len(text)):
        assert write(offset, len(text)) == 0
        assert region.read(len(text), offset) == text
    assert write(size - 10, 11) == e.IBV_WC_REM_ACCESS_ERR


if __name__ == "__main__":
    if sys.argv[1] == "many":
        many(int(sys.argv[2]))
    else:
        gigabyte()
    print("ok")
