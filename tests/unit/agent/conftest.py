"""The fixture `agent`: a running agent on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed.lab.hosts import Host
from tests.unit.agent.local_agent import LocalTransport, agent_argv


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[tuple[Host, LocalTransport, list[dict[str, object]]]]:
    """(host, its transport, the events so far) of a running agent."""
    transport = LocalTransport(agent_argv(tmp_path))
    events: list[dict[str, object]] = []
    host = Host("h1", transport, lambda _name, event: events.append(dict(event)))
    host.ready(60)
    yield host, transport, events
    host.close()
