"""The port's counters as files: `ports/1/hw_counters` with the names and meanings of rxe, `ports/1/cm_*` with those of
the kernel's connection manager, `ports/1/migros` with the NIC's own.

The kernel computes such a file when it is read. Here they are ordinary files, rewritten in place: at most every
`FRESHNESS` seconds while the NIC works, once more after it became idle, and never while nothing happens. What a reader
sees is at most `FRESHNESS` seconds old (hw_counters/lifespan has that time in milliseconds, as in the kernel).

rxe has no `ports/1/counters` (that folder is for devices that answer performance management MADs), so there is none.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

FRESHNESS: Final = 0.2
"""Seconds."""

RXE_NAMES: Final = (
    "sent_pkts",
    "rcvd_pkts",
    "duplicate_request",
    "out_of_seq_request",
    "rcvd_rnr_err",
    "send_rnr_err",
    "rcvd_seq_err",
    "ack_deferred",
    "retry_exceeded_err",
    "retry_rnr_exceeded_err",
    "completer_retry_err",
    "send_err",
    "link_downed",
    "rdma_sends",
    "rdma_recvs",
)
"""Files of hw_counters besides lifespan, in the order of the kernel's list (rxe_hw_counters.c, Linux 6.1)."""

REFUSED_BEFORE_COUNTED: Final = (
    "refused_qpn",
    "refused_state",
    "refused_pkey",
    "refused_qkey",
    "refused_address",
)
"""Valid packets that no queue pair takes: rxe drops them before it counts them as received."""


CM_NAMES: Final = tuple(
    f"cm_{group}/{kind}"
    for group in ("tx_msgs", "tx_retries", "rx_msgs", "rx_duplicates")
    for kind in ("req", "mra", "rej", "rep", "rtu", "dreq", "drep", "sidr_req", "sidr_rep", "lap", "apr")
)
"""The connection manager's files below ports/1 (drivers/infiniband/core/cm.c). LAP and APR are never sent."""


def rxe_view(counters: Mapping[str, int]) -> dict[str, int]:
    """What rxe would have counted, of all the NIC's `counters`, by rxe's names.

    ack_deferred is always 0: it counts responses that had to wait for the completer, and here none waits.
    """
    view = {name: counters.get(name, 0) for name in RXE_NAMES}
    refused = sum(counters.get(name, 0) for name in REFUSED_BEFORE_COUNTED)
    view["rcvd_pkts"] = max(0, view["rcvd_pkts"] - refused)
    view["send_err"] = counters.get("tx_errors", 0)
    view["sent_pkts"] = max(0, view["sent_pkts"] - view["send_err"])
    return view


def own_view(counters: Mapping[str, int]) -> dict[str, int]:
    """The counters that Linux does not have."""
    return {name: value for name, value in counters.items() if name not in RXE_NAMES and "/" not in name}


def cm_view(counters: Mapping[str, int]) -> dict[str, int]:
    """The connection manager's counters, by their path below the port's folder."""
    return {name: counters.get(name, 0) for name in CM_NAMES}


class CounterFiles:
    """The open files of one port's counters."""

    def __init__(self, port: Path, read: Callable[[], dict[str, int]]) -> None:
        """port: the folder `ports/1` of the sysfs picture; read: every counter of the NIC.

        Raises OSError when the folders cannot be made.
        """
        self._folders = (port / "hw_counters", port / "migros", port)
        self._read = read
        self._fds: dict[Path, int] = {}
        self._shown: dict[Path, int] = {}
        self.next_write = 0.0
        """When `write` should be called next, if something has happened since."""
        self.stale = False
        """Something may have been counted since the files were written."""
        for folder in (*self._folders, *(port / name.partition("/")[0] for name in CM_NAMES)):
            folder.mkdir(parents=True, exist_ok=True)
        (self._folders[0] / "lifespan").write_text(f"{FRESHNESS * 1000:.0f}\n")
        self.write(0.0)

    def write(self, now: float) -> None:
        """Bring the files up to date. Only those whose value has changed are touched."""
        counters = self._read()
        views = (rxe_view(counters), own_view(counters), cm_view(counters))
        for folder, values in zip(self._folders, views, strict=True):
            for name, value in values.items():
                path = folder / name
                if self._shown.get(path) != value:
                    with contextlib.suppress(OSError):  # a full disk must not end the NIC
                        self._put(path, value)
        self.next_write = now + FRESHNESS
        self.stale = False

    def _put(self, path: Path, value: int) -> None:
        fd = self._fds.get(path)
        if fd is None:
            fd = self._fds[path] = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o444)
        # One write in place: a reader sees the old number or the new one, never nothing.
        written = os.pwrite(fd, b"%d\n" % value, 0)
        if value < self._shown.get(path, 0):
            os.ftruncate(fd, written)
        self._shown[path] = value

    def close(self) -> None:
        """Close the files; they stay as they are."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()
