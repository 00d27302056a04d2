"""A whole run with two programs and migrations, and what is true of one that went well."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from testbed.lab.session import Session
from testbed.record.summary import PHASES, Summary
from testbed.run.runner import Options, run
from testbed.topology import load, resolve


def topology(folder: Path, server: str, client: str, *migrations: str) -> Path:
    """A file with three hosts at one switch and two programs."""
    text = textwrap.dedent(
        f"""\
        name: moved
        hosts: {{h1: {{ip: 10.0.0.1}}, h2: {{ip: 10.0.0.2}}, h3: {{}}}}
        switches: [s1]
        links: [[h1, s1], [h2, s1], [h3, s1]]
        apps:
          server: {{host: h2, command: "{server}", timeout: 150s}}
          client: {{host: h1, command: "{client} {{server.ip}}", after: server, timeout: 150s}}
        """
    )
    if migrations:
        text += "migrations:\n" + "".join(f"  - {{{line}}}\n" for line in migrations)
    path = folder / "moved.yaml"
    path.write_text(text)
    return path


def run_moves(path: Path, folder: Path, meanwhile: Callable[[Session], Any] | None = None) -> Summary:
    """Run a topology with its results below `folder`."""
    return run(resolve(load(path)), Options(root=folder / "results", meanwhile=meanwhile))


def ended_well(summary: Summary) -> None:
    """Both programs did, and no data was damaged."""
    assert {app.name: app.exit_code for app in summary.apps} == {"server": 0, "client": 0}, summary.to_json()
    assert all(app.ok for app in summary.apps)


def succeeded(summary: Summary, qps: int | None = None, reliable: bool = True) -> None:
    """Every migration did. qps: of the program that moves (None: some); reliable: of RC, whose partners are told."""
    ended_well(summary)
    assert summary.ok, summary.to_json()
    for record in summary.migrations:
        assert record.ok and not record.rolled_back and record.error is None
        assert list(record.phases_ms) == list(PHASES)
        assert record.app_exit_code == 0
        assert record.blackout_ms is not None and record.blackout_ms > 0
        assert record.image_bytes and record.nic_image_bytes
        assert record.qps == qps if qps is not None else record.qps
        assert not reliable or (record.resumes and record.resumes >= (qps or 1))
