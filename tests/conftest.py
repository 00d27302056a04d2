"""For all tests: in CI nothing is skipped silently, and system tests say plainly that they need root."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import settings

# In CI the same examples every time: a change is judged, not the luck of the day. Elsewhere new ones are looked for.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

SYSTEM = Path(__file__).parent / "system"
KERNEL = "kernel: "
"""A skip whose reason begins so is about what the running kernel has, which no installation can change."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything under tests/system is a system test, without each file saying so."""
    for item in items:
        if SYSTEM in item.path.parents:
            item.add_marker(pytest.mark.system)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI a skipped test is a failed one: there, `./bootstrap` has installed everything that a test may need."""
    report = yield
    if report.skipped and os.environ.get("CI") and not hasattr(report, "wasxfail"):
        reason = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not reason.removeprefix("Skipped: ").startswith(KERNEL):
            report.outcome = "failed"
            report.longrepr = f"skipped in CI, where nothing may be missing: {reason}"
    return report


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Without root a system test cannot begin."""
    if item.get_closest_marker("system") is not None and os.geteuid() != 0:
        pytest.skip("needs root: sudo .venv/bin/python -m pytest tests/system")
