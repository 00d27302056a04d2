"""An agent's record of migrations. Invariant: one that is over leaves nothing in the agent's state."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from testbed.agent import move_destination
from testbed.agent.channel import Channel
from testbed.agent.service import Agent
from testbed.checkpoint.criu_binary import Criu


class PlayedRestore:
    """A CRIU that waits for its images."""

    def __init__(self, *_: Any) -> None:
        self.aborted = 0

    def abort(self) -> None:
        self.aborted += 1


def test_an_aborted_migration_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(move_destination.criu_binary, "usable", lambda: Criu(("criu",), (4, 2), "test"))
    monkeypatch.setattr(move_destination, "Restore", PlayedRestore)
    agent = Agent("h3", Channel(*os.pipe()), tmp_path, "lo")
    about: dict[str, Any] = {"migration": "m", "app": "server", "argv": ["x"], "env": {}, "policy": 0}
    for _ in range(2):  # a second migration of the same name is possible once the first is over
        move_destination.migrate_prepare(agent, listen="127.0.0.1", **about)
        restore: Any = agent.incoming["m"].restore
        assert len(agent._endings) == 1, "an agent that ends aborts it"
        assert move_destination.migrate_abort(agent, migration="m") == {"aborted": True}
        assert restore.aborted == 1
        assert agent.incoming == {} and agent._endings == []
    assert move_destination.migrate_abort(agent, migration="m") == {"aborted": False}
