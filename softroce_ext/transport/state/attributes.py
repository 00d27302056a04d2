"""The attributes of a queue pair: what `ibv_create_qp` and `ibv_modify_qp` have set (IBA 11.2.5.1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from softroce_ext.transport.state.fields import U8, U16, U32, number, required
from softroce_ext.transport.verbs import QpState, QpType
from softroce_ext.wire.headers import PSN_MASK
from softroce_ext.wire.path import Path

MTUS: Final = (256, 512, 1024, 2048, 4096)
"""Bytes."""
MAX_DEPTH: Final = 128
"""READs and atomics that may be outstanding in one direction."""
NO_ATTRIBUTE: Final = ("qp_state", "cur_qp_state", "alt_path")
"""Names that a modify may bring along and that are not stored under that name."""


@dataclass(slots=True)
class Attributes:
    """Written by `QueuePair.modify`; besides, an error sets `state` and a migration of either end sets `path`."""

    qpn: int = required(PSN_MASK)
    qp_type: int = number(QpType.RC, U8)
    """enum ib_qp_type (verbs.QpType)."""
    sq_sig_all: bool = False
    """Every send request gets a completion, whatever its SIGNALED flag."""
    srq: bool = False
    """The receive queue is shared: it is not flushed, and a fetched receive is retired at once."""

    state: int = number(QpState.RESET, QpState.ERR)
    """enum ib_qp_state (verbs.QpState)."""
    destination_qpn: int = number(0, PSN_MASK)
    path: Path | None = None
    """The address vector, resolved. A RESUME from the peer replaces it."""
    path_mtu: int = number(256, max(MTUS))
    """Payload bytes per packet (not the enum)."""
    qp_access_flags: int = number(0, U32)
    pkey_index: int = number(0, U16)
    port_num: int = number(0, U8)
    qkey: int = number(0, U32)
    rq_psn: int = number(0, PSN_MASK)
    sq_psn: int = number(0, PSN_MASK)
    timeout: int = number(0, 31)
    """Local ACK timeout code: 4.096 us * 2**code; 0 means no timeout."""
    retry_cnt: int = number(0, 7)
    """Retries after timeouts and sequence NAKs; 7 is unlimited, as in rxe."""
    rnr_retry: int = number(0, 7)
    """Retries after RNR NAKs; 7 is unlimited (IBA)."""
    min_rnr_timer: int = number(0, 31)
    max_rd_atomic: int = number(0, MAX_DEPTH)
    max_dest_rd_atomic: int = number(0, MAX_DEPTH)
    en_sqd_async_notify: bool = False
    path_mig_state: int = number(0, 2)

    def update(self, values: Mapping[str, Any], state: QpState) -> None:
        """Take over the attributes of a modify that `states.check` has accepted, and the state that it leads to."""
        for name, value in values.items():
            if name not in NO_ATTRIBUTE:
                setattr(self, name, value)
        self.state = int(state)

    def replace_path(self, path: Path) -> None:
        """One of the two ends has moved."""
        self.path = path
