"""Every verbs call, right and wrong, has the same result on our NIC as on Linux rxe.

Invariant: the outputs of probe/calls.py at both ends are the same line by line, but for the lines that `ALLOWED` names
with what differs and why. A line of the table that no longer differs is an error too.
"""

from __future__ import annotations

import re
from pathlib import Path

from tests.interop.lab import Lab

PROBE = Path(__file__).with_name("probe") / "calls.py"
STRICTER = "rxe 6.1 takes the value and works with a part of it; ours refuses what the IBA does not allow"
ALLOWED = {
    r"modify RC to RTR \{'(path_mtu': [05]|dest_qp_num|rq_psn|max_dest_rd_atomic': 129|min_rnr_timer': 32).*": STRICTER,
    r"modify RC to RTS \{'(retry_cnt|rnr_retry|sq_psn).*": STRICTER,
}
"""Pattern of a line's name -> reason."""


def test_every_call_as_on_rxe(rxe_lab: Lab) -> None:
    """One run at each end, compared."""
    rxe_lab.prepare(1024)
    rxe_lab.b.put("/calls.py", PROBE.read_text())  # type: ignore[union-attr]
    outputs = {}
    for end, path in ((rxe_lab.b, "/calls.py"), (rxe_lab.a, str(PROBE))):
        code, text = end.run("/usr/bin/python3", path, timeout=120)
        assert code == 0, text
        assert "ended early" not in text, text
        outputs[end.name] = dict(line.rsplit(": ", 1) for line in text.splitlines() if ": " in line)
    theirs, ours = outputs["rxe"], outputs["ours"]
    assert len(theirs) > 400
    assert list(ours) == list(theirs), "not the same calls were made"
    different = {name for name in theirs if ours[name] != theirs[name]}
    unexpected = [
        f"{name}: rxe {theirs[name]}, ours {ours[name]}"
        for name in sorted(different)
        if not any(re.fullmatch(pattern, name) for pattern in ALLOWED)
    ]
    assert unexpected == [], "\n".join(unexpected)
    unused = [pattern for pattern in ALLOWED if not any(re.fullmatch(pattern, name) for name in different)]
    assert unused == [], f"these no longer differ: {unused}"
