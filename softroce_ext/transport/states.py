"""The queue pair's states and which attributes each transition needs (IBA 10.3.1, 11.2.5.2)."""

from __future__ import annotations

ATTRIBUTES = (
    "qp_state", "cur_qp_state", "en_sqd_async_notify", "qp_access_flags", "pkey_index", "port_num", "qkey", "path",
    "path_mtu", "timeout", "retry_cnt", "rnr_retry", "rq_psn", "max_rd_atomic", "alt_path", "min_rnr_timer", "sq_psn",
    "max_dest_rd_atomic", "path_mig_state", "destination_qpn",
)  # fmt: skip
"""Names that `QueuePair.modify` takes. `path` is a wire.frame.Path (the address vector, resolved), `path_mtu` bytes."""


class InvalidTransition(ValueError):
    """The caller asked for a transition, or with attributes, that the table does not have, or a value out of range."""
