"""A NIC that has no descriptor left.

Invariants: it continues; a program that lives keeps its objects, and what was refused can be repeated; a program that
has ended does not.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from softroce_ext.cm.manager import CommunicationManager
from softroce_ext.cm.server import CmFiles
from softroce_ext.device.errors import StateError
from softroce_ext.device.link import Link
from softroce_ext.process.management import Management
from softroce_ext.process.nic import Nic
from softroce_ext.process.user_contexts import UserContexts
from softroce_ext.uverbs.sysfs import SysfsPicture
from tests.support.nic.uverbs_program import IP, Program, Upper


@pytest.fixture
def nic(upper: Upper) -> Nic:
    """One without a port and a loop."""
    made = Nic.__new__(Nic)
    made.adapter, made.engine = upper.adapter, upper.engine
    made.config = SimpleNamespace(interface="eth0")  # type: ignore[assignment]
    watched: dict[int, Callable[[int], None]] = {}
    made.descriptors = SimpleNamespace(  # type: ignore[assignment]
        watch=watched.__setitem__, unwatch=lambda fd: watched.pop(fd, None), watched=watched
    )
    cm = CommunicationManager(upper.adapter, upper.engine.gsi, lambda _: 0, lambda *_: IP, lambda *_: None)
    made.cm_files = CmFiles(upper.run, cm, made.descriptors, lambda: 0.0)
    parts = ("watch_doorbell", "stop_watching_doorbell", "wake", "settle", "last_turn")
    made.loop = SimpleNamespace(**dict.fromkeys(parts, lambda *_: None))  # type: ignore[assignment]
    made.user_contexts = UserContexts(
        upper.adapter,
        made.descriptors,
        loop=made.loop,
        commands=upper.server,
        port=None,  # type: ignore[arg-type]
    )
    return made


def failing(number: int, calls: int = 0) -> Callable[[int], int]:
    """pidfd_open that succeeds `calls` times."""
    real, left = os.pidfd_open, [calls]

    def pidfd_open(pid: int, flags: int = 0) -> int:
        if left[0]:
            left[0] -= 1
            return real(pid, flags)
        raise OSError(number, os.strerror(number))

    return pidfd_open


def unhold(nic: Nic, *names: str) -> dict[str, Any]:
    answers: list[dict[str, Any]] = []
    Management(nic).handle({"command": "unhold", "contexts": list(names), "wait": False}, answers.append)
    return answers[0]


@pytest.mark.parametrize("calls", [0, 1])
def test_programs_that_cannot_be_watched_stay_held(nic: Nic, upper: Upper, monkeypatch: Any, calls: int) -> None:
    """All of them, and none of their objects is lost; with a descriptor they run on."""
    programs = [Program(upper, name) for name in ("open-1", "open-2")]
    contexts = [program.context for program in programs]
    for context in contexts:
        context.held = True
    names = [context.id for context in contexts]
    open_before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "pidfd_open", failing(errno.EMFILE, calls))
        answer = unhold(nic, *names)
    assert not answer["ok"] and os.strerror(errno.EMFILE) in answer["error"]
    assert all(context.held and context.pidfd < 0 for context in contexts)
    assert len(os.listdir("/proc/self/fd")) == open_before
    assert unhold(nic, *names)["ok"]
    assert [context.id for context in upper.adapter.contexts.values() if not context.held] == names
    assert set(nic.descriptors.watched) == {context.pidfd for context in contexts}  # type: ignore[attr-defined]
    for context in contexts:
        nic.user_contexts.stop_watching(context)


def test_an_open_of_rdma_cm_stays_held(nic: Nic, monkeypatch: Any) -> None:
    files = nic.cm_files
    file = files.open("cm-1", os.getpid(), os.getuid(), os.getgid())
    files.hold(file)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pidfd_open", failing(errno.EMFILE))
        assert not unhold(nic, "cm-1")["ok"]
        with pytest.raises(StateError):
            files.unhold(file)
    assert file.held and files.by_id == {"cm-1": file}
    assert unhold(nic, "cm-1")["ok"] and not file.held and files.by_id
    files.hold(file)
    monkeypatch.setattr(os, "pidfd_open", failing(errno.ESRCH))
    assert unhold(nic, "cm-1")["ok"] and not files.by_id


def test_a_program_that_ended_while_it_was_held(nic: Nic, upper: Upper, monkeypatch: Any) -> None:
    context = Program(upper).context
    context.held = True
    monkeypatch.setattr(os, "pidfd_open", failing(errno.ESRCH))
    assert unhold(nic, context.id)["ok"]
    assert upper.adapter.contexts == {}


def test_a_link_that_changes(nic: Nic, upper: Upper, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """Programs are told; only the files are as they were."""
    nic.sysfs = SysfsPicture(tmp_path, upper.adapter, "eth0")
    nic.sysfs.create()
    monkeypatch.setattr(upper.host, "link_changed", nic.link_changed)
    state = nic.sysfs.port / "state"
    before = state.read_text()

    def full(*_: Any, **__: Any) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", full)
        upper.adapter.set_link(Link(True, False, 9000))
    assert upper.adapter.engine.counters["link_downed"] == 1
    assert state.read_text() == before
    assert "eth0" in capsys.readouterr().err
    upper.adapter.set_link(Link(True, True, 9000))
    upper.adapter.set_link(Link(True, False, 9000))
    assert state.read_text() != before
