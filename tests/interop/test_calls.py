"""Every verbs call, right and wrong, has the same result on our NIC as on Linux rxe.

Invariant: the outputs of the programs in probe/ at both ends are the same line by line, but for the lines that a table
names with what differs and why. A line of the table that no longer differs is an error too.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.interop.lab import Lab

PROBES = Path(__file__).with_name("probe")
STRICTER = "rxe 6.1 takes the value and works with a part of it; ours refuses what the IBA does not allow"
ALLOWED = {
    "calls.py": {
        r"modify RC to RTR \{'(path_mtu': [05]|dest_qp_num|rq_psn|max_dest_rd_atomic': 129).*": STRICTER,
        r"modify RC to RTR \{'min_rnr_timer': 32.*": STRICTER,
        r"modify RC to RTS \{'(retry_cnt|rnr_retry|sq_psn).*": STRICTER,
    },
    "raw_calls.py": {
        r"REG_MR iova wraps": STRICTER,
        r"REREG_MR flags [0246]": "rxe of kernel 6.1 has no such verb; as from 6.3 on ours changes domain and access",
        r"query (RC|UC|UD) in (INIT|RTR|RTS|SQD|ERR), cur_qp_state": "rxe 6.1 always answers RESET",
        r"DESTROY_QP": "rxe 6.1 miscounts two LIDs for one group, and the queue pair stays",
    },
    "cm_calls.py": {
        r"(BIND to|RESOLVE_ADDR of) InfiniBand.*": "no InfiniBand addresses: Linux takes zeros, of no use on Ethernet",
        r"RESOLVE_ADDR of (broadcast|group)( of datagrams)? from loopback.*": "a case of its own in Linux's routing",
    },
}
"""Program -> pattern of a line's name -> reason."""


@pytest.mark.parametrize("probe", ALLOWED)
def test_every_call_as_on_rxe(rxe_lab: Lab, probe: str) -> None:
    """One run at each end, compared; our NIC follows the interface's addresses, as Linux does."""
    rxe_lab.prepare(1024, "--follow")
    for file in PROBES.glob("*.py"):
        rxe_lab.b.put(f"/{file.name}", file.read_text())  # type: ignore[union-attr]
    # What a veth is and virtio does not know.
    assert rxe_lab.b.run("ethtool", "-s", "eth0", "speed", "10000", "duplex", "full")[0] == 0
    outputs = {}
    for end, path in ((rxe_lab.b, f"/{probe}"), (rxe_lab.a, str(PROBES / probe))):
        code, text = end.run("/usr/bin/python3", path, timeout=200)
        assert code == 0, text
        assert "ended early" not in text, text
        outputs[end.name] = dict(line.rsplit(": ", 1) for line in text.splitlines() if ": " in line)
    theirs, ours = outputs["rxe"], outputs["ours"]
    assert len(theirs) > 250
    assert list(ours) == list(theirs), "not the same calls were made"
    different = {name for name in theirs if ours[name] != theirs[name]}
    allowed = ALLOWED[probe]
    unexpected = [
        f"{name}: rxe {theirs[name]}, ours {ours[name]}"
        for name in sorted(different)
        if not any(re.fullmatch(pattern, name) for pattern in allowed)
    ]
    assert unexpected == [], "\n".join(unexpected)
    unused = [pattern for pattern in allowed if not any(re.fullmatch(pattern, name) for name in different)]
    assert unused == [], f"these no longer differ: {unused}"
