"""The queue pair's states and which attributes each transition needs and allows (IBA 11.2.5.2, table 91)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from softroce_ext.transport.state.attributes import MTUS
from softroce_ext.transport.verbs import QpState, QpType
from softroce_ext.wire.frame import Path
from softroce_ext.wire.headers import PSN_MASK


class InvalidTransition(ValueError):
    """The caller asked for a transition, or with attributes, that the table does not have, or a value out of range."""


class Transition(NamedTuple):
    """What a modify must bring along and what it may bring besides."""

    required: frozenset[str]
    optional: frozenset[str]


def _row(required: str = "", optional: str = "") -> Transition:
    return Transition(frozenset(required.split()), frozenset(optional.split()))


_R, _I, _RTR, _RTS, _SQD, _SQE, _ERR = (
    QpState.RESET, QpState.INIT, QpState.RTR, QpState.RTS, QpState.SQD, QpState.SQE, QpState.ERR,
)  # fmt: skip

_ALWAYS: dict[tuple[QpState, QpState], Transition] = {
    (state, target): _row() for state in QpState for target in (_R, _ERR) if (state, target) != (_R, _ERR)
}
"""From every state to RESET, and from all but RESET to ERR, with no attributes."""

TRANSITIONS: dict[tuple[QpState, QpState], Transition] = {
    (_R, _I): _row("pkey_index port_num qp_access_flags"),
    (_I, _I): _row("", "pkey_index port_num qp_access_flags"),
    (_I, _RTR): _row(
        "path path_mtu destination_qpn rq_psn max_dest_rd_atomic min_rnr_timer",
        "alt_path qp_access_flags pkey_index",
    ),
    (_RTR, _RTS): _row(
        "timeout retry_cnt rnr_retry sq_psn max_rd_atomic",
        "alt_path qp_access_flags min_rnr_timer path_mig_state",
    ),
    (_RTS, _RTS): _row("", "qp_access_flags alt_path path_mig_state min_rnr_timer"),
    (_RTS, _SQD): _row("", "en_sqd_async_notify"),
    (_SQD, _RTS): _row("", "alt_path qp_access_flags min_rnr_timer path_mig_state"),
    (_SQD, _SQD): _row(
        "",
        "port_num path timeout retry_cnt rnr_retry max_rd_atomic max_dest_rd_atomic alt_path qp_access_flags "
        "pkey_index min_rnr_timer path_mig_state",
    ),
    **_ALWAYS,
}
"""RC's transitions. SQE is a state of UC and UD only: an RC queue pair goes to ERR."""

TRANSITIONS_UC: dict[tuple[QpState, QpState], Transition] = {
    (_R, _I): _row("pkey_index port_num qp_access_flags"),
    (_I, _I): _row("", "pkey_index port_num qp_access_flags"),
    (_I, _RTR): _row("path path_mtu destination_qpn rq_psn", "alt_path qp_access_flags pkey_index"),
    (_RTR, _RTS): _row("sq_psn", "alt_path qp_access_flags path_mig_state"),
    (_RTS, _RTS): _row("", "qp_access_flags alt_path path_mig_state"),
    (_RTS, _SQD): _row("", "en_sqd_async_notify"),
    (_SQD, _RTS): _row("", "alt_path qp_access_flags path_mig_state"),
    (_SQD, _SQD): _row("", "path alt_path qp_access_flags pkey_index path_mig_state"),
    (_SQE, _RTS): _row("", "qp_access_flags"),
    **_ALWAYS,
}
TRANSITIONS_UD: dict[tuple[QpState, QpState], Transition] = {
    (_R, _I): _row("pkey_index port_num qkey"),
    (_I, _I): _row("", "pkey_index port_num qkey"),
    (_I, _RTR): _row("", "pkey_index qkey"),
    (_RTR, _RTS): _row("sq_psn", "qkey"),
    (_RTS, _RTS): _row("", "qkey"),
    (_RTS, _SQD): _row("", "en_sqd_async_notify"),
    (_SQD, _RTS): _row("", "qkey"),
    (_SQD, _SQD): _row("", "pkey_index qkey"),
    (_SQE, _RTS): _row("", "qkey"),
    **_ALWAYS,
}

BY_TYPE = {QpType.RC: TRANSITIONS, QpType.UC: TRANSITIONS_UC, QpType.UD: TRANSITIONS_UD}
"""The transitions of each type of queue pair."""

ATTRIBUTES = frozenset({"qp_state", "cur_qp_state"}).union(
    *(row.required | row.optional for table in BY_TYPE.values() for row in table.values())
)
"""Names that `QueuePair.modify` takes. `path` is a wire.frame.Path (the address vector, resolved), `path_mtu` bytes;
`alt_path` is accepted and ignored (automatic path migration is not done), `cur_qp_state` is checked."""

_LIMITS: dict[str, int] = {
    "qp_access_flags": 0xFFFFFFFF,
    "qkey": 0xFFFFFFFF,
    "pkey_index": 0xFFFF,
    "destination_qpn": PSN_MASK,
    "rq_psn": PSN_MASK,
    "sq_psn": PSN_MASK,
    "timeout": 31,
    "retry_cnt": 7,
    "rnr_retry": 7,
    "min_rnr_timer": 31,
    "max_rd_atomic": 128,
    "max_dest_rd_atomic": 128,
    "port_num": 255,
    "path_mig_state": 2,
    "en_sqd_async_notify": 1,
}
DEPTHS = ("max_rd_atomic", "max_dest_rd_atomic")
"""Numbers of READs and atomics: rxe makes room for the next power of two, and says so when it is asked."""


def stored(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of a modify as they are kept."""
    return {name: rounded(value) if name in DEPTHS else value for name, value in attributes.items()}


def rounded(depth: int) -> int:
    """The power of two that is not below `depth`; 0 stays."""
    return 1 << (depth - 1).bit_length() if depth else 0


def check(state: int, attributes: Mapping[str, Any], qp_type: int = QpType.RC) -> QpState:
    """The state that `modify` with these attributes leads to from `state`. Raises InvalidTransition."""
    unknown = set(attributes) - ATTRIBUTES
    if unknown:
        raise InvalidTransition(f"unknown attribute {', '.join(sorted(unknown))}")
    if attributes.get("cur_qp_state", state) != state:
        raise InvalidTransition(f"the queue pair is in {QpState(state).name}, not in the state the caller supposes")
    try:
        current, target = QpState(state), QpState(attributes.get("qp_state", state))
    except ValueError as error:
        raise InvalidTransition(str(error)) from None
    row = BY_TYPE[QpType(qp_type)].get((current, target))
    if row is None:
        raise InvalidTransition(f"no transition from {current.name} to {target.name}")
    given = set(attributes) - {"qp_state", "cur_qp_state"}
    missing, extra = row.required - given, given - row.required - row.optional
    if missing or extra:
        what = "needs " + ", ".join(sorted(missing)) if missing else "does not take " + ", ".join(sorted(extra))
        raise InvalidTransition(f"{current.name} to {target.name} {what}")
    for name, limit in _LIMITS.items():
        value = attributes.get(name, 0)
        if not 0 <= value <= limit:
            raise InvalidTransition(f"{name} = {value} is not in 0..{limit}")
    if attributes.get("path_mtu", 1024) not in MTUS:
        raise InvalidTransition(f"path_mtu = {attributes['path_mtu']} is not one of {MTUS} bytes")
    if "path" in attributes and not isinstance(attributes["path"], Path):
        raise InvalidTransition("path is not a Path")
    return target
