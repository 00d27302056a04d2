"""Threads that post and threads that poll, at the same time: libibverbs called through ctypes, which lets threads run.

Each of THREADS threads adds 1 to one counter by fetch-and-add, in turn through a queue pair of its own and through one
that all share; two more threads poll the one completion queue. Every addition must come back once, every number from 0
up must have been found once, the counter must be their sum. Alone on one host: each queue pair is connected to itself.
Ends with the line `ok`.
"""

from __future__ import annotations

import ctypes
import threading
import time
from ctypes import POINTER, Structure, c_int, c_uint8, c_uint16, c_uint32, c_uint64, c_void_p

THREADS, ROUNDS, IN_FLIGHT = 6, 150, 4
ACCESS = 1 | 2 | 4 | 8
FETCH_AND_ADD, SIGNALED, RC = 6, 2, 2

ibv = ctypes.CDLL("libibverbs.so.1", use_errno=True)
for name in ("get_device_list", "open_device", "alloc_pd", "create_cq", "create_qp", "reg_mr"):
    getattr(ibv, f"ibv_{name}").restype = c_void_p
ibv.ibv_reg_mr.argtypes = [c_void_p, c_void_p, ctypes.c_size_t, c_int]
ibv.ibv_create_cq.argtypes = [c_void_p, c_int, c_void_p, c_void_p, c_int]
ibv.ibv_create_qp.argtypes = [c_void_p, c_void_p]
ibv.ibv_modify_qp.argtypes = [c_void_p, c_void_p, c_int]
ibv.ibv_query_gid.argtypes = [c_void_p, c_uint8, c_int, c_void_p]
POLL_CQ, POST_SEND = 1 + 11, 1 + 25
"""Where struct ibv_context has these functions, in pointers: they are called through it, as verbs.h does."""


class Sge(Structure):
    """struct ibv_sge."""

    _fields_ = (("address", c_uint64), ("length", c_uint32), ("lkey", c_uint32))


class SendWr(Structure):
    """struct ibv_send_wr, of an atomic."""

    _fields_ = (
        ("wr_id", c_uint64), ("next", c_void_p), ("sges", POINTER(Sge)), ("num_sge", c_int), ("opcode", c_int),
        ("flags", c_uint32), ("imm", c_uint32), ("remote_address", c_uint64), ("compare_add", c_uint64),
        ("swap", c_uint64), ("rkey", c_uint32), ("rest", c_uint8 * 60),
    )  # fmt: skip


class Wc(Structure):
    """struct ibv_wc."""

    _fields_ = (("wr_id", c_uint64), ("status", c_int), ("rest", c_uint8 * 36))


class Cap(Structure):
    """struct ibv_qp_cap."""

    _fields_ = tuple((field, c_uint32) for field in ("send_wr", "recv_wr", "send_sge", "recv_sge", "inline"))


class InitAttr(Structure):
    """struct ibv_qp_init_attr."""

    _fields_ = (("context", c_void_p), ("send_cq", c_void_p), ("recv_cq", c_void_p), ("srq", c_void_p), ("cap", Cap),
                ("kind", c_int), ("sig_all", c_int))  # fmt: skip


class Route(Structure):
    """struct ibv_ah_attr."""

    _fields_ = (
        ("dgid", c_uint64 * 2), ("flow_label", c_uint32), ("sgid_index", c_uint8), ("hop_limit", c_uint8),
        ("traffic_class", c_uint8), ("dlid", c_uint16), ("sl", c_uint8), ("path_bits", c_uint8), ("rate", c_uint8),
        ("is_global", c_uint8), ("port", c_uint8),
    )  # fmt: skip


class Attr(Structure):
    """struct ibv_qp_attr."""

    _fields_ = (
        ("state", c_int), ("current", c_int), ("mtu", c_int), ("migration", c_int), ("qkey", c_uint32),
        ("rq_psn", c_uint32), ("sq_psn", c_uint32), ("destination", c_uint32), ("access", c_uint32), ("cap", Cap),
        ("route", Route), ("alternate", Route), ("pkey", c_uint16), ("alt_pkey", c_uint16), ("notify", c_uint8),
        ("draining", c_uint8), ("reads", c_uint8), ("dest_reads", c_uint8), ("rnr_timer", c_uint8), ("port", c_uint8),
        ("timeout", c_uint8), ("retries", c_uint8), ("rnr_retries", c_uint8), ("rest", c_uint8 * 9),
    )  # fmt: skip


def method(context: int, at: int, *arguments: type) -> ctypes._NamedFuncPointer:
    """A function that struct ibv_context points to."""
    address = c_void_p.from_address(context + 8 * at).value
    return ctypes.CFUNCTYPE(c_int, *arguments)(address)  # type: ignore[arg-type, return-value]


class Device:
    """The device, a counter, a completion queue for all."""

    def __init__(self) -> None:
        devices = ctypes.cast(ibv.ibv_get_device_list(None), POINTER(c_void_p))
        self.context = ibv.ibv_open_device(c_void_p(devices[0]))
        self.pd = ibv.ibv_alloc_pd(c_void_p(self.context))
        self.cq = ibv.ibv_create_cq(self.context, 4096, None, None, 0)
        self.memory = (c_uint64 * (1 + THREADS * ROUNDS))()
        mr = ibv.ibv_reg_mr(self.pd, ctypes.addressof(self.memory), ctypes.sizeof(self.memory), ACCESS)
        self.lkey, self.rkey = c_uint32.from_address(mr + 36).value, c_uint32.from_address(mr + 40).value
        self.gid = (c_uint64 * 2)()
        assert ibv.ibv_query_gid(self.context, 1, 1, self.gid) == 0
        self.post_send = method(self.context, POST_SEND, c_void_p, c_void_p, c_void_p)
        self.poll_cq = method(self.context, POLL_CQ, c_void_p, c_int, c_void_p)

    def queue_pair(self) -> int:
        """An RC queue pair in RTS, connected to itself."""
        cap = Cap(64, 1, 1, 1, 0)
        qp = ibv.ibv_create_qp(self.pd, ctypes.byref(InitAttr(None, self.cq, self.cq, None, cap, RC, 0)))
        assert qp
        a = Attr(access=ACCESS, port=1, mtu=3, destination=c_uint32.from_address(qp + 52).value, dest_reads=4, reads=4,
                 rnr_timer=12, timeout=14, retries=7, rnr_retries=7)  # fmt: skip
        a.route = Route(dgid=self.gid, sgid_index=1, is_global=1, port=1)
        for state, mask in ((1, 0x39), (2, 0x121181 | 1 << 15), (3, 0x12E01)):
            a.state = state
            assert ibv.ibv_modify_qp(qp, ctypes.byref(a), mask) == 0
        return int(qp)

    def add(self, qp: int, slot: int) -> None:
        """Add 1 to the counter; the number before comes into `slot`."""
        sge = Sge(ctypes.addressof(self.memory) + 8 * slot, 8, self.lkey)
        wr = SendWr(wr_id=slot, sges=ctypes.pointer(sge), num_sge=1, opcode=FETCH_AND_ADD, flags=SIGNALED,
                    remote_address=ctypes.addressof(self.memory), compare_add=1, rkey=self.rkey)  # fmt: skip
        bad = c_void_p()
        assert self.post_send(qp, ctypes.byref(wr), ctypes.byref(bad)) == 0


def main() -> None:
    """Post and poll."""
    device = Device()
    common = device.queue_pair()
    own = [device.queue_pair() for _ in range(THREADS)]
    total = THREADS * ROUNDS
    rooms = [threading.Semaphore(IN_FLIGHT) for _ in range(THREADS)]
    faults: list[str] = []
    came: list[int] = []

    def post(thread: int) -> None:
        for step in range(ROUNDS):
            if not rooms[thread].acquire(timeout=60):
                faults.append(f"thread {thread}: nothing comes back")
                return
            device.add(common if step % 2 else own[thread], 1 + thread * ROUNDS + step)

    def poll() -> None:
        found = (Wc * 8)()
        deadline = time.monotonic() + 90
        while len(came) < total and not faults and time.monotonic() < deadline:
            count = device.poll_cq(device.cq, 8, found)
            for wc in found[:count]:
                if wc.status:
                    faults.append(f"addition {wc.wr_id}: status {wc.status}")
                came.append(wc.wr_id)
                rooms[(wc.wr_id - 1) // ROUNDS].release()
            if not count:
                time.sleep(0.0002)

    threads = [threading.Thread(target=post, args=(number,)) for number in range(THREADS)]
    threads += [threading.Thread(target=poll) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults, faults[:3]
    assert sorted(came) == list(range(1, total + 1)), "an addition came back twice, or never"
    assert device.memory[0] == total, f"the counter is {device.memory[0]} after {total} additions"
    assert sorted(device.memory[1:]) == list(range(total)), "two additions found the same number"
    print("ok")


if __name__ == "__main__":
    main()
