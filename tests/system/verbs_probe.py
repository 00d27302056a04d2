"""An RDMA program on stock libibverbs (pyverbs) that checks every byte.

Run as `-m tests.system.verbs_probe SCENARIO [SERVER-IP]` at both ends; the one without an address listens. They meet
over TCP, take turns there, and the RDMA connection is used by the active end only, so that a scenario reads as one
program. Ends with 0 and the line `ok` when all was right.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import subprocess
import sys
import time

import pyverbs.enums as e
from pyverbs.device import Context
from pyverbs.mr import MR, MW, MWBind, MWBindInfo
from pyverbs.pyverbs_error import PyverbsRDMAError

from tests.system.verbs_ends import ALL_ACCESS, AREA, End, Talk, pattern

SIZES = (1, 2, 255, 1024, 4095, 4096, 4097, 65537, AREA)


def data(end: End, active: bool) -> None:
    """SEND, WRITE, both with immediate, READ: sizes around every packet boundary, every byte compared."""
    for size in SIZES:
        for name in ("SEND", "SEND_WITH_IMM", "RDMA_WRITE", "RDMA_WRITE_WITH_IMM", "RDMA_READ"):
            end.doing = f"{name} of {size} bytes"
            want = pattern((size, name), size)
            opcode = getattr(e, f"IBV_WR_{name}")
            receives = name not in ("RDMA_WRITE", "RDMA_READ")
            if active:
                end.mr.write(bytes(size) if name == "RDMA_READ" else want, size)
                end.talk.swap()
                end.post(opcode, [end.sge(size)], imm=0x12345678)
                end.wait()
                assert end.mr.read(size, 0) == want, f"{name} of {size} bytes: the data came back wrong"
                end.talk.swap()
            else:
                end.mr.write(want if name == "RDMA_READ" else bytes(size), size)
                if receives:
                    end.receive([end.sge(size)])
                end.talk.swap()
                if receives:
                    completion = end.wait()
                    assert completion.byte_len == size, f"{name}: byte_len {completion.byte_len}, expected {size}"
                    if "IMM" in name:
                        assert completion.imm_data == 0x12345678, f"{name}: immediate {completion.imm_data:#x}"
                end.talk.swap()
                assert end.mr.read(size, 0) == want, f"{name} of {size} bytes arrived wrong"


def pieces(end: End, active: bool) -> None:
    """Scatter, gather and inline data; an order of requests kept; 40 posted at once."""
    want = pattern("pieces", 6000)
    if active:
        end.mr.write(want, 6000)
        end.talk.swap()
        end.post(e.IBV_WR_SEND, [end.sge(1, 0), end.sge(4998, 1), end.sge(1001, 4999)])
        end.wait()
        end.talk.swap()
        for number in range(40):
            end.mr.write(bytes([number] * 100), 100)
            end.post(
                e.IBV_WR_RDMA_WRITE, [end.sge(100)], e.IBV_SEND_SIGNALED | e.IBV_SEND_INLINE, AREA // 2 + 100 * number
            )
            end.mr.write(bytes(100), 100)  # inline data are the queue's: the buffer is free at once
        for _ in range(40):
            end.wait()
        end.talk.swap()
    else:
        end.receive([end.sge(3000, 0), end.sge(2, 65536), end.sge(2998, 10000)])
        end.talk.swap()
        assert end.wait().byte_len == 6000
        end.talk.swap()
        got = end.mr.read(3000, 0) + end.mr.read(2, 65536) + end.mr.read(2998, 10000)
        wrong = [at for at in range(6000) if got[at] != want[at]]
        assert not wrong, f"scattered data are wrong at {wrong[:3]}…{wrong[-3:]}"
        end.talk.swap()
        for number in range(40):
            assert end.mr.read(100, AREA // 2 + 100 * number) == bytes([number] * 100), (
                f"inline write {number} is wrong"
            )


def atomics(end: End, active: bool) -> None:
    """Fetch-and-add and compare-and-swap return the old value and change memory once."""
    if not active:
        end.mr.write((1000).to_bytes(8, "little"), 8, 64)
    end.talk.swap()
    if active:
        for step in range(20):
            end.post(e.IBV_WR_ATOMIC_FETCH_AND_ADD, [end.sge(8)], offset=64, add=7)
            end.wait()
            assert int.from_bytes(end.mr.read(8, 0), "little") == 1000 + 7 * step
        end.post(e.IBV_WR_ATOMIC_CMP_AND_SWP, [end.sge(8)], offset=64, add=1140, swap=5)
        end.wait()
        assert int.from_bytes(end.mr.read(8, 0), "little") == 1140
    end.talk.swap()
    if not active:
        assert int.from_bytes(end.mr.read(8, 64), "little") == 5


def shared(end: End, active: bool) -> None:
    """A shared receive queue: every receive is used once, in order."""
    if active:
        end.talk.swap()
        for number in range(30):
            end.mr.write(bytes([number] * 500), 500)
            end.post(e.IBV_WR_SEND, [end.sge(500)])
            end.wait()
        end.talk.swap()
    else:
        for number in range(30):
            end.receive([end.sge(500, 1000 * number)])
        end.talk.swap()
        for _ in range(30):
            end.wait()
        for number in range(30):
            assert end.mr.read(500, 1000 * number) == bytes([number] * 500), f"receive {number} is wrong"
        end.talk.swap()


def late(end: End, active: bool) -> None:
    """A SEND before its receive is posted: RNR NAK, and delivered once when it is."""
    if active:
        end.mr.write(b"late", 4)
        end.post(e.IBV_WR_SEND, [end.sge(4)])
        end.talk.swap()
        end.wait()
    else:
        end.talk.swap()
        time.sleep(0.3)
        end.receive([end.sge(4)])
        end.wait()
        assert end.mr.read(4, 0) == b"late"


def bad_key(end: End, active: bool) -> None:
    """A wrong rkey: REM_ACCESS_ERR, the queue pair in ERR, what follows flushed, memory untouched."""
    end.mr.write(b"untouched", 9)
    end.talk.swap()
    if active:
        end.post(e.IBV_WR_RDMA_WRITE, [end.sge(9, 100)], rkey=end.remote["rkey"] ^ 0x55)
        end.post(e.IBV_WR_SEND, [end.sge(9)])
        end.wait(e.IBV_WC_REM_ACCESS_ERR)
        end.wait(e.IBV_WC_WR_FLUSH_ERR)
        attributes, _ = end.qp.query(e.IBV_QP_STATE)
        assert attributes.qp_state == e.IBV_QPS_ERR, f"state {attributes.qp_state}"
    end.talk.swap()
    assert end.mr.read(9, 0) == b"untouched"
    if not active:
        event = end.context.get_async_event()
        assert event.event_type == e.IBV_EVENT_QP_ACCESS_ERR, f"event {event.event_type}"
        event.ack()


def short_receive(end: End, active: bool) -> None:
    """A SEND longer than its receive: LOC_QP_OP_ERR there, REM_OP_ERR here (NAK 0x63), as with Linux rxe."""
    if active:
        end.talk.swap()
        end.post(e.IBV_WR_SEND, [end.sge(100)])
        end.wait(e.IBV_WC_REM_OP_ERR)
    else:
        end.receive([end.sge(50)])
        end.talk.swap()
        end.wait(e.IBV_WC_LOC_QP_OP_ERR)
    end.talk.swap()


def window(end: End, active: bool) -> None:
    """A type 1 window opens a part of a region to the partner, and nothing beyond it."""
    if active:
        key = end.talk.swap()
        end.mr.write(b"through the window", 18)
        end.post(e.IBV_WR_RDMA_WRITE, [end.sge(18)], offset=4096, rkey=key)
        end.wait()
        end.post(e.IBV_WR_RDMA_WRITE, [end.sge(18)], offset=4096 + 100 - 17, rkey=key)
        end.wait(e.IBV_WC_REM_ACCESS_ERR)
        end.talk.swap()
    else:
        opened = MW(end.pd, e.IBV_MW_TYPE_1)
        bind = MWBindInfo(end.mr, end.mr.buf + 4096, 100, e.IBV_ACCESS_REMOTE_WRITE)
        end.qp.bind_mw(opened, MWBind(bind, e.IBV_SEND_SIGNALED))
        end.wait()
        end.talk.swap(opened.rkey)
        end.talk.swap()
        assert end.mr.read(18, 4096) == b"through the window"
        opened.close()


def resize(end: End, active: bool) -> None:
    """Resizing a completion queue keeps what waits in it."""
    if active:
        for _ in range(10):
            end.post(e.IBV_WR_RDMA_WRITE, [end.sge(8)])
        time.sleep(0.5)
        end.cq.resize(1000)
        for _ in range(10):
            end.wait()
        end.cq.resize(20)
        end.post(e.IBV_WR_RDMA_WRITE, [end.sge(8)])
        end.wait()
    end.talk.swap()


def fork(end: End, active: bool) -> None:
    """A child that ends, one that closes everything, and one that uses the device itself: the parent is unharmed."""
    if active:
        for what in ("end", "close", "open"):
            child = os.fork()
            if child == 0:
                if what == "close":
                    os.closerange(3, 4096)
                elif what == "open":
                    with Context(name="rxe0") as own:
                        assert own.query_port(1).state == e.IBV_PORT_ACTIVE
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0, f"the child that should {what} failed"
            end.mr.write(what.encode(), len(what))
            end.post(e.IBV_WR_RDMA_WRITE, [end.sge(len(what))])
            end.wait()
        assert subprocess.run(["true"], check=False, close_fds=True).returncode == 0
        MR(end.pd, 4096, ALL_ACCESS).close()  # the command channel works as well
    end.talk.swap()
    if not active:
        assert end.mr.read(4, 0) == b"open"


def cut(end: End, active: bool) -> None:
    """A program that truncates its own queues: it is lost, its NIC is not (checked by the test)."""
    if active:
        end.receive([end.sge(8)])
        for name in os.listdir("/proc/self/fd"):
            path = os.readlink(f"/proc/self/fd/{name}") if os.path.islink(f"/proc/self/fd/{name}") else ""
            if path.endswith("/queues"):
                assert ctypes.CDLL(None).syscall(77, int(name), ctypes.c_long(0)) == 0  # ftruncate, raw
    end.talk.swap()
    if not active:
        # The NIC of the other end looks at the queues now: it must take a receive and publish its completion.
        end.post(e.IBV_WR_RDMA_WRITE_WITH_IMM, [end.sge(8)])
        time.sleep(0.3)
    end.talk.swap()
    os._exit(0)  # the next touch of a queue would be our own SIGBUS


def scribble(end: End, active: bool) -> None:
    """A program that writes nonsense over its queues, indices and all: its queue pair fails, no more than that."""
    if active:
        spans = []
        with open("/proc/self/maps", encoding="ascii") as maps:
            for line in maps:
                fields = line.split()
                if fields[-1].endswith("/queues") and int(fields[2], 16) != 0:
                    start, _, stop = fields[0].partition("-")
                    spans.append((int(start, 16), int(stop, 16)))
        assert spans
        noise = random.Random(7)
        for _ in range(50):
            for start, stop in spans:
                ctypes.memmove(start + 128, noise.randbytes(stop - start - 128), stop - start - 128)
            MR(end.pd, 4096, ALL_ACCESS).close()  # a command, so that the NIC looks at this context
            with contextlib.suppress(PyverbsRDMAError):
                end.post(e.IBV_WR_RDMA_WRITE, [end.sge(8)])
    end.talk.swap()
    os._exit(0)


SCENARIOS = {
    "data": data,
    "pieces": pieces,
    "atomics": atomics,
    "shared": shared,
    "late": late,
    "bad_key": bad_key,
    "short_receive": short_receive,
    "window": window,
    "resize": resize,
    "fork": fork,
    "cut": cut,
    "scribble": scribble,
}


def main() -> None:
    """Run one scenario as the active end (with an address) or the passive one."""
    name, server = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None
    end = End(Talk(server), srq=name == "shared")
    SCENARIOS[name](end, server is not None)
    end.talk.swap("end")
    print("ok", flush=True)


if __name__ == "__main__":
    main()
