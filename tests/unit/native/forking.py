"""A program that runs under the bridge: it forks while another of its threads is inside a command. The child closes
what it has inherited and uses the device itself; the exit status is the child's."""

from __future__ import annotations

import os
import struct
import sys
import threading

DEVICE = "/dev/infiniband/uverbs0"
COMMAND = struct.pack("<IHH", 3, 2, 0)
"""A header without a response; the NIC is played, and does not look into it."""


def child(inherited: int) -> int:
    """Return the child's exit status."""
    os.close(inherited)
    return 0 if os.write(os.open(DEVICE, os.O_RDWR), COMMAND) == len(COMMAND) else 1


def main() -> int:
    """Return the exit status."""
    device = os.open(DEVICE, os.O_RDWR)
    thread = threading.Thread(target=os.write, args=(device, COMMAND))
    thread.start()
    sys.stdin.readline()  # the NIC has got the command and does not answer it
    pid = os.fork()
    if not pid:
        status = 2
        try:
            status = child(device)
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    thread.join()
    return status


sys.exit(main())
