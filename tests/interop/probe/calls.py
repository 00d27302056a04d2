"""Makes every verbs call that it can, right and wrong, and prints one line for each: name, then result or errno.

Runs with stock pyverbs at both ends (`python3 calls.py`), so that the two outputs can be compared line by line. Values
that differ from one run to the next (numbers, addresses, keys) are left out.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable
from typing import Any

import pyverbs.enums as e
from pyverbs.addr import AH, AHAttr, GlobalRoute
from pyverbs.cq import CQ, CompChannel
from pyverbs.device import Context
from pyverbs.mr import MR, MW
from pyverbs.pd import PD
from pyverbs.pyverbs_error import PyverbsError, PyverbsRDMAError, PyverbsUserError
from pyverbs.qp import QP, QPAttr, QPCap, QPInitAttr
from pyverbs.srq import SRQ, SrqAttr, SrqInitAttr

LOCAL, WRITE, READ, ATOMIC, BIND = 1, 2, 4, 8, 16
TYPES = {"RC": e.IBV_QPT_RC, "UC": e.IBV_QPT_UC, "UD": e.IBV_QPT_UD}
STATES = ("RESET", "INIT", "RTR", "RTS", "SQD", "SQE", "ERR")
ATTRIBUTES = (
    "ACCESS_FLAGS", "PKEY_INDEX", "PORT", "QKEY", "AV", "PATH_MTU", "TIMEOUT", "RETRY_CNT", "RNR_RETRY", "RQ_PSN",
    "MAX_QP_RD_ATOMIC", "ALT_PATH", "MIN_RNR_TIMER", "SQ_PSN", "MAX_DEST_RD_ATOMIC", "PATH_MIG_STATE", "CAP",
    "DEST_QPN", "CUR_STATE", "EN_SQD_ASYNC_NOTIFY",
)  # fmt: skip
NEEDED = {
    ("RC", "INIT"): ("PKEY_INDEX", "PORT", "ACCESS_FLAGS"),
    ("UC", "INIT"): ("PKEY_INDEX", "PORT", "ACCESS_FLAGS"),
    ("UD", "INIT"): ("PKEY_INDEX", "PORT", "QKEY"),
    ("RC", "RTR"): ("AV", "PATH_MTU", "DEST_QPN", "RQ_PSN", "MAX_DEST_RD_ATOMIC", "MIN_RNR_TIMER"),
    ("UC", "RTR"): ("AV", "PATH_MTU", "DEST_QPN", "RQ_PSN"),
    ("UD", "RTR"): (),
    ("RC", "RTS"): ("TIMEOUT", "RETRY_CNT", "RNR_RETRY", "SQ_PSN", "MAX_QP_RD_ATOMIC"),
    ("UC", "RTS"): ("SQ_PSN",),
    ("UD", "RTS"): ("SQ_PSN",),
}
"""IBA table 91: what each transition must have."""


def call(name: str, what: Callable[[], Any], shown: bool = False) -> Any:
    """Make one call and print what comes of it; the result, or None after an error."""
    try:
        result = what()
    except PyverbsRDMAError as error:
        code = getattr(error, "error_code", 0) or 0
        found = re.search(r"Errno: (\d+)", str(error))
        number = abs(code) or (int(found[1]) if found else 0)
        print(f"{name}: {errno.errorcode.get(number, number)}")
        return None
    except (PyverbsUserError, PyverbsError, OSError, ValueError, OverflowError) as error:
        print(f"{name}: {type(error).__name__}")
        return None
    print(f"{name}: {result if shown else 'ok'}")
    return result


def values(thing: Any, skip: str) -> str:
    """The plain public members of an object of pyverbs."""
    names = [n for n in dir(thing) if not n.startswith("_") and not re.search(skip, n)]
    found = {n: getattr(thing, n) for n in names}
    return " ".join(f"{n}={v}" for n, v in sorted(found.items()) if isinstance(v, int | str | bytes))


class Bench:
    """One open device with one of everything."""

    def __init__(self) -> None:
        self.context = Context(name="rxe0")
        self.pd = PD(self.context)
        self.cq = CQ(self.context, 64)
        self.mr = MR(self.pd, 8192, LOCAL | WRITE | READ | ATOMIC | BIND)

    def qp(self, kind: str, srq: SRQ | None = None, **cap: int) -> QP:
        """A queue pair in RESET."""
        asked = QPCap(**{"max_send_wr": 16, "max_recv_wr": 16, **cap})
        init = QPInitAttr(qp_type=TYPES[kind], scq=self.cq, rcq=self.cq, cap=asked, srq=srq)
        return QP(self.pd, init)

    def attributes(self) -> QPAttr:
        """Valid values for everything."""
        attr = QPAttr(port_num=1)
        attr.pkey_index, attr.qkey, attr.qp_access_flags = 0, 0x1234, LOCAL | WRITE | READ
        route = GlobalRoute(dgid=self.context.query_gid(1, 1), sgid_index=1, hop_limit=64)
        attr.ah_attr = AHAttr(gr=route, is_global=1, port_num=1)
        attr.path_mtu, attr.dest_qp_num, attr.rq_psn, attr.sq_psn = e.IBV_MTU_1024, 17, 5, 6
        attr.max_dest_rd_atomic, attr.max_rd_atomic, attr.min_rnr_timer = 4, 4, 12
        attr.timeout, attr.retry_cnt, attr.rnr_retry = 14, 7, 7
        return attr

    def move(self, qp: QP, kind: str, to: str, more: tuple[str, ...] = (), less: str = "", **change: Any) -> Any:
        """One ibv_modify_qp with the attributes that the transition needs, more or less of them."""
        attr = self.attributes()
        for name, value in change.items():
            setattr(attr, name, value)
        attr.qp_state = getattr(e, f"IBV_QPS_{to}")
        mask = e.IBV_QP_STATE
        for name in (*NEEDED.get((kind, to), ()), *more):
            if name != less:
                mask |= getattr(e, f"IBV_QP_{name}")
        qp.modify(attr, mask)
        return "ok"

    def qp_in(self, kind: str, state: str) -> QP:
        """A queue pair brought to a state."""
        qp = self.qp(kind)
        for to in {"RESET": (), "INIT": ("INIT",), "RTR": ("INIT", "RTR"), "RTS": ("INIT", "RTR", "RTS"),
                   "SQD": ("INIT", "RTR", "RTS", "SQD"), "ERR": ("INIT", "ERR")}[state]:  # fmt: skip
            self.move(qp, kind, to)
        return qp


def queries(b: Bench) -> None:
    """What the device says about itself."""
    attr = b.context.query_device()
    call("query_device", lambda: values(attr, "guid|fw_ver"), True)
    for port in (1, 0, 2):
        call(f"query_port {port}", lambda port=port: values(b.context.query_port(port), "^gid_tbl|_cntr$"), True)
    for index in (0, 1, 1023, 1024, -1, 5000):
        call(f"query_gid {index}", lambda index=index: b.context.query_gid(1, index) and "ok", True)
    for index in (0, 1, 63, 64, 70):
        call(f"query_pkey {index}", lambda index=index: b.context.query_pkey(1, index), True)


def objects(b: Bench) -> None:
    """Creation at, below and above the limits; what is in use."""
    for size in (1, 2, 63, 64, 1000, 32767, 32768, 65536, 0):
        call(f"create_cq {size}", lambda size=size: CQ(b.context, size).close())
    for vector in (0, 1, 7, 1000):
        call(f"create_cq vector {vector}", lambda v=vector: CQ(b.context, 4, None, None, v) and None)
    cq = CQ(b.context, 10)
    for size in (1, 20, 32767, 32768, 0):
        call(f"resize_cq {size}", lambda size=size: cq.resize(size))
    cq.close()
    for name, cap in {
        "send_wr 0": {"max_send_wr": 0}, "recv_wr 0": {"max_recv_wr": 0}, "send_wr 1": {"max_send_wr": 1},
        "send_wr max": {"max_send_wr": 1 << 20}, "send_wr above": {"max_send_wr": (1 << 20) + 1},
        "recv_wr above": {"max_recv_wr": (1 << 20) + 1}, "send_sge 32": {"max_send_sge": 32},
        "send_sge 33": {"max_send_sge": 33}, "recv_sge 32": {"max_recv_sge": 32}, "recv_sge 33": {"max_recv_sge": 33},
        "inline 512": {"max_inline_data": 512}, "inline 513": {"max_inline_data": 513},
        "inline 1": {"max_inline_data": 1}, "send_sge 0": {"max_send_sge": 0},
    }.items():  # fmt: skip
        if "max" in name and "above" not in name:
            continue  # a million entries would be made
        for kind in ("RC", "UD"):

            def make(cap: dict[str, int] = cap, kind: str = kind) -> str:
                qp = b.qp(kind, **cap)
                _, init = qp.query(e.IBV_QP_CAP)
                got = values(init.cap, "$^")
                qp.close()
                return got

            call(f"create_qp {kind} {name}", make, True)
    for kind in (e.IBV_QPT_RAW_PACKET, e.IBV_QPT_XRC_SEND, e.IBV_QPT_DRIVER):
        init = QPInitAttr(qp_type=kind, scq=b.cq, rcq=b.cq, cap=QPCap(max_send_wr=1))
        call(f"create_qp type {kind}", lambda init=init: QP(b.pd, init).close())
    for wr, sge in ((1, 1), (0, 1), (1 << 20, 1), ((1 << 20) + 1, 1), (16, 27), (16, 28), (16, 32), (16, 33)):
        if wr == 1 << 20:
            continue
        call(f"create_srq wr {wr} sge {sge}",
             lambda wr=wr, sge=sge: SRQ(b.pd, SrqInitAttr(SrqAttr(max_wr=wr, max_sge=sge))).close())  # fmt: skip
    srq = SRQ(b.pd, SrqInitAttr(SrqAttr(max_wr=16)))
    for limit in (1, 16, 17, 0):
        call(f"modify_srq limit {limit}", lambda n=limit: srq.modify(SrqAttr(srq_limit=n), e.IBV_SRQ_LIMIT))
    for wr in (32, 1, 0, (1 << 20) + 1):
        call(f"modify_srq max_wr {wr}", lambda n=wr: srq.modify(SrqAttr(max_wr=n), e.IBV_SRQ_MAX_WR))
    for kind in TYPES:
        call(f"create_qp {kind} with an SRQ", lambda kind=kind: b.qp(kind, srq).close())
    srq.close()
    call("create_comp_channel", lambda: CompChannel(b.context).close())


def regions(b: Bench) -> None:
    """Memory regions with every access, ranges, windows."""
    for access in (0, 1, 2, 3, 4, 8, 9, 15, 16, 17, 31, 32, 64, 128, 1 << 8, 1 << 20, 1 << 21):
        call(f"reg_mr access {access}", lambda access=access: MR(b.pd, 4096, access).close())
    for length in (1, 4095, 4097, 1 << 24):
        call(f"reg_mr length {length}", lambda length=length: MR(b.pd, length, 1).close())
    call("reg_mr nothing there", lambda: MR(b.pd, 4096, 1, address=0x1000).close())
    for kind in (1, 2):
        call(f"alloc_mw type {kind}", lambda kind=kind: MW(b.pd, kind).close())
    for flags, access in ((e.IBV_REREG_MR_CHANGE_ACCESS, 7), (e.IBV_REREG_MR_CHANGE_PD, 1), (0, 1), (8, 1)):

        def rereg(flags: int = flags, access: int = access) -> None:
            mr = MR(b.pd, 4096, 1)
            try:
                mr.rereg(flags, b.pd, 0, 0, access)
            finally:
                mr.close()

        call(f"rereg_mr flags {flags}", rereg)


def transitions(b: Bench) -> None:
    """ibv_modify_qp: every transition, every needed attribute left out, every other one added, values out of range."""
    for kind in TYPES:
        for begin in ("RESET", "INIT", "RTR", "RTS", "SQD", "ERR"):
            for to in STATES:
                with b.qp_in(kind, begin) as qp:
                    call(f"modify {kind} {begin} to {to}", lambda qp=qp, k=kind, to=to: b.move(qp, k, to))
        for begin, to in (("RESET", "INIT"), ("INIT", "RTR"), ("RTR", "RTS"), ("RTS", "RTS")):
            needed = NEEDED.get((kind, to), ()) if begin != to else ()
            for name in needed:
                with b.qp_in(kind, begin) as qp:
                    call(f"modify {kind} {begin} to {to} without {name}",
                         lambda qp=qp, k=kind, to=to, n=name: b.move(qp, k, to, less=n))  # fmt: skip
            for name in ATTRIBUTES:
                if name not in needed and begin != to:
                    with b.qp_in(kind, begin) as qp:
                        call(f"modify {kind} {begin} to {to} with {name}",
                             lambda qp=qp, k=kind, to=to, n=name: b.move(qp, k, to, more=(n,)))  # fmt: skip
    bad: dict[str, tuple[dict[str, Any], ...]] = {
        "INIT": ({"port_num": 0}, {"port_num": 2}, {"pkey_index": 1}, {"pkey_index": 64}, {"qp_access_flags": 0x20},
                 {"qp_access_flags": 0xFFFF}),
        "RTR": ({"path_mtu": 0}, {"path_mtu": 5}, {"path_mtu": 6}, {"dest_qp_num": 1 << 24}, {"rq_psn": 1 << 24},
                {"max_dest_rd_atomic": 0}, {"max_dest_rd_atomic": 128}, {"max_dest_rd_atomic": 129},
                {"min_rnr_timer": 31}, {"min_rnr_timer": 32}),
        "RTS": ({"timeout": 0}, {"timeout": 31}, {"timeout": 32}, {"retry_cnt": 8}, {"rnr_retry": 8},
                {"max_rd_atomic": 0}, {"max_rd_atomic": 128}, {"max_rd_atomic": 129}, {"sq_psn": 1 << 24}),
    }  # fmt: skip
    before = {"INIT": "RESET", "RTR": "INIT", "RTS": "RTR"}
    for to, changes in bad.items():
        for change in changes:
            with b.qp_in("RC", before[to]) as qp:
                call(f"modify RC to {to} {change}", lambda qp=qp, to=to, c=change: b.move(qp, "RC", to, **c))


def addresses(b: Bench) -> None:
    """Address handles."""
    own = b.context.query_gid(1, 1)
    for name, more in {
        "plain": {}, "no GRH": {"is_global": 0}, "port 0": {"port_num": 0}, "port 2": {"port_num": 2},
        "sgid 1023": {"index": 1023}, "sgid 2000": {"index": 2000},
    }.items():  # fmt: skip

        def make(more: dict[str, int] = more) -> None:
            route = GlobalRoute(dgid=own, sgid_index=more.get("index", 1), hop_limit=64)
            AH(
                b.pd, attr=AHAttr(gr=route, is_global=more.get("is_global", 1), port_num=more.get("port_num", 1))
            ).close()

        call(f"create_ah {name}", make)


def in_use(b: Bench) -> None:
    """What is in use cannot be destroyed: asked of the C library, since pyverbs would close the users first."""
    import ctypes

    verbs = ctypes.CDLL("libibverbs.so.1", use_errno=True)
    verbs.ibv_open_device.restype = verbs.ibv_get_device_list.restype = ctypes.c_void_p
    verbs.ibv_alloc_pd.restype = verbs.ibv_create_cq.restype = verbs.ibv_reg_mr.restype = ctypes.c_void_p
    devices = ctypes.cast(verbs.ibv_get_device_list(None), ctypes.POINTER(ctypes.c_void_p))
    context = ctypes.c_void_p(verbs.ibv_open_device(ctypes.c_void_p(devices[0])))
    pd = ctypes.c_void_p(verbs.ibv_alloc_pd(context))
    buffer = ctypes.create_string_buffer(8192)
    mr = ctypes.c_void_p(verbs.ibv_reg_mr(pd, buffer, ctypes.c_size_t(4096), 1))

    def named(result: int) -> str:
        return errno.errorcode.get(abs(result), "ok")

    print(f"dealloc_pd with a region: {named(verbs.ibv_dealloc_pd(pd))}")
    print(f"dereg_mr: {named(verbs.ibv_dereg_mr(mr))}")
    print(f"dealloc_pd: {named(verbs.ibv_dealloc_pd(pd))}")


def run(*parts: Callable[[Bench], None]) -> None:
    """Everything, in order; a part that cannot continue is reported, and the next one starts. Ends the process."""
    for part in parts:
        print(f"# {part.__name__}")
        try:
            part(Bench())
        except Exception as error:
            print(f"# {part.__name__} ended early: {type(error).__name__}: {error}")
        sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    run(queries, objects, regions, transitions, addresses, in_use)
