"""Queue pairs as data: what a scene of frames is set up from."""

from __future__ import annotations

import random
from typing import Any

from softroce_ext.simulation.hosts import ALL_ACCESS
from softroce_ext.transport.verbs import QpState, QpType, WrOpcode


def queue_pair(
    chance: random.Random, qpn: int, kind: QpType, ipv6: bool, state: QpState, variant: int
) -> dict[str, Any]:
    """A queue pair as data; variants of RC: stopped, paused, resuming."""
    near = chance.choice((0, 5, 0x7FFFFC, 0xFFFFFA))
    spec: dict[str, Any] = {
        "qpn": qpn, "kind": kind.name, "ipv6": ipv6, "state": state.name, "receives": [], "sends": [], "variant": 0,
        "set": {
            "path_mtu": chance.choice((256, 1024)),
            "qp_access_flags": ALL_ACCESS if chance.random() < 0.8 else chance.randrange(16),
            "retry_cnt": chance.choice((0, 3, 7)), "rnr_retry": chance.choice((0, 7)),
            "max_rd_atomic": chance.choice((1, 16)), "max_dest_rd_atomic": chance.choice((1, 16)),
            "expected_psn": near, "rq_psn": near, "una_psn": near, "send_psn": near, "high_psn": near, "next_psn": near,
        },
    }  # fmt: skip
    for _ in range(chance.choice((0, 1, 50))):
        spec["receives"].append(
            [chance.choice((0, 64)), chance.choice((0, 8, 40, 300, 2000, 8000)), chance.choice((1, 1, 1, 2, 9))]
        )
    if kind != QpType.UD and state in (QpState.RTS, QpState.SQD):
        opcodes = [WrOpcode.SEND]
        if kind == QpType.RC:
            opcodes += [WrOpcode.RDMA_WRITE, WrOpcode.RDMA_READ, WrOpcode.SEND_WITH_IMM, WrOpcode.ATOMIC_FETCH_AND_ADD]
        for _ in range(chance.choice((0, 3, 6))):
            opcode = chance.choice(opcodes)
            length = 8 if opcode == WrOpcode.ATOMIC_FETCH_AND_ADD else chance.choice((0, 8, 3000))
            spec["sends"].append([int(opcode), length])
    if kind == QpType.RC:
        spec["variant"] = variant
        spec["set"]["peer_migros"] = variant > 1 or chance.random() < 0.3
    return spec


def queue_pairs(chance: random.Random) -> list[dict[str, Any]]:
    """One of each type in each state, both families, some stopped, paused or in a message."""
    made: list[dict[str, Any]] = []
    for kind in (QpType.RC, QpType.UC, QpType.UD):
        for ipv6 in (False, True):
            for state in QpState:
                if state == QpState.SQE:
                    continue
                count = 4 if kind == QpType.RC and state in (QpState.RTS, QpState.RTR, QpState.SQD) else 1
                made += [queue_pair(chance, 16 + len(made) + more, kind, ipv6, state, more) for more in range(count)]
    return made
