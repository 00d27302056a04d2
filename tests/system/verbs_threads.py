"""Threads, signals, chdir and exec on one device: libibverbs called through ctypes, which lets threads run at once.

Each thread opens nothing of its own: all share one context, so their commands meet in the bridge. Ends with `ok`.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading

ibv = ctypes.CDLL("libibverbs.so.1", use_errno=True)
for name in ("ibv_get_device_list", "ibv_open_device", "ibv_alloc_pd", "ibv_reg_mr"):
    getattr(ibv, name).restype = ctypes.c_void_p
ibv.ibv_reg_mr.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
THREADS, ROUNDS = 8, 150
LKEY_AT = 36
"""offsetof(struct ibv_mr, lkey)."""


def main() -> None:
    """Register and deregister in many threads while signals arrive; keys must be unique and every call succeed."""
    os.chdir("/tmp")
    devices = ctypes.cast(ibv.ibv_get_device_list(None), ctypes.POINTER(ctypes.c_void_p))
    assert devices and devices[0], "no device"
    context = ctypes.c_void_p(ibv.ibv_open_device(ctypes.c_void_p(devices[0])))
    assert context, "the device cannot be opened"
    pd = ctypes.c_void_p(ibv.ibv_alloc_pd(context))
    memory = ctypes.create_string_buffer(1 << 16)
    alarms = [0]
    signal.signal(signal.SIGALRM, lambda *_: alarms.__setitem__(0, alarms[0] + 1))
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    alive: dict[int, int] = {}
    faults: list[str] = []
    lock = threading.Lock()

    def work(number: int) -> None:
        for step in range(ROUNDS):
            mr = ibv.ibv_reg_mr(pd, ctypes.addressof(memory), 4096, 1)
            if not mr:
                faults.append(f"thread {number} step {step}: {os.strerror(ctypes.get_errno())}")
                return
            key = ctypes.c_uint32.from_address(mr + LKEY_AT).value
            with lock:
                if key in alive:
                    faults.append(f"key {key:#x} is both thread {alive[key]}'s and {number}'s")
                alive[key] = number
            with lock:
                del alive[key]
            if ibv.ibv_dereg_mr(ctypes.c_void_p(mr)):
                faults.append(f"thread {number}: dereg")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert not faults, faults[:3]
    assert alarms[0] > 5, "no signals: this proves nothing"
    assert ibv.ibv_dealloc_pd(pd) == 0
    assert ibv.ibv_close_device(context) == 0
    if len(sys.argv) > 1:
        os.execv(sys.executable, [sys.executable, __file__])  # the environment carries the device over
    print("ok")


if __name__ == "__main__":
    main()
