"""The trace of the transport in a simulated world: every frame has its line; without a trace the engine is as new."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from softroce_ext.simulation.hosts import BASE, Host, connect, end
from softroce_ext.simulation.link import Link
from softroce_ext.simulation.world import World
from softroce_ext.trace.packets import code_name, describe
from softroce_ext.trace.queue_pairs import QpTrace
from softroce_ext.transport.engine import Engine
from softroce_ext.transport.verbs import WrOpcode
from softroce_ext.wire.opcodes import name_of
from tests.support.transport.scene import Scene


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def packets(path: Path, direction: str) -> list[dict[str, Any]]:
    return [line for line in lines(path) if line["event"] == "packet" and line["direction"] == direction]


def test_every_frame_has_its_line_at_both_ends(tmp_path: Path) -> None:
    scene = Scene(Link(seed=3, loss=0.05, spacing=1e-6))
    world = scene.world
    traces = [
        QpTrace(host.engine, str(tmp_path / f"{host.number}.jsonl"), clock=lambda: world.now)
        for host in scene.hosts[:2]
    ]
    scene.finish()
    for trace in traces:
        trace.close()
    sent = [*packets(tmp_path / "1.jsonl", "sent"), *packets(tmp_path / "2.jsonl", "sent")]
    told = sorted((line["opcode"], line["psn"]) for line in sent)
    assert told == sorted((name_of(frame[42]), int.from_bytes(frame[51:54])) for _, frame in world.trace)
    again = sum(line.get("retransmit", False) for line in sent)
    assert again == scene.total("retransmits") > 0
    received = len(packets(tmp_path / "1.jsonl", "received")) + len(packets(tmp_path / "2.jsonl", "received"))
    assert received == scene.total("rcvd_pkts") < len(sent)


def test_completions_posts_and_timers(tmp_path: Path) -> None:
    here, there = end(Host(1), 17), end(Host(2), 18)
    file = tmp_path / "trace.jsonl"
    world = World(here.host, there.host, link=Link(loss=1.0))
    trace = QpTrace(here.host.engine, str(file), clock=lambda: world.now)
    connect(here, there, timeout=14, retry_cnt=1)
    here.post(WrOpcode.SEND, 5, BASE, 8)
    world.run(lambda: bool(here.scq.entries))
    assert trace.close() == len(lines(file))
    story = [(line["event"], line.get("timer") or line.get("status") or line.get("state")) for line in lines(file)[1:]]
    assert story == [
        ("state", "RESET"),
        ("state", "RTS"),
        ("post", None),
        ("packet", None),
        ("timer", "ack"),
        ("packet", None),
        ("timer", "ack"),
        ("completion", "RETRY_EXC_ERR"),
        ("state", "ERR"),
    ]
    post, completion = lines(file)[3], lines(file)[8]
    assert (post["side"], post["wr_id"], post["opcode"], post["length"], post["flags"]) == (
        "send", 5, "SEND", 8, ["SIGNALED"],
    )  # fmt: skip
    assert (completion["side"], completion["wr_id"], completion["opcode"]) == ("send", 5, "SEND")


def test_stop_pause_and_resume_are_told(tmp_path: Path) -> None:
    here, there = end(Host(1), 17), end(Host(2), 18)
    connect(here, there)
    world = World(here.host, there.host)
    file = tmp_path / "trace.jsonl"
    trace = QpTrace(here.host.engine, str(file), clock=lambda: world.now)
    there.receive(1, BASE, 64)
    there.receive(2, BASE, 64)
    here.post(WrOpcode.SEND, 1, BASE, 8)
    world.settle(0.1)
    there.qp.stop()
    here.post(WrOpcode.SEND, 2, BASE, 8)
    world.settle(0.1)
    there.qp.resume()
    world.run(lambda: len(here.scq.entries) == 2)
    trace.close()
    codes = [line["code"] for line in packets(file, "received") if "code" in line]
    assert codes == ["ACK", "NAK_STOPPED", "ACK", "ACK"]
    assert [line["paused"] for line in lines(file) if line["event"] == "state"] == [False, True, False]
    resumed = [line for line in packets(file, "sent") if line.get("resumed")]
    assert [line["opcode"] for line in resumed] == ["RC_ACKNOWLEDGE"]


def test_only_the_queue_pairs_that_were_asked_for(tmp_path: Path) -> None:
    first, second = Host(1), Host(2)
    a, b, c, d = end(first, 17), end(second, 18), end(first, 19), end(second, 20)
    connect(a, b)
    connect(c, d)
    world = World(first, second)
    file = tmp_path / "trace.jsonl"
    trace = QpTrace(first.engine, str(file), [19], clock=lambda: world.now)
    for here in (a, c):
        here.post(WrOpcode.RDMA_WRITE, 1, BASE, 3000)
    world.run(lambda: bool(a.scq.entries and c.scq.entries))
    trace.close()
    assert {line["qpn"] for line in lines(file)[1:]} == {19}
    assert lines(file)[0]["qpns"] == [19]
    assert len(packets(file, "sent")) == 3


def test_an_engine_after_the_trace_is_as_before(tmp_path: Path) -> None:
    here, there = end(Host(1), 17), end(Host(2), 18)
    connect(here, there)
    engine, queues = here.host.engine, (here.qp.send_queue, here.qp.receive_queue)
    before = set(vars(engine))
    trace = QpTrace(engine, str(tmp_path / "trace.jsonl"))
    assert engine.observer is trace
    trace.close()
    assert engine.observer is None
    assert set(vars(engine)) == before == set(vars(Engine()))
    assert (here.qp.send_queue, here.qp.receive_queue) == queues
    assert trace.close() == trace.lines  # once more does no harm


def test_a_trace_ends_by_itself_at_its_limit(tmp_path: Path) -> None:
    here, there = end(Host(1), 17), end(Host(2), 18)
    connect(here, there)
    world = World(here.host, there.host)
    file = tmp_path / "trace.jsonl"
    QpTrace(here.host.engine, str(file), limit=10)
    here.post(WrOpcode.RDMA_WRITE, 1, BASE, 30000)
    world.run(lambda: bool(here.scq.entries))
    assert lines(file)[-1]["event"] == "limit" and len(lines(file)) == 11
    assert here.host.engine.observer is None


def test_what_is_refused_is_told(tmp_path: Path) -> None:
    here, there = end(Host(1), 17), end(Host(2), 18)
    connect(here, there)
    world = World(here.host, there.host)
    here.post(WrOpcode.RDMA_WRITE, 1, BASE, 8)
    frame = bytearray(here.host.pull(world.now)[0])
    file = tmp_path / "trace.jsonl"
    trace = QpTrace(there.host.engine, str(file))
    engine = there.host.engine
    engine.receive(memoryview(frame), 0.0)
    engine.receive(memoryview(frame), 0.0)  # once more
    frame[-1] ^= 1
    engine.receive(memoryview(frame), 0.0)
    trace.close()
    told = lines(file)
    assert [line.get("counted") for line in told if line["event"] == "packet"] == [None, ["duplicate_request"]]
    assert [line["reason"] for line in told if line["event"] == "refused"] == ["icrc"]


@pytest.mark.parametrize(
    ("syndrome", "name"),
    [(0x1F, "ACK"), (0x2C, "RNR_NAK"), (0x60, "NAK_PSN_SEQUENCE"), (0x65, "NAK_STOPPED"), (0x7F, "NAK_0x7f")],
)
def test_names_of_syndromes(syndrome: int, name: str) -> None:
    assert code_name(syndrome) == name


def test_fields_of_headers() -> None:
    reth = bytes.fromhex("0a00ffff 00000012 c0000007 0000000000001000 00000055 00000040")
    assert describe(reth) == {
        "opcode": "RC_RDMA_WRITE_ONLY", "psn": 7, "remote_qpn": 0x12, "ackreq": True, "capable": True,
        "address": 0x1000, "rkey": 0x55, "dma_length": 64,
    }  # fmt: skip
    aeth = bytes.fromhex("1100ffff 00000012 20000007 2c000003")
    assert describe(aeth) == {
        "opcode": "RC_ACKNOWLEDGE", "psn": 7, "remote_qpn": 0x12, "resumed": True,
        "syndrome": 0x2C, "code": "RNR_NAK", "msn": 3, "rnr_ms": 0.64,
    }  # fmt: skip
