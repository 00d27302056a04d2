"""Invariant: what reading and fuzzing have found stays fixed; each test is one hostile deed that once worked."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import resource
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from softroce_ext.cm.ids import PS_UDP, Endpoint
from softroce_ext.cm.manager import NEVER
from softroce_ext.cm.routing import Memberships
from softroce_ext.cm.server import CmFiles
from softroce_ext.control.server import ControlServer
from softroce_ext.device.address_handle import Destination
from softroce_ext.port.capture import Capture
from softroce_ext.simulation.hosts import Host, end
from softroce_ext.trace.commands import CommandTrace
from softroce_ext.uverbs import channel, commands, server
from softroce_ext.uverbs.abi import Command
from tests.fuzz import fuzz_cm
from tests.fuzz.fuzz_commands import descriptors, upper
from tests.support.fuzz.rounds import Tally, watchdog
from tests.support.fuzz.scribbler import install_guard
from tests.support.nic.uverbs_program import Program, Upper


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
    """The NIC continues in the folder that it made."""
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


def test_management_without_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs had taken them all: a client that waited kept the NIC's loop busy."""
    watched: dict[int, Any] = {}
    waits: list[Any] = []
    path = tmp_path / "control.sock"
    control = ControlServer(path, lambda _, respond: respond({}), watched.__setitem__, watched.pop, waits.append)
    (listener,) = watched
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(path))
    resource.setrlimit(resource.RLIMIT_NOFILE, (client.fileno() + 1, hard))
    fillers = []
    try:
        with contextlib.suppress(OSError):
            while True:
                fillers.append(os.open("/dev/null", os.O_RDONLY))
        watched[listener](1)
        assert not watched and len(waits) == 1 and not waits[0](0.0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for filler in fillers:
            os.close(filler)
    assert waits[0](0.0) and len(watched) == 2
    control.close()
    client.close()


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


def test_traces_and_captures_on_a_full_disk(tmp_path: Path) -> None:
    """A program can fill the tmpfs in which they lie; the NIC must not end for that."""
    trace = CommandTrace("/dev/full")
    for _ in range(3):
        trace.write("1-0 QUERY_DEVICE in=16 error=0")
    trace.close()
    capture = Capture(str(tmp_path / "pcap"))
    (tmp_path / "pcap").unlink()
    capture._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    for _ in range(3):
        capture.write([memoryview(bytes(60))])
        capture.flush()
    capture.close()


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


# -- what one program could make the NIC do for so long that everybody's connections end ------------------------------

PATIENCE = 5.0
"""Seconds; each of these takes less than a tenth of it now, and took many times as much."""


def test_many_queues_go_in_any_order() -> None:
    """A program with 6000 queue pairs that died kept the NIC busy for 25 s: every hole moved all the others."""
    space = channel.FileSpace()
    offsets = [space.take(4096) for _ in range(20_000)]
    with watchdog(PATIENCE):
        for offset in offsets[::2] + offsets[:0:-2]:
            space.give_back(offset, 4096)
    assert space.take(4096 * len(offsets)) == offsets[0], "the holes were not joined"


def test_many_groups_of_one_queue_pair(nic: Upper, monkeypatch: pytest.MonkeyPatch) -> None:
    """8000 groups: each that came or went had all of them gone through."""
    told: dict[bytes, bool] = {}
    monkeypatch.setattr(nic.adapter.groups, "_changed", told.__setitem__)
    program = Program(nic)
    made = program.objects()
    qp = struct.pack("<QIIIIIIIIIBBBx", 1, made["pd"], made["cq"], made["cq"], 0, 1, 1, 1, 1, 0, 0, 4, 0)
    (handle,) = struct.unpack_from("<I", program.call(Command.CREATE_QP, qp, 64))
    with watchdog(2 * PATIENCE):
        for number in range(8000):
            group = bytes(10) + b"\xff\xff\xef\2" + number.to_bytes(2, "big")
            program.call(Command.ATTACH_MCAST, group + struct.pack("<IHxx", handle, 0) + bytes(8))
        nic.adapter.forget(program.context)
    assert len(told) == 8000 and not any(told.values()) and not nic.engine.multicast


def test_many_ids_events_and_groups_of_rdma_cm() -> None:
    """8000 of each took 25 s to free when their program died."""
    scene = fuzz_cm.Scene(random.Random(1), Tally("cm", 1))
    cm, queue = scene.cm, scene.files[0].queue
    cm_id = cm.create(queue, 1, PS_UDP, 4)
    cm.addresses.bind(cm_id, Endpoint(fuzz_cm.HERE, 4000))
    with watchdog(PATIENCE):
        for number in range(8000):
            cm.create(queue, 1, PS_UDP, 4)
            cm.groups.join(cm_id, 1, Endpoint(b"\xef\1" + number.to_bytes(2, "big")))
        cm.close(queue, 1.0)
    assert len(scene.groups) == 16_000 and not cm.ids and not cm.groups.by_handle


def test_many_ids_that_wait_for_neighbours() -> None:
    """Each poll asked the kernel for all of them; now for some, in turn, and every one gets its answer."""
    scene = fuzz_cm.Scene(random.Random(1), Tally("cm", 1))
    cm, queue = scene.cm, scene.files[0].queue
    asked: list[bytes] = []
    scene.adapter.addressing.resolve = asked.append
    ids = [cm.create(queue, 1, PS_UDP, 4) for _ in range(1000)]
    for number, cm_id in enumerate(ids):
        cm.addresses.bind(cm_id, Endpoint(fuzz_cm.HERE, 0))
        cm.resolve_addr(cm_id, None, Endpoint(b"\n\1" + number.to_bytes(2, "big")), 2.0, 1.0)
    assert len(asked) == 1000
    cm.on_timer(1.5)
    assert len(asked) <= 1100
    for turn in range(20):
        cm.on_timer(3.0 + turn)
    assert len(queue.events) == 1000 and cm.next_deadline == NEVER


def test_groups_do_not_take_a_descriptor_each() -> None:
    """One program could join so many that no other could open the device."""
    memberships = Memberships(socket.if_nametoindex("lo"))
    before = descriptors()
    addresses = [b"\xef\1\1" + bytes([number]) for number in range(100)]
    for address in addresses:
        memberships(address, True)
    assert descriptors() - before == 100 // Memberships.SHARED
    for address in addresses[::-1]:
        memberships(address, False)
    assert descriptors() == before


def test_completion_channels_of_a_program_with_many_descriptors(nic: Upper, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that it closed are looked for among its descriptors; not for each new one, and other files are let be."""
    program = Program(nic)
    program.objects()
    looks: list[str] = []
    stats: list[str] = []
    real, real_stat = os.scandir, os.stat
    monkeypatch.setattr(commands.os, "scandir", lambda path: looks.append(path) or real(path))
    monkeypatch.setattr(commands.os, "stat", lambda path, **more: stats.append(path) or real_stat(path, **more))
    held = []
    for _ in range(200):
        _, _, name = program.raw(struct.pack("<IHHQ", Command.CREATE_COMP_CHANNEL, 4, 1, 0x1000))
        held.append(os.open(program.directory / name, os.O_RDONLY | os.O_NONBLOCK))
    assert len(looks) <= 5
    assert len(program.context.comp_channels) == 201, "one that is open was taken away"
    assert len([path for path in stats if isinstance(path, str)]) < 3 * 201, "files that are no channels were asked"
    for descriptor in held:
        os.close(descriptor)


def test_folders_with_the_names_of_the_next_opens(nic: Upper, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(1000):
        (nic.run / "ctx" / f"1-{number}").mkdir()
    looks: list[Path] = []
    real = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: looks.append(path) or real(path))
    assert Program(nic).error == 0
    assert len(looks) < 15


def test_commands_that_take_long_get_turns(nic: Upper) -> None:
    """Frames come between them, however many wait."""
    program = Program(nic)
    sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    for _ in range(5):
        sender.sendto(b"x", str(nic.server.path))
    assert [nic.server.serve(16, seconds=0.0) for _ in range(6)] == [1, 1, 1, 1, 1, 0]
    assert nic.server.serve() == 0 and program.error == 0
    sender.close()


def test_an_open_of_rdma_cm_without_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder and the descriptors of an open that failed half-way stayed."""
    (tmp_path / "ctx").mkdir()
    cm = fuzz_cm.Scene(random.Random(1), Tally("cm", 1)).cm
    watched: dict[int, Any] = {}
    files = CmFiles(tmp_path, cm, SimpleNamespace(watch=watched.__setitem__, unwatch=watched.pop), lambda: 0.0)
    real = os.mkfifo

    def full(path: Any, mode: int = 0o666) -> None:
        if str(path).endswith("events"):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        real(path, mode)

    monkeypatch.setattr(channel.os, "mkfifo", full)
    before = descriptors()
    for number in range(3):
        with pytest.raises(OSError):
            files.open(f"1-{number}", os.getpid(), os.getuid(), os.getgid())
    assert descriptors() == before and not list((tmp_path / "ctx").iterdir()) and not files.by_id
