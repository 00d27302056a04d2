"""The host that an application leaves, with CRIU and the NIC played by the test.

Invariants: after a commit the original does not run, whatever became of CRIU; a roll-back tries every step, says what
failed, and can be repeated until nothing is left to do.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from testbed.agent import move_source as source
from testbed.agent.operations import OperationError
from testbed.agent.records import App, Outgoing
from testbed.checkpoint.hooks import CriuFailed


class PlayedDump:
    """A checkpoint that is complete. `fails`: what raises."""

    def __init__(self) -> None:
        self.fails = ""
        self.rolled_back = 0

    def commit(self) -> None:
        if self.fails == "commit":
            raise CriuFailed("criu dump: ended with -9")

    def roll_back(self) -> None:
        self.rolled_back += 1


class PlayedNic:
    """Notes its commands; those in `fails` are refused."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.fails: set[str] = set()

    def command(self, name: str, arguments: dict[str, Any], timeout: float) -> dict[str, Any]:
        self.log.append(name)
        if name in self.fails:
            raise OperationError(f"{name}: no answer")
        return {}


class Scene:
    def __init__(self, folder: Path) -> None:
        self.program = subprocess.Popen(["sleep", "30"])
        app = App("server", folder / "app", ["x"], {}, self.program.pid, launcher=self.program)
        (folder / "work").mkdir()
        self.dump, self.nic = PlayedDump(), PlayedNic()
        self.events: list[str] = []
        self.agent: Any = SimpleNamespace(
            apps={"server": app}, outgoing={}, nic=self.nic, root=folder, interface="eth0",
            watch=SimpleNamespace(unwatch=lambda pid: None), event=lambda name, **_: self.events.append(name),
        )  # fmt: skip
        self.move = Outgoing("m", app, folder, dump=self.dump, contexts=["c1"], held=True)  # type: ignore[arg-type]


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    made = Scene(tmp_path)
    made.agent.outgoing["m"] = made.move
    monkeypatch.setattr(source, "running_nic", lambda agent: made.nic)
    yield made
    made.program.kill()
    made.program.wait()


def test_a_criu_that_died_does_not_leave_the_original_running(scene: Scene) -> None:
    scene.dump.fails = "commit"
    answer = source.migrate_commit(scene.agent, migration="m")
    assert scene.program.returncode == -9
    assert any("criu dump" in text for text in answer["problems"])
    assert "discard" in scene.nic.log, "the rest of the clean-up is done"


def test_the_longest_gap_so_far_goes_along(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the NIC knows it now: it is reset to measure the migration."""
    monkeypatch.setattr(source.criu_binary, "find", lambda: ["criu"])
    monkeypatch.setattr(source, "note_gaps", lambda agent, contexts: setattr(scene.move.app, "longest_gap", 0.3))
    monkeypatch.setattr(scene.nic, "command", lambda name, *_: {"contexts": []})
    assert source.migrate_begin(scene.agent, app="server")["longest_gap"] == 0.3


def test_a_roll_back_goes_on_and_can_be_repeated(scene: Scene) -> None:
    scene.move.gid = "10.0.0.2"
    scene.nic.fails = {"address_add"}
    with pytest.raises(OperationError, match="address_add: no answer"):
        source.migrate_rollback(scene.agent, migration="m")
    assert scene.nic.log == ["address_add", "unhold"], "the queue pairs must not stay Stopped"
    scene.nic.fails = set()
    assert source.migrate_rollback(scene.agent, migration="m") == {"rolled_back": True}
    assert scene.nic.log == ["address_add", "unhold", "address_add", "address_add"]
    source.migrate_rollback(scene.agent, migration="m")
    assert len(scene.nic.log) == 4 and scene.dump.rolled_back == 2, "nothing was left to do"
    assert scene.program.poll() is None


def test_what_failed_is_told_although_its_roll_back_fails_too(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    del scene.agent.outgoing["m"]
    monkeypatch.setattr(source.criu_binary, "find", lambda: ["criu"])

    def broken(agent: object, move: Outgoing, *_: object) -> None:
        move.contexts, move.held = ["c1"], True
        scene.nic.fails = {"unhold"}
        raise OperationError("the transfer broke off")

    monkeypatch.setattr(source, "_send", broken)
    with pytest.raises(OperationError, match="the transfer broke off"):
        source.migrate_send(scene.agent, migration="m", app="server", address="100.64.0.3", port=1, token="t")
    with pytest.raises(OperationError, match="unhold"):
        source.migrate_rollback(scene.agent, migration="m")
