"""CRIU's log as records: what failed is known by errno, and a message is for people only."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from testbed.agent import move_destination
from testbed.agent.operations import OperationError
from testbed.agent.records import Incoming
from testbed.checkpoint import criu_log
from testbed.checkpoint.hooks import CriuFailed

LOG = """\
(00.012) Warn  (criu/sk-inet.c:100): something
(00.100)     77: Error (criu/sk-inet.c:1019): inet: Can't bind inet socket (id 5): Cannot assign requested address
(00.101) Error (criu/cr-restore.c:1512): 77 exited, status=1
(00.102) Error (criu/cr-restore.c:2557): Restoring FAILED.
"""


def test_errors_have_a_place_and_a_number(tmp_path: Path) -> None:
    (tmp_path / "log").write_text(LOG)
    bind, exited = criu_log.errors(tmp_path / "log")
    assert (bind.place, bind.number) == ("criu/sk-inet.c:1019", errno.EADDRNOTAVAIL)
    assert (exited.text, exited.number) == ("77 exited, status=1", None)
    assert criu_log.errors(tmp_path / "no such log") == ()


class PlayedRestore:
    """A CRIU whose restore fails as the log says."""

    def __init__(self, log: Path) -> None:
        self._log = log

    def begin(self, inventory: bytes) -> None: ...

    def wait_restored(self) -> None:
        raise CriuFailed("criu restore: it failed", criu_log.errors(self._log))


@pytest.mark.parametrize(("add", "hinted"), [(None, True), ("10.0.0.2", False)])
def test_a_missing_address_is_hinted_by_errno(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, add: str | None, hinted: bool
) -> None:
    """The hint does not depend on the sentence, and is given only where the address did not move along."""
    (tmp_path / "log").write_text(LOG)
    first = f"images/{move_destination.FIRST_IMAGE}"
    receiver: Any = SimpleNamespace(receive=lambda *_, **__: SimpleNamespace(kept={first: b""}))
    move = Incoming("m", "server", [], {}, 0, tmp_path, receiver, restore=PlayedRestore(tmp_path / "log"))  # type: ignore[arg-type]
    agent: Any = SimpleNamespace(
        incoming={"m": move}, nic=None, apps_directory=tmp_path, event=lambda *_, **__: None, host="h3"
    )
    monkeypatch.setattr(move_destination.inventory, "nothing_locked", lambda image: image)
    with pytest.raises(OperationError, match="it failed") as caught:
        move_destination.migrate_receive(agent, migration="m", addresses_moved={}, add_address=add)
    assert (caught.value.hint == move_destination.ADDRESS_STAYED) is hinted
