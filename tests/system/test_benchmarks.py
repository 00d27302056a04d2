"""The benchmarks run and say what they promise. Not how fast: that is theirs to say, on a quiet machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent


def benchmark(name: str, *options: str) -> dict[str, Any]:
    answer = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / name), "--json", *options],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    result: dict[str, Any] = json.loads(answer.stdout)
    return result


@pytest.mark.system
def test_throughput() -> None:
    result = benchmark("throughput.py", "--pairs", "1", "--seconds", "1")
    assert result["n"] == 1 and "-s 1048576 -m 4096" in result["command"]
    (rdma,), (tcp,) = result["ib_write_bw_gbit_per_s"], result["iperf3_gbit_per_s"]
    assert rdma > 0 and tcp > 0
    assert result["ratio_to_iperf3"] == pytest.approx(rdma / tcp)


@pytest.mark.system
def test_latency() -> None:
    result = benchmark("latency.py", "--pairs", "1", "--iterations", "100")
    (rdma,), (half_ping,) = result["ib_send_lat_us"], result["half_ping_us"]
    assert rdma > 0 and half_ping > 0
    assert result["ratio_to_ping"] == pytest.approx(rdma / half_ping)


@pytest.mark.system
@pytest.mark.parametrize("name", ["throughput.py", "latency.py"])
def test_without_root_it_says_so(name: str) -> None:
    """By blame, with exit code 3 and no traceback."""
    answer = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / name)],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
        user=65534,
        group=65534,
        env={**os.environ, "HOME": "/tmp"},
    )
    assert answer.returncode == 3, answer.stderr
    assert "root" in answer.stderr and "Traceback" not in answer.stderr
