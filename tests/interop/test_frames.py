"""A peer that knows nothing of MigrOS never sees an unexpected packet.

Invariant: every frame that our NIC sends to Linux rxe is one that rxe itself could have sent, apart from the announced
reserved bit in reliable connections; started with --no-migros, without that bit. The judge is first tried on rxe's own
frames, and on a frame of ours that it must refuse.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.interop import frames, matrix
from tests.interop.lab import Lab

VECTORS = Path(__file__).parents[1] / "data" / "vectors"
PROGRAMS = (
    "ibv_rc_pingpong", "ibv_uc_pingpong", "ibv_ud_pingpong", "ib_write_bw", "ib_read_bw",
    "ib_atomic_lat -A FETCH_AND_ADD", "ib_atomic_lat -A CMP_AND_SWAP", "rping",
)  # fmt: skip
MUST = {
    "RC_SEND_FIRST", "RC_SEND_LAST", "RC_RDMA_WRITE_FIRST", "RC_RDMA_READ_REQUEST", "RC_RDMA_READ_RESPONSE_FIRST",
    "RC_ACKNOWLEDGE", "RC_ATOMIC_ACKNOWLEDGE", "RC_FETCH_ADD", "RC_COMPARE_SWAP", "UC_SEND_FIRST", "UD_SEND_ONLY",
}  # fmt: skip
"""What the programs make our NIC send, as requester and as responder."""


@pytest.mark.parametrize("path", sorted(VECTORS.glob("*.pcap")), ids=lambda path: path.stem)
def test_the_judge_accepts_what_rxe_sends(path: Path) -> None:
    """No fault in any frame between two rxe."""
    wrong = [fault for frame in frames.frames(path) for fault in frames.faults(frame, migros=False)]
    assert wrong == []


@pytest.mark.parametrize(("at", "value"), [(42, 0x19), (50, 0xC0), (43, 0x40), (46, 0x01), (44, 0x7F), (22, 63)])
def test_the_judge_refuses(at: int, value: int) -> None:
    """A RESUME, the announced bit, MigReq, reserved bits, another P_Key, another TTL: each is a fault for plain rxe."""
    frame = bytearray(next(frames.frames(VECTORS / "rc_send.pcap")))
    frame[at] = value
    assert frames.faults(bytes(frame), migros=False)


@pytest.mark.parametrize("options", [(), ("--no-migros",)], ids=["migros", "no-migros"])
@pytest.mark.parametrize("family", [4, 6])
def test_frames_are_those_of_rxe(rxe_lab: Lab, tmp_path: Path, options: tuple[str, ...], family: int) -> None:
    """Programs of every transport in both directions, a good and a bad link."""
    rxe_lab.prepare(1024, *options)
    rxe_lab.meet()
    mac = bytes.fromhex(
        rxe_lab.a.run("ip", "-o", "link", "show", "eth0")[1].split("link/ether ")[1][:17].replace(":", "")
    )
    seen: Counter[str] = Counter()
    rows = {row.name: row for row in matrix.ROWS}
    for direction in ("ours>rxe", "rxe>ours"):
        for name in PROGRAMS:
            size = "mtus" if "mtus" in rows[name].sizes else rows[name].sizes[-1]
            for link in ("clean",) if rows[name].lossless else ("clean", "loss"):
                capture = tmp_path / "frames.pcap"
                rxe_lab.cable.capture(capture)
                case = matrix.Case(rows[name], size, 1024, family, direction, link)
                result = matrix.tried(rxe_lab, case, 1, *options)
                rxe_lab.cable.capture(None)
                assert result.ok, f"{result.case}: {result.reason}"
                counts, wrong = frames.judge(capture, mac, migros=not options)
                assert wrong == [], f"{result.case}: {len(wrong)} faults, first: {wrong[0]}"
                seen += counts
    assert set(seen) >= MUST, f"never sent: {sorted(MUST - set(seen))}"
