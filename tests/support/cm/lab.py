"""One connection manager without a NIC: a test hands it datagrams and commands and sees what it sends."""

from __future__ import annotations

import random
import struct
from types import SimpleNamespace
from typing import Any

from softroce_ext.cm import messages as m
from softroce_ext.cm import ucma
from softroce_ext.cm.ids import EventQueue
from softroce_ext.cm.manager import CommunicationManager
from softroce_ext.device.addressing import Addressing

HERE, THERE = bytes((10, 77, 0, 2)), bytes((10, 77, 0, 1))
MAC = bytes(6)


class Lab:
    """A manager without a NIC: what it sends is kept."""

    def __init__(self) -> None:
        rng = random.Random(1)
        addressing = Addressing(MAC, lambda _ip: MAC, lambda _index: None)
        addressing.add(HERE)
        adapter = SimpleNamespace(addressing=addressing, guid=bytes(8), mac=MAC, interface_mtu=9000, number_base=0)
        self.sent: list[m.Message] = []
        gsi = SimpleNamespace(on_mad=None, send=lambda _path, mad: self.sent.append(m.unpack(mad)))
        self.cm = CommunicationManager(adapter, gsi, rng.randrange, lambda *_: HERE, lambda *_: None)
        self.told = 0
        self.file: Any = SimpleNamespace(
            queue=EventQueue(self._tell), read=lambda _address, length: bytes(length), guid=bytes(8)
        )
        self.file.sibling = lambda _descriptor: self.file

    def _tell(self, count: int) -> None:
        self.told += count
        assert self.told >= 0

    def mad(self, mad: bytes, source: bytes = THERE) -> None:
        packet = SimpleNamespace(source_ip=source, destination_ip=HERE, source_mac=MAC)
        self.cm.incoming.on_mad(packet, 1, memoryview(mad), 0.0)

    def command(self, number: int, body: bytes, room: int = 400) -> bytes:
        return ucma.execute(self.cm, self.file, ucma.HEADER.pack(number, len(body), room) + body, 0.0)

    def listener(self, port: int = 7174) -> int:
        handle = struct.unpack("<I", self.command(0, struct.pack("<QQHB5x", 7, 0, 0x0106, 2)))[0]
        address = struct.pack("<H", 2) + port.to_bytes(2, "big") + bytes(24)
        self.command(2, bytes(8) + address + struct.pack("<I", handle))
        self.command(7, struct.pack("<Ii", handle, 8))
        return int(handle)
