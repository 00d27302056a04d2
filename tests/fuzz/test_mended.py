"""Invariant: what reading and fuzzing found stays mended; each test is one hostile deed that once worked."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fuzz_commands import descriptors, upper
from fuzz_rings import install_guard
from uverbs_program import Program, Upper

from softroce_ext.control import ControlServer
from softroce_ext.device.queue_pair import Destination
from softroce_ext.simulation.world import Host, end
from softroce_ext.uverbs import channel, server
from softroce_ext.uverbs.abi import Command


@pytest.fixture
def nic() -> Iterator[Upper]:
    with upper() as made:
        yield made


def create_channel(program: Program) -> int:
    return program.raw(struct.pack("<IHHQ", Command.CREATE_COMP_CHANNEL, 4, 1, 0x1000))[0]


def test_a_fifo_swapped_for_a_link(nic: Upper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program owns the folder: a link put where the FIFO was made must not give it another file."""
    program = Program(nic)
    program.objects()
    victim = tmp_path / "victim"
    victim.write_text("precious")
    real = os.mkfifo

    def swapped(path: Any, mode: int = 0o666) -> None:
        real(path, mode)
        os.unlink(path)
        os.symlink(victim, path)

    monkeypatch.setattr(channel.os, "mkfifo", swapped)
    before = os.stat(victim)
    assert create_channel(program) == errno.ELOOP
    assert os.stat(victim) == before and victim.read_text() == "precious"


def test_a_folder_moved_away_and_a_link_in_its_place(nic: Upper, tmp_path: Path) -> None:
    """The NIC goes on in the folder that it made."""
    program = Program(nic)
    program.objects()
    moved = tmp_path / "elsewhere"
    target = tmp_path / "target"
    target.mkdir()
    (target / "async").write_text("precious")
    os.rename(program.directory, moved) if os.stat(tmp_path).st_dev == os.stat(program.directory).st_dev else os.rename(
        program.directory, nic.run / "ctx" / "elsewhere"
    )
    program.directory.symlink_to(target)
    assert create_channel(program) == 0
    nic.adapter.forget(program.context)
    assert [path.name for path in target.iterdir()] == ["async"]
    assert (target / "async").read_text() == "precious"


def test_one_process_cannot_take_every_descriptor(nic: Upper, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_CONTEXTS", 4)
    for number in range(4):
        Program(nic, f"open-{number}")
    with pytest.raises(FileNotFoundError):
        Program(nic, "open-5")  # no context, hence no folder
    assert len(nic.adapter.contexts) == 4 and nic.engine.counters["refused_open"] == 1


def test_commands_that_wait_are_one_for_each_context(nic: Upper) -> None:
    """Each look for a neighbour costs system calls: a flood of them would starve everybody."""
    nic.adapter.addressing.resolve = lambda _: None
    program = Program(nic)
    made = program.objects()
    address = Destination(bytes(10) + b"\xff\xff\n\0\0\x09", sgid_index=1, is_global=1, port_num=1).pack()
    start = {"qp_state": 1, "pkey_index": 0, "port_num": 1, "qp_access_flags": 0}
    nic.adapter.modify_queue_pair(program.context.objects[made["qp"]], start)
    body = address.ljust(64, b"\0") + struct.pack("<IIIIIIIHH", made["qp"], 0x121181, *[0] * 7)
    body += bytes([2, 2, 3, 0, 0, 0, 1, 12, 1, 0, 0, 0, 0, 0, 0, 0])
    for _ in range(20):
        program.send(2, program.id.encode(), struct.pack("<IHH", Command.MODIFY_QP, 30, 0) + body)
    assert len(nic.server._waiting) == 1
    assert nic.engine.counters["refused_datagram_busy"] == 19


def test_events_that_the_program_forged_itself(nic: Upper) -> None:
    """More unread events than were sent, and half a record: the object is destroyed, and none counts as reported."""
    program = Program(nic)
    made = program.objects()
    (fifo,) = program.context.comp_channels.values()
    writer = os.open(program.directory / fifo.fifo.name, os.O_RDWR | os.O_NONBLOCK)
    os.write(writer, struct.pack("<Q", 0xC0) * 100 + b"abc")
    program.call(Command.DESTROY_QP, struct.pack("<II", made["qp"], 0), 4)
    assert program.call(Command.DESTROY_CQ, struct.pack("<II", made["cq"], 0), 8) == bytes(8)
    os.close(writer)


def test_a_queue_file_that_was_cut_while_a_ring_is_made(nic: Upper, monkeypatch: pytest.MonkeyPatch) -> None:
    install_guard()
    program = Program(nic)
    program.objects()
    real = os.posix_fallocate

    def cut(fd: int, offset: int, size: int) -> None:
        real(fd, offset, size)
        os.ftruncate(fd, offset)

    monkeypatch.setattr(channel.os, "posix_fallocate", cut)
    body = struct.pack("<QIIiI", 1, 10, 0, -1, 0)
    program.call(Command.CREATE_CQ, body, 24)  # its queue is lost to it, as it wished
    monkeypatch.undo()
    os.ftruncate(program.queues, channel.FILE_BYTES)
    program.call(Command.CREATE_CQ, body, 24)


def test_timers_that_never_come_are_forgotten() -> None:
    """Reset and begin again, with a long timeout and a short one: each time an entry for hours later stayed."""
    host = Host(1)
    here = end(host, 17)
    for number in range(10_000):
        here.qp.heap_at = None
        host.engine.push_timer(1e4 + number, here.qp)
    assert len(host.engine._timers) <= 70


@pytest.mark.parametrize("line", [b"[" * 100_000, b'{"command": []}', b"\xff\xfe", b"1" * 10_000, b"{" * 50_000])
def test_control_lines_that_are_no_requests(tmp_path: Path, line: bytes) -> None:
    """An error each; the connection and the NIC go on."""
    watched: dict[int, Any] = {}
    control = ControlServer(
        tmp_path / "control.sock",
        lambda _, respond: respond({"ok": True}),
        watched.__setitem__,
        watched.pop,
        lambda _: None,
    )
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(5)
    client.connect(str(tmp_path / "control.sock"))
    next(iter(watched.values()))(1)
    callback = list(watched.values())[-1]
    data = line + b"\n"
    while data:
        data = data[client.send(data[:60_000]) :]
        callback(1)
    assert b'"ok": false' in client.recv(65536)
    client.send(b'{"command": "x"}\n')
    callback(1)
    assert b'"ok": true' in client.recv(65536)
    client.close()
    control.close()


def test_a_full_tmpfs(nic: Upper, monkeypatch: pytest.MonkeyPatch) -> None:
    """An errno for what is new, no descriptor and no file left of it, and all is well when there is room again."""
    program = Program(nic)
    program.objects()
    before = descriptors()

    def full(fd: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(channel.os, "posix_fallocate", full)
    body = struct.pack("<QIIiI", 1, 10, 0, -1, 0)
    program.call(Command.CREATE_CQ, body, 24, errno.ENOMEM)
    with pytest.raises(OSError):
        Program(nic, "open-9")
    (nic.run / "ctx" / "open-9").unlink(missing_ok=True)
    assert list(nic.adapter.contexts) == [program.id]
    assert [path.name for path in (nic.run / "ctx").iterdir()] == [program.id]
    monkeypatch.undo()
    program.call(Command.CREATE_CQ, body, 24)
    assert descriptors() == before + 1 or descriptors() == before, "the failed program's own socket at most"
    assert Program(nic, "open-10").error == 0


def test_a_fifo_of_somebody_else(nic: Upper, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user cannot have the NIC answer his open into the FIFO in which a program waits for its own."""
    fifo = nic.run / "ctx" / "open-1"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    monkeypatch.setattr(server.os, "geteuid", lambda: 54321)
    nic.server._open(b"open-1", os.getpid(), 12345, 12345, nic.server._new_context)
    assert nic.engine.counters["refused_open"] == 1 and not nic.adapter.contexts
    assert os.read(reader, 64) == b""
    os.close(reader)
