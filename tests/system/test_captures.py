"""Our captures before independent judges, and what a run leaves in its folder.

Invariants: tshark decodes every frame of every capture of a run with a migration, without a malformed or unknown one,
the two MigrOS messages aside; every ICRC is right by two implementations that are not the NIC's; the MigrOS messages
are on the wire as docs/wire-protocol.md says; the summary tells what the captures show.

The judges are judged first, on captures of the real Linux driver and on damaged copies of them.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.system.captures import (
    ACK_REQ,
    ACKNOWLEDGE,
    NAK_STOPPED,
    RESUME,
    RESUME_ANSWER,
    SPEAKS_MIGROS,
    Frame,
    complaints,
    frames,
    icrc_is_right,
    scapy_icrc_is_right,
)

ROOT = Path(__file__).parent.parent.parent
VECTORS = ROOT / "tests" / "data" / "vectors"
SCAPY_SAMPLE = 300
"""Frames per capture that scapy judges (0.5 ms each); the ICRC written in captures.py judges all."""

TOPOLOGY = {
    "name": "captured",
    "seed": 3,
    "capture": True,
    "hosts": {"h1": {"ip": "10.0.0.1"}, "h2": {"ip": "10.0.0.2"}, "h3": {}},
    "switches": ["s1"],
    "links": [["h1", "s1"], ["h2", "s1"], ["h3", "s1"]],
    "apps": {
        "server": {"host": "h2", "command": "ibv_rc_pingpong -g 1 -n 4000 -c"},
        "client": {"host": "h1", "command": "ibv_rc_pingpong -g 1 -n 4000 -c {server.ip}", "after": "server"},
    },
    "migrations": [{"app": "server", "to": "h3", "at": "64KiB", "address": "keep"}],
}


def write_pcap(path: Path, packets: list[bytes]) -> Path:
    """A capture of the given frames, for the judges' own tests."""
    body = struct.pack("<IHHiIII", 0xA1B23C4D, 2, 4, 0, 0, 65535, 1)
    for number, data in enumerate(packets):
        body += struct.pack("<IIII", 1, number, len(data), len(data)) + data
    path.write_bytes(body)
    return path


class TestJudges:
    """A judge that cannot say no proves nothing."""

    @pytest.fixture(params=["rc_send", "rc_write", "rc_read", "nak_psn_seq"])
    def real(self, request: pytest.FixtureRequest) -> Path:
        return VECTORS / f"{request.param}.pcap"

    def test_frames_of_the_linux_driver_pass(self, real: Path) -> None:
        assert all(icrc_is_right(frame.data) and scapy_icrc_is_right(frame.data) for frame in frames(real))
        assert complaints(real) == []

    def test_one_flipped_bit_is_seen(self, real: Path) -> None:
        for frame in frames(real):
            for offset in (18, 42, 50, len(frame.data) - 5):  # IP identification, opcode, AckReq byte, last before ICRC
                damaged = bytearray(frame.data)
                damaged[offset] ^= 0x10
                assert not icrc_is_right(bytes(damaged)), (frame.number, offset)

    def test_fields_that_routers_change_are_left_out(self, real: Path) -> None:
        for frame in frames(real):
            changed = bytearray(frame.data)
            for offset in (15, 22, 46):  # TOS, TTL, FECN/BECN
                changed[offset] ^= 0x20
            assert icrc_is_right(bytes(changed))

    def test_unknown_opcodes_and_other_protocols_are_named(self, tmp_path: Path) -> None:
        good = next(frames(VECTORS / "rc_send.pcap")).data
        unknown, other = bytearray(good), bytearray(good)
        unknown[42] = 0x1F
        other[36:38] = b"\x30\x39"
        found = complaints(write_pcap(tmp_path / "x.pcap", [good, bytes(unknown), bytes(other)]))
        assert (
            len(found) == 2 and found[0].startswith("frame 2: unknown opcode") and found[1].startswith("frame 3: not")
        )

    def test_a_truncated_header_is_malformed(self, tmp_path: Path) -> None:
        write = next(f for f in frames(VECTORS / "rc_write.pcap") if f.opcode == 0x0A).data
        short = bytearray(write[: 42 + 12 + 6])  # in the middle of the RETH
        short[16:18] = (len(short) - 14).to_bytes(2)
        short[38:40] = (len(short) - 34).to_bytes(2)
        assert complaints(write_pcap(tmp_path / "x.pcap", [bytes(short)]))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run with a migration, captured from end to end: its summary."""
    folder = tmp_path_factory.mktemp("captured")
    file = folder / "captured.yaml"
    file.write_text(yaml.safe_dump(TOPOLOGY))
    answer = subprocess.run(
        [sys.executable, "-m", "testbed", "run", str(file), "--json", "--results", str(folder / "results")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert answer.returncode == 0, answer.stderr[-4000:]
    summary: dict[str, Any] = json.loads(answer.stdout)
    assert summary["ok"] and summary["migrations"][0]["ok"]
    return summary


def captured(run: dict[str, Any], host: str) -> list[Frame]:
    return list(frames(Path(run["folder"]) / "pcaps" / f"{host}.pcap"))


@pytest.mark.system
class TestRun:
    @pytest.mark.parametrize("host", ["h1", "h2", "h3"])
    def test_tshark_decodes_every_frame(self, run: dict[str, Any], host: str) -> None:
        path = Path(run["folder"]) / "pcaps" / f"{host}.pcap"
        assert captured(run, host), "an empty capture proves nothing"
        assert complaints(path) == []

    @pytest.mark.parametrize("host", ["h1", "h2", "h3"])
    def test_every_icrc_is_right(self, run: dict[str, Any], host: str) -> None:
        seen = captured(run, host)
        assert not any(frame.cut for frame in seen), "a cut frame cannot be checked"
        assert [frame.number for frame in seen if not icrc_is_right(frame.data)] == []
        sample = seen[:: max(1, len(seen) // SCAPY_SAMPLE)]
        sample += [frame for frame in seen if frame.opcode == RESUME]
        assert [frame.number for frame in sample if not scapy_icrc_is_right(frame.data)] == []

    def test_every_packet_says_that_it_speaks_migros(self, run: dict[str, Any]) -> None:
        for host in ("h1", "h2", "h3"):
            assert all(frame.flags & SPEAKS_MIGROS for frame in captured(run, host))

    def test_the_migration_on_the_wire(self, run: dict[str, Any]) -> None:
        """At the partner: NAK_STOPPED and silence, then RESUME from the new host, its ACK, and ordinary traffic."""
        seen = captured(run, "h1")
        naks = [f for f in seen if f.opcode == ACKNOWLEDGE and f.syndrome == NAK_STOPPED]
        resumes = [f for f in seen if f.opcode == RESUME]
        assert resumes and all(f.flags & ACK_REQ and f.source == "10.0.0.2" for f in resumes)
        assert all(len(f.data) == 14 + 20 + 8 + 12 + 4 + 4 for f in resumes), "BTH + AETH, no payload"
        answers = [f for f in seen if f.opcode == ACKNOWLEDGE and f.flags & RESUME_ANSWER]
        assert answers and all(f.source == "10.0.0.1" and f.syndrome >> 5 == 0 for f in answers)
        first, answer = resumes[0], answers[0]
        assert all(f.time < first.time for f in naks) and first.time < answer.time
        if naks:
            quiet = [f for f in seen if naks[-1].time < f.time < first.time and f.source == "10.0.0.1"]
            assert quiet == [], "a Paused requester sends nothing"
        later = [f for f in seen if f.time > answer.time]
        assert len(later) > 100, "the connection continues"

    def test_the_answer_to_resume_acknowledges_only_what_arrived(self, run: dict[str, Any]) -> None:
        """The RESUME carries the server's first unacknowledged PSN u. If the client has it, the answer says at least u;
        if not, u − 1, and never more than what the client has seen."""
        seen = captured(run, "h1")
        resume = next(f for f in seen if f.opcode == RESUME)
        answer = next(f for f in seen if f.opcode == ACKNOWLEDGE and f.flags & RESUME_ANSWER)
        requests = [f for f in seen if f.opcode < 0x0D and f.source == "10.0.0.2" and f.time < resume.time]
        newest = max((f.psn for f in requests), default=resume.psn - 1)
        assert (answer.psn - (resume.psn - 1)) & 0xFFFFFF < 0x800000
        assert (newest - answer.psn) & 0xFFFFFF < 0x800000

    def test_each_host_says_what_belongs_to_it(self, run: dict[str, Any]) -> None:
        """After the RESUME, the server's packets come from h3's NIC alone; h2 stays silent."""
        # Not what they hear: a frame of the client may reach h2 late, or h3 already, on a machine that is slow.
        old, new = ([f for f in captured(run, host) if f.source == "10.0.0.2"] for host in ("h2", "h3"))
        resume = next(f for f in new if f.opcode == RESUME)
        assert old and all(f.time <= resume.time for f in old)
        stopped = [f for f in new if f.opcode == ACKNOWLEDGE and f.syndrome == NAK_STOPPED]
        assert all(f.time >= resume.time for f in new if f not in stopped)


@pytest.mark.system
class TestFolder:
    def test_everything_is_kept(self, run: dict[str, Any]) -> None:
        folder = Path(run["folder"])
        assert json.loads((folder / "summary.json").read_text()) == run
        assert yaml.safe_load((folder / "topology.yaml").read_text())["name"] == "captured"
        versions = json.loads((folder / "versions.json").read_text())
        assert versions["kernel"] and versions["criu"] and versions["ovs"] and versions["packages"]["pydantic"]
        assert run["environment"] == versions and run["seed"] == 3
        for app in run["apps"]:
            assert "iters in" in (folder / app["logs"]["stdout"]).read_text()

    def test_events_are_in_order_and_tell_the_migration(self, run: dict[str, Any]) -> None:
        lines = (Path(run["folder"]) / "events.jsonl").read_text().splitlines()
        events = [json.loads(line) for line in lines]
        names = [event["event"] for event in events]
        order = ["run_started", "nic_ready", "app_started", "migration_started", "migration_finished", "run_finished"]
        assert [names.index(name) for name in order] == sorted(names.index(name) for name in order)
        finished = {e["phase"]: e["ms"] for e in events if e["event"] == "phase_finished"}
        assert set(finished) == set(run["migrations"][0]["phases_ms"])

    def test_the_summary_agrees_with_the_captures(self, run: dict[str, Any]) -> None:
        migration = run["migrations"][0]
        seen = captured(run, "h1")
        # No completion at the partner without a frame: its silence before the RESUME lies inside the gap it measured.
        # (Not the longest silence of the whole run: a machine that is paused for a while is silent too.)
        arrival = next(index for index, frame in enumerate(seen) if frame.opcode == RESUME)
        silence = (seen[arrival].time - seen[arrival - 1].time) * 1000
        assert 0 < silence <= migration["partner_gap_ms"]
        assert migration["blackout_ms"] >= migration["phases_ms"]["freeze"]
        sent = sum(1 for f in captured(run, "h3") if f.opcode == RESUME)
        assert migration["resumes"] == sent
        for host in run["hosts"]:
            (capture,) = host["captures"]
            assert capture["frames"] == len(captured(run, host["name"]))

    def test_text_is_kept_out_of_json(self, run: dict[str, Any]) -> None:
        """`--json` printed one JSON document and nothing else (the fixture parsed it whole)."""
        assert set(run["migrations"][0]) >= {
            "blackout_ms",
            "phases_ms",
            "app_exit_code",
            "partner_gap_ms",
            "rolled_back",
        }
