"""Sequence diagrams: every packet of the window is in the picture, time runs downwards, labels keep their distance."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

from softroce_ext.simulation.hosts import BASE, Host, connect, end
from softroce_ext.simulation.link import Link
from softroce_ext.simulation.world import World
from softroce_ext.trace.queue_pairs import QpTrace
from softroce_ext.transport.verbs import WrOpcode
from testbed.base.errors import BadInput
from testbed.diagram.layout import MAX_ARROWS, Layout, kind_of, label_of, layout
from testbed.diagram.picture import draw
from testbed.diagram.trace import Trace, read
from tests.support.transport.scene import Scene, migrate
from tests.support.transport.traces import record


@pytest.fixture(scope="module")
def lossy(tmp_path_factory: pytest.TempPathFactory) -> list[Trace]:
    paths, _ = record(tmp_path_factory.mktemp("lossy"), Link(seed=3, loss=0.04, spacing=2e-6))
    return [read(path) for path in paths]


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> list[Trace]:
    """The end b is stopped in the middle of its traffic, moves from host 2 to host 3, and resumes."""
    folder = tmp_path_factory.mktemp("moved")
    scene = Scene(Link(spacing=2e-6))
    world = scene.world
    paths = [folder / f"h{host.number}.jsonl" for host in scene.hosts[:3]]
    traces = [
        QpTrace(host.engine, str(path), clock=lambda: world.now) for host, path in zip(scene.hosts, paths, strict=False)
    ]
    scene.step(30)
    scene.b.qp.stop()
    scene.hosts[1].engine.end_of_batch(world.now)
    world.settle(0.005)
    migrate(world, scene.b, scene.hosts[2])
    scene.finish()
    for trace in traces:
        trace.close()
    return [read(path) for path in paths]


def check(found: Layout) -> None:
    """Check what must hold for every layout."""
    labels = defaultdict(list)
    for arrow in found.arrows:
        assert arrow.rows == sorted(arrow.rows[:2]) + arrow.rows[2:]
        assert arrow.sender != arrow.receiver
        assert all(-0.5 <= row <= found.height for row in arrow.rows)
        labels[arrow.sender].append(arrow.rows[0])
    for rows in labels.values():
        assert all(later - earlier >= 0.99 for earlier, later in pairwise(rows))
    moments = sorted((when, row) for arrow in found.arrows for when, row in zip(arrow.times(), arrow.rows, strict=True))
    assert [row for _, row in moments] == sorted(row for _, row in moments)


def test_losses_and_retransmissions(lossy: list[Trace]) -> None:
    found = layout(lossy, begin_ms=0)
    check(found)
    assert found.columns == ["h1", "h2"]
    assert sum(arrow.count for arrow in found.arrows) == sum(len(trace.packets("sent")) for trace in lossy)
    lost = sum(arrow.count for arrow in found.arrows if arrow.lost)
    assert lost == sum(len(trace.packets("sent")) - len(trace.packets("received")) for trace in lossy) > 0
    again = [arrow for arrow in found.arrows if arrow.kind == "retransmission"]
    assert again and all(arrow.label.endswith("again") for arrow in again)
    assert any(arrow.kind == "nak" for arrow in found.arrows)
    assert found.left_out == 0


def test_runs_of_middles_are_bands(lossy: list[Trace]) -> None:
    bands = [arrow for arrow in layout(lossy, begin_ms=0).arrows if arrow.count > 1]
    assert bands
    for band in bands:
        assert band.label.startswith(f"… {band.count} × ") and len(band.rows) == 4


def test_who_answers_whom_stays_visible(tmp_path: Path) -> None:
    """Messages of one packet that are answered one by one are no band."""
    here, there = end(Host(1), 17), end(Host(2), 18)
    connect(here, there)
    world = World(here.host, there.host)
    trace = QpTrace(here.host.engine, str(tmp_path / "h1.jsonl"), clock=lambda: world.now)
    for number in range(8):
        here.post(WrOpcode.RDMA_WRITE, number, BASE, 8)
        world.run(lambda count=number + 1: len(here.scq.entries) == count)  # type: ignore[misc]
    trace.close()
    found = layout([read(tmp_path / "h1.jsonl")])
    check(found)
    assert [arrow.kind for arrow in found.arrows] == ["request", "response"] * 8


def test_without_a_window_the_first_trouble_is_in_it(lossy: list[Trace]) -> None:
    found = layout(lossy)
    check(found)
    assert len(found.arrows) <= MAX_ARROWS
    assert any(arrow.lost for arrow in found.arrows)


def test_a_migration_has_three_lifelines(moved: list[Trace]) -> None:
    found = layout(moved)
    check(found)
    assert found.columns == ["h1", "h2", "h3"]
    resumes = [arrow for arrow in found.arrows if arrow.label.startswith("RESUME")]
    assert [(arrow.sender, arrow.receiver) for arrow in resumes] == [(2, 0)]
    stopped = [arrow for arrow in found.arrows if arrow.kind == "stopped"]
    assert stopped and all((arrow.sender, arrow.receiver) == (1, 0) for arrow in stopped)
    texts = {note.column: [] for note in found.notes if note.kind == "state"}  # type: dict[int, list[str]]
    for note in found.notes:
        if note.kind == "state":
            texts[note.column].append(note.text)
    assert "Stopped" in texts[1] and "gone" in texts[1]
    assert texts[2][:2] == ["restored, Stopped", "resumes"]
    assert "Paused" in texts[0] and any("continues" in text for text in texts[0])
    assert {(span.column, span.kind) for span in found.spans} >= {(0, "paused"), (1, "stopped"), (2, "resuming")}
    assert found.waits  # the 10 ms of the move are cut short


def test_one_trace_alone(lossy: list[Trace]) -> None:
    found = layout(lossy[:1])
    check(found)
    assert found.columns == ["h1", "peer"]
    assert not any(arrow.lost for arrow in found.arrows)  # there is no trace of the other end


def test_windows(lossy: list[Trace]) -> None:
    whole = layout(lossy, begin_ms=0)
    part = layout(lossy, begin_ms=0, end_ms=0.1)
    assert 0 < len(part.arrows) < len(whole.arrows)
    assert part.left_out == sum(arrow.count for arrow in whole.arrows) - sum(arrow.count for arrow in part.arrows)
    with pytest.raises(BadInput, match="no packet in this window"):
        layout(lossy, begin_ms=1e6)


def test_names() -> None:
    ack = {"opcode": "RC_ACKNOWLEDGE", "psn": 7, "code": "NAK_STOPPED"}
    assert (kind_of(ack), label_of(ack)) == ("stopped", "NAK_STOPPED 7")
    rnr = {"opcode": "RC_ACKNOWLEDGE", "psn": 7, "code": "RNR_NAK", "rnr_ms": 0.64}
    assert (kind_of(rnr), label_of(rnr)) == ("nak", "RNR_NAK 0.64 ms 7")
    write = {"opcode": "RC_RDMA_WRITE_LAST_WITH_IMMEDIATE", "psn": 3, "retransmit": True}
    assert (kind_of(write), label_of(write)) == ("retransmission", "WRITE_LAST_IMM 3 again")
    read_response = {"opcode": "RC_RDMA_READ_RESPONSE_ONLY", "psn": 3, "code": "ACK"}
    assert (kind_of(read_response), label_of(read_response)) == ("response", "READ_RESPONSE_ONLY 3")


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_pictures(moved: list[Trace], tmp_path: Path, ending: str) -> None:
    path = draw(layout(moved), tmp_path / f"diagram.{ending}", "A move")
    begin = path.read_bytes()[:400]
    assert b"PNG" in begin if ending == "png" else b"<svg" in begin or b"<?xml" in begin
    if ending == "svg":
        assert "RESUME unanswered" in path.read_text() or path.stat().st_size > 20_000


def test_the_verb(moved: list[Trace], tmp_path: Path) -> None:
    from testbed.cli.main import _app

    words = ["diagram", *(str(trace.path) for trace in moved), "-o", str(tmp_path / "d.png")]
    result = CliRunner().invoke(_app, words)
    assert result.exit_code == 0 and (tmp_path / "d.png").stat().st_size > 10_000
    wrong = CliRunner().invoke(_app, [*words[:-1], str(tmp_path / "d.gif")])
    assert isinstance(wrong.exception, BadInput)
