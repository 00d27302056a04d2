"""A NIC's upper half in this process (no port, no loop), and a program that speaks to it as the bridge does."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Sequence
from pathlib import Path

from softroce_ext.device.adapter import Adapter
from softroce_ext.device.user_context import UserContext
from softroce_ext.device.user_queue_pair import UserQueuePair
from softroce_ext.transport.engine import Engine
from softroce_ext.uverbs.channel import LAYOUT_VERSION
from softroce_ext.uverbs.server import MAGIC, CommandServer

IP = bytes([10, 0, 0, 1])


class QuietHost:
    """The machine around a device (device.host.Host): every neighbour is known, and nothing else happens."""

    speed: int | None = None

    def resolve(self, address: bytes) -> bytes | None:
        return bytes(6)

    def link_speed(self) -> int | None:
        return self.speed

    def gid_changed(self, index: int, gid: bytes | None) -> None:
        return

    def link_changed(self) -> None:
        return

    def group_changed(self, address: bytes, member: bool) -> None:
        return

    def last_turn(self, leaving: Sequence[UserQueuePair]) -> None:
        return


class Upper:
    """Engine, adapter and command server of one NIC."""

    def __init__(self, run: Path, base: int = 1) -> None:
        self.run = run
        self.engine = Engine()
        self.host = QuietHost()
        self.adapter = Adapter(self.engine, bytes([2, 0, 0, 0, 0, base]), 9000, base, self.host)
        self.adapter.addressing.add(IP)
        self.opened: list[UserContext] = []
        self.server = CommandServer(
            run, self.adapter, opened=self.opened.append, before_command=lambda _: None, cm=None
        )

    def close(self) -> None:
        """Free everything."""
        for context in list(self.adapter.contexts.values()):
            self.adapter.forget(context)
        self.server.close()


class Program:
    """One open of the device, by this process; `call` is one write() to the device file."""

    def __init__(self, upper: Upper, name: str = "open-1-2-3") -> None:
        self.upper = upper
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sequence = 0
        fifo = upper.run / "ctx" / name
        os.mkfifo(fifo)
        answer = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        self.send(1, name.encode(), b"")
        self.error, self.major, self.minor, _, identifier = struct.unpack("<iIII48s", os.read(answer, 64))
        os.close(answer)
        fifo.unlink()
        self.id = identifier.rstrip(b"\0").decode()
        self.directory = upper.run / "ctx" / self.id
        self.reply = os.open(self.directory / "reply", os.O_RDONLY | os.O_NONBLOCK)
        self.queues = os.open(self.directory / "queues", os.O_RDWR)

    @property
    def context(self) -> UserContext:
        """The NIC's side."""
        return self.upper.adapter.contexts[self.id]

    def send(self, kind: int, name: bytes, body: bytes) -> None:
        """One datagram, served at once."""
        head = struct.pack("<IHHII48s", MAGIC, LAYOUT_VERSION, kind, self._sequence, 0, name)
        self._socket.sendto(head + body, str(self.upper.server.path))
        self.upper.server.serve()

    def raw(self, message: bytes) -> tuple[int, bytes, str]:
        """One command as it is: (errno, response, name of the FIFO to install)."""
        self._sequence += 1
        self.send(2, self.id.encode(), message)
        assert os.read(self.reply, 64) == struct.pack("<I", self._sequence)
        mailbox = os.pread(self.queues, 4032, 64)
        sequence, error, length, install, name = struct.unpack_from("<IiII112s", mailbox)
        assert sequence == self._sequence
        return error, mailbox[128 : 128 + length], name.rstrip(b"\0").decode() if install else ""

    def call(self, command: int, body: bytes, out: int = 0, error: int = 0) -> bytes:
        """A legacy command; `out` bytes of response are asked for; `error` is the errno that must come."""
        pointer = struct.pack("<Q", 0x1000) if out else b""
        head = struct.pack("<IHH", command, (8 + len(pointer) + len(body)) // 4, out // 4)
        got, response, _ = self.raw(head + pointer + body)
        assert got == error, f"command {command}: errno {got}, expected {error}"
        return response

    def objects(self) -> dict[str, int]:
        """GET_CONTEXT, a PD, a CQ of 10 with a channel, a QP; returns their handles."""
        self.raw(struct.pack("<IHHQ", 0, 4, 2, 0x1000))
        _, _, channel = self.raw(struct.pack("<IHHQ", 17, 4, 1, 0x1000))
        self.channel = os.open(self.directory / channel, os.O_RDONLY | os.O_NONBLOCK)
        (pd,) = struct.unpack("<I", self.call(3, b"", 4))
        cq, cqe = struct.unpack_from("<II", self.call(18, struct.pack("<QIIiI", 0xC0, 10, 0, self.channel, 0), 24))
        assert cqe == 15
        qp = struct.pack("<QIIIIIIIIIBBBx", 0xD0, pd, cq, cq, 0, 10, 10, 2, 2, 64, 0, 2, 0)
        handle, qpn = struct.unpack_from("<II", self.call(24, qp, 64))
        return {"pd": pd, "cq": cq, "qp": handle, "qpn": qpn}
