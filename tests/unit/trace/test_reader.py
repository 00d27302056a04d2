"""Reading traces: every mistake in a file is reported, sent and received packets are matched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from softroce_ext.simulation.link import Link
from testbed.base.errors import BadInput
from testbed.diagram.trace import connection, flights, read
from tests.support.transport.traces import record

START = '{"t":1.0,"event":"start","version":1}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a trace"),
        ("hello\n", "line 1 is not JSON"),
        ('{"t":1.0,"event":"packet"}\n', "not a trace"),
        ('{"t":1.0,"event":"start","version":9}\n', "version 9"),
        (START + "[1]\n", "line 2 is not a trace event"),
        (START + '{"event":"gone"}\n', "line 2 is not a trace event"),
        (START + "{oh\n" + START, "line 2 is not JSON"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(BadInput, match=message):
        read(path)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot read"):
        read(tmp_path / "nothing.jsonl")
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(BadInput, match="not a text file"):
        read(binary)


def test_a_torn_last_line_is_left_out_and_lines_are_sorted(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    late, early = ({"t": t, "event": "gone", "qpn": 17} for t in (3.0, 2.0))
    path.write_text(START + json.dumps(late) + "\n" + json.dumps(early) + '\n{"t":4.0,"ev')
    assert [line["t"] for line in read(path).lines] == [2.0, 3.0]


def test_each_packet_is_found_at_the_other_end(tmp_path: Path) -> None:
    paths, scene = record(tmp_path, Link(seed=5, loss=0.03, spacing=1e-6))
    traces = [read(path) for path in paths]
    found = flights(traces, connection(traces))
    assert len(found) == len(scene.world.trace)
    assert all(flight.sender is not None for flight in found)
    delivered = [flight for flight in found if flight.receiver is not None]
    assert len(delivered) == scene.total("rcvd_pkts")
    for flight in delivered:
        assert flight.sent_at is not None and flight.received_at is not None
        # One delay and the wait for the frames before it: a packet is never joined with its own retransmission.
        assert 0 < flight.received_at - flight.sent_at < 1e-3
        assert flight.sender != flight.receiver


def test_what_the_link_duplicated_is_one_packet(tmp_path: Path) -> None:
    paths, scene = record(tmp_path, Link(seed=2, duplicate=0.1, spacing=1e-6))
    traces = [read(path) for path in paths]
    found = flights(traces, connection(traces))
    assert len(found) == len(scene.world.trace)
    copies = sum(len(flight.copies) for flight in found)
    assert copies == scene.total("rcvd_pkts") - len(found) > 0


def test_connections_are_chosen_by_either_number(tmp_path: Path) -> None:
    paths, _ = record(tmp_path, Link(spacing=1e-6))
    traces = [read(path) for path in paths]
    assert connection(traces) == connection(traces, 17) == connection(traces, 65553) == {17, 65553}
    with pytest.raises(BadInput, match="no packets of QPN 99"):
        connection(traces, 99)
    assert traces[0].qpns() == [17]
