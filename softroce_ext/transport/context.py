"""The queue pair's context: every fact that the protocol remembers about one connection, in one flat record."""

from __future__ import annotations

from typing import Any


class QpContext:
    """All state of one RC queue pair, plain data only. A dump is `to_plain`, a restore is `from_plain`.

    DEVICE creates it with `QpContext(qpn=…, sq_sig_all=…, srq=…)` in RESET and changes attributes through
    `QueuePair.modify` only. Attribute fields carry the names of ibv_qp_attr (path_mtu is in *bytes*):
    qpn, qp_type (2 RC), state, sq_sig_all, srq, max_inline, destination_qpn, path (wire.frame.Path or None), path_mtu,
    qp_access_flags, pkey_index, port_num, qkey, rq_psn, sq_psn, timeout, retry_cnt, rnr_retry, min_rnr_timer,
    max_rd_atomic, max_dest_rd_atomic, en_sqd_async_notify, path_mig_state.
    For query_qp: `send_psn` is the next request's PSN, `expected_psn` the next expected one, `sq_draining` a bool.
    MigrOS: `stopped`, `paused`, `peer_migros`, `resume_pending` (bools).
    Gap statistics, seconds on the caller's clock: `gap_last` (time of the last completion or None), `gap_longest`,
    `gap_longest_end` (None until there were two completions).
    """

    __slots__ = ("qpn", "sq_sig_all", "srq")

    def __init__(self, qpn: int, sq_sig_all: bool = False, srq: bool = False) -> None:
        raise NotImplementedError

    def reset_gaps(self) -> None:
        """Forget the gap statistics."""
        raise NotImplementedError

    def to_plain(self) -> dict[str, Any]:
        """JSON-able data: numbers, strings (bytes in hexadecimal), lists, None."""
        raise NotImplementedError

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> QpContext:
        """The inverse of `to_plain`. Raises ValueError when `plain` is not a dumped context."""
        raise NotImplementedError
