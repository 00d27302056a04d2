"""Files from agent to agent: what arrives is what was sent, or both sides know why not.

Invariants: after a transfer that succeeded every file, folder and link is equal in content, mode and target; after one
that failed both sides have raised TransferFailed, and the sender's text names the receiver's reason if it had one.
"""

from __future__ import annotations

import errno
import json
import os
import random
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from testbed.agent import transfer
from testbed.agent.transfer import Entry, Received, Receiver, Sender, TransferFailed, below


class Arrival(threading.Thread):
    """`Receiver.receive` in the background."""

    def __init__(self, receiver: Receiver, folders: dict[str, Path], **arguments: Any) -> None:
        super().__init__(daemon=True)
        self.received: Received | None = None
        self.error: TransferFailed | None = None
        self._receive: Callable[[], Received] = lambda: receiver.receive(folders, **arguments)
        self.start()

    def run(self) -> None:
        try:
            self.received = self._receive()
        except TransferFailed as error:
            self.error = error

    def failed(self) -> str:
        self.join(20)
        assert self.error is not None
        return str(self.error)


def tree(folder: Path, seed: int) -> Path:
    """A folder with everything that an application's may hold."""
    source = random.Random(seed)
    (folder / "sub/deep").mkdir(parents=True)
    for name, size in {"empty": 0, "one": 1, "sub/page": 4096, "sub/deep/large": 3_000_001}.items():
        (folder / name).write_bytes(source.randbytes(size))
    (folder / "sub/page").chmod(0o640)
    (folder / "link").symlink_to("sub/page")
    os.mkfifo(folder / "fifo")
    return folder


def look(folder: Path) -> dict[str, Any]:
    """Everything that has to be equal, by name; FIFOs left out."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name, status = str(path.relative_to(folder)), path.lstat()
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_dir():
            found[name] = status.st_mode
        elif path.is_file():
            found[name] = (status.st_mode, path.read_bytes())
    return found


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    """(what is sent, where it is to arrive)."""
    target = tmp_path / "there"
    target.mkdir()
    return tree(tmp_path / "here", 1), target


def send(receiver: Receiver, entries: list[Entry]) -> int:
    return Sender("127.0.0.1", receiver.port, receiver.token).send(entries)


def test_everything_arrives_as_it_was(places: tuple[Path, Path]) -> None:
    here, there = places
    receiver = Receiver("127.0.0.1")
    arrival = Arrival(receiver, {"app": there}, keep=["app/one"])
    sent = send(receiver, below(here, "app"))
    arrival.join(20)
    assert arrival.received is not None
    assert arrival.received.kept == {"app/one": (here / "one").read_bytes()}
    (there / "one").write_bytes(arrival.received.kept["app/one"])
    (there / "one").chmod((here / "one").stat().st_mode)
    assert look(there) == look(here)
    assert sent == arrival.received.size == 3_000_001 + 4096 + 1


def test_a_full_disk_is_told_to_the_sender(places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = places
    real, room = os.write, [100_000]

    def write(descriptor: int, data: Any) -> int:
        if len(data) > room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room[0] -= len(data)
        return real(descriptor, data)

    monkeypatch.setattr(transfer.os, "write", write)
    receiver = Receiver("127.0.0.1")
    arrival = Arrival(receiver, {"app": there})
    with pytest.raises(TransferFailed, match=r"the destination refused: .*large: No space left on device"):
        send(receiver, below(here, "app"))
    assert "No space left on device" in arrival.failed()


@pytest.mark.parametrize("name", ["app/../evil", "elsewhere/file", "app", "/etc/passwd"])
def test_a_name_that_leads_elsewhere_is_refused(places: tuple[Path, Path], name: str) -> None:
    here, there = places
    receiver = Receiver("127.0.0.1")
    arrival = Arrival(receiver, {"app": there})
    with pytest.raises(TransferFailed, match="; allowed: below app"):
        send(receiver, [Entry(name, here / "one")])
    assert f"unexpected name {name!r}; allowed: below app" in arrival.failed()
    assert look(there) == {}


def test_a_stranger_without_the_token_changes_nothing(places: tuple[Path, Path]) -> None:
    here, there = places
    receiver = Receiver("127.0.0.1")
    arrival = Arrival(receiver, {"app": there})
    with pytest.raises(TransferFailed):
        Sender("127.0.0.1", receiver.port, "wrong").send(below(here, "app"))
    with socket.create_connection(("127.0.0.1", receiver.port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert stranger.recv(100) == b""
    send(receiver, below(here, "app"))
    arrival.join(20)
    assert look(there) == look(here)


def test_damage_on_the_way_is_noticed(places: tuple[Path, Path]) -> None:
    _here, there = places
    receiver = Receiver("127.0.0.1")
    arrival = Arrival(receiver, {"app": there})
    head = {"name": "app/x", "kind": "file", "mode": 0o600, "uid": 0, "gid": 0, "size": 4}
    lines = [{"token": receiver.token}, {"entries": 1, "bytes": 4}, head]
    with socket.create_connection(("127.0.0.1", receiver.port)) as sender:
        sender.sendall(b"".join(json.dumps(line).encode() + b"\n" for line in lines) + b"data" + bytes(4))
        assert "damaged" in json.loads(sender.makefile().readline())["error"]
    assert "damaged" in arrival.failed()


@pytest.mark.parametrize("said", [b"", b'{"entries": 2, "bytes": 9}\n', b"[]\n", b"no json\n", b"x" * 200_000])
def test_a_sender_that_breaks_off_or_talks_nonsense(places: tuple[Path, Path], said: bytes) -> None:
    receiver = Receiver("127.0.0.1")
    arrival = Arrival(receiver, {"app": places[1]})
    with socket.create_connection(("127.0.0.1", receiver.port)) as sender:
        sender.sendall(json.dumps({"token": receiver.token}).encode() + b"\n" + said)
    assert "the source" in arrival.failed()


def test_a_receiver_that_is_called_off(places: tuple[Path, Path]) -> None:
    here, there = places
    for connect_first in (False, True):
        receiver = Receiver("127.0.0.1")
        arrival = Arrival(receiver, {"app": there})
        sender = Sender("127.0.0.1", receiver.port, receiver.token) if connect_first else None
        arrival.join(0.2)
        receiver.close()
        arrival.failed()
        if sender is not None:
            with pytest.raises(TransferFailed):
                sender.send(below(here, "app"))


def test_no_receiver() -> None:
    receiver = Receiver("127.0.0.1")
    arrival = Arrival(receiver, {}, timeout=0.1)
    assert "no image arrived within 0.1 s" in arrival.failed()
    with pytest.raises(TransferFailed, match="cannot be reached: Connection refused"):
        Sender("127.0.0.1", receiver.port, receiver.token)


def test_a_file_that_vanishes_is_the_source_s_fault(places: tuple[Path, Path]) -> None:
    here, there = places
    receiver = Receiver("127.0.0.1")
    arrival = Arrival(receiver, {"app": there})
    with pytest.raises(TransferFailed, match="the source cannot read"):
        send(receiver, [Entry("app/gone", here / "gone")])
    receiver.close()
    arrival.failed()
