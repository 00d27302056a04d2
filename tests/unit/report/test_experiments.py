"""Experiments: data and pictures from given runs, without running anything; the topologies they write are valid."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from testbed.record.folder import load_summary
from testbed.topology import parse, resolve

ROOT = Path(__file__).parent.parent.parent.parent
SUMMARY = Path(__file__).parent / "migrated.json"


def script(name: str) -> ModuleType:
    path = ROOT / name
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def migration_latency() -> ModuleType:
    return script("experiments/migration_latency.py")


@pytest.fixture(scope="module")
def overhead() -> ModuleType:
    return script("experiments/overhead.py")


@pytest.mark.parametrize("quick", [True, False])
def test_every_point_is_a_valid_topology(migration_latency: ModuleType, quick: bool) -> None:
    points = list(migration_latency.points(quick))
    assert len({(point.size, point.qps) for point in points}) == len(points) >= 3, "no point twice"
    for point in points:
        resolved = resolve(parse(yaml.safe_dump(migration_latency.topology(point))))
        assert resolved.apps["server"].argv[0] == "ib_write_bw" and len(resolved.migrations) == 1


def test_migration_latency_writes_what_it_measured(migration_latency: ModuleType, tmp_path: Path) -> None:
    measured = list(migration_latency.points(True))
    for number, point in enumerate(measured):
        for blackout in (100.0, 300.0, 200.0):
            summary = load_summary(SUMMARY)
            summary.migrations[0].blackout_ms = blackout + number
            point.runs.append(summary)
    migration_latency.write(tmp_path, measured)
    report = json.loads((tmp_path / "migration_latency.json").read_text())
    assert [row["blackout_ms"]["median"] for row in report] == [200.0 + i for i in range(len(measured))]
    assert all(row["n"] == 3 and row["phases_ms"]["freeze"]["median"] == 38.4 for row in report)
    with (tmp_path / "migration_latency.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * len(measured)
    assert rows[0]["blackout_ms"] == "100.0" and rows[0]["commit_ms"] == "33.9"
    pictures = migration_latency.draw(tmp_path, measured)
    assert [path.name for path in pictures] == ["message_size.png", "queue_pairs.png", "phases.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)


def test_overhead_pairs_what_was_measured_together(overhead: ModuleType, tmp_path: Path) -> None:
    """Drift that both sides share must not widen the ratio's interval."""
    labels = [test.label for test in overhead.tests(True)]
    without = [100.0, 150.0, 200.0, 250.0, 300.0]
    samples = {label: {"with": [value * 1.02 for value in without], "without": without} for label in labels}
    found = overhead.write(tmp_path, samples, True)
    assert all(ratio.low == pytest.approx(1.02) and ratio.high == pytest.approx(1.02) for ratio in found.values())
    report = json.loads((tmp_path / "overhead.json").read_text())
    assert report["ib_send_lat 64 B"]["more_is_better"] is False
    assert report["ib_write_bw 1 MiB"]["more_is_better"] is True
    assert report["ib_write_bw 1 MiB"]["ratio"]["n"] == 5
    rows = (tmp_path / "overhead.csv").read_text().splitlines()
    assert len(rows) == 1 + 5 * len(labels)


def test_overhead_runs_both_sides_first_in_turn(overhead: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[str, str]] = []

    def once(_bench: object, test: object, hosts: tuple[str, str]) -> float:
        order.append(hosts)
        return 1.0

    monkeypatch.setattr(overhead, "once", once)
    overhead.measure(None, 2, True, {})
    tests = len(overhead.tests(True))
    first_round, second_round = order[: 2 * tests], order[2 * tests :]
    assert first_round == [overhead.WITH, overhead.WITHOUT] * tests
    assert second_round == [overhead.WITHOUT, overhead.WITH] * tests


def test_stock_side_of_overhead_does_not_speak_migros(overhead: ModuleType) -> None:
    resolved = resolve(parse(yaml.safe_dump(overhead.one_switch("overhead", overhead.HOSTS))))
    speaks = {name: host.nic.migros for name, host in resolved.hosts.items()}
    assert [speaks[name] for name in (*overhead.WITH, *overhead.WITHOUT)] == [True, True, False, False]
