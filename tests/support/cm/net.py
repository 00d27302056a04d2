"""Connection managers of three NICs on one wire, and a scene of a server and a client that connect and may move."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from softroce_ext.cm import checkpoint, ucma
from softroce_ext.cm.ids import PS_TCP, EventQueue
from softroce_ext.cm.manager import CommunicationManager
from softroce_ext.device.addressing import Addressing
from softroce_ext.device.errors import VerbsError
from softroce_ext.wire.path import Path

A, B, C = (bytes((10, 77, 0, number)) for number in (1, 2, 3))
PORT = 7174
ADDR_RESOLVED, ROUTE_RESOLVED, CONNECT_REQUEST, CONNECT_RESPONSE, ESTABLISHED, DISCONNECTED = 0, 2, 4, 5, 9, 10
Event = tuple[int, int, int]
"""uid, handle, kind."""


class Nic:
    """One NIC's manager on the wire `Net`, with one program."""

    port_space = PS_TCP
    """Of the ids that the program makes."""

    def __init__(self, net: Net, number: int, *addresses: bytes) -> None:
        self.net = net
        self.mac = bytes((2, 0, 0, 0, 0, number))
        addressing = Addressing(self.mac, lambda ip: net.places[ip].mac, lambda _index: None)
        self.adapter = SimpleNamespace(
            addressing=addressing, gids=addressing.gids, guid=bytes(7) + bytes((number,)), mac=self.mac,
            interface_mtu=1500, number_base=number,
        )  # fmt: skip
        gsi = SimpleNamespace(on_mad=None, send=self._send)
        self.cm = CommunicationManager(
            self.adapter, gsi, random.Random(number).randrange, lambda *_: addresses[0], lambda *_: None
        )
        for address in addresses:
            self.own(address)
        self.file = self.new_file(self.adapter.guid)

    def own(self, address: bytes) -> None:
        self.adapter.addressing.add(address)
        self.net.places[address] = self

    def new_file(self, guid: bytes, identifier: str = "") -> Any:
        told: list[int] = []
        channel = SimpleNamespace(owner=(0, 0), dump_mailbox=lambda: b"\1\2")
        name = identifier or f"{self.adapter.number_base}-0"
        return SimpleNamespace(
            id=name, pid=5, inner_pid=5, guid=guid, queue=EventQueue(told.append), channel=channel, told=told
        )

    def _send(self, path: Path, mad: bytes) -> None:
        self.net.wire.append((path, mad))

    def call(self, command: ucma.Command, body: bytes, room: int = 400) -> bytes:
        return ucma.execute(self.cm, self.file, ucma.HEADER.pack(command, len(body), room) + body, self.net.now)

    def create(self, uid: int) -> int:
        body = struct.pack("<QQHB5x", uid, 0, self.port_space, 2)
        return int(struct.unpack("<I", self.call(ucma.Command.CREATE_ID, body))[0])

    def listen(self, ip: bytes = bytes(4), port: int = PORT) -> int:
        handle = self.create(1)
        self.call(ucma.Command.BIND_IP, bytes(8) + sockaddr(ip, port) + struct.pack("<I", handle))
        self.call(ucma.Command.LISTEN, struct.pack("<Ii", handle, 8))
        return handle

    def connect(self, ip: bytes, uid: int = 2, qpn: int = 17, port: int = PORT) -> int:
        handle = self.create(uid)
        self.call(ucma.Command.RESOLVE_IP, bytes(28) + sockaddr(ip, port) + struct.pack("<II", handle, 2000))
        self.call(ucma.Command.RESOLVE_ROUTE, struct.pack("<II", handle, 2000))
        self.call(ucma.Command.CONNECT, conn_param(qpn) + struct.pack("<II", handle, 0))
        return handle

    def accept(self, handle: int, uid: int, param: bytes) -> None:
        self.call(ucma.Command.ACCEPT, struct.pack("<Q", uid) + param + struct.pack("<II", handle, 0))

    def events(self) -> list[Event]:
        """Take every event that waits."""
        taken = []
        while True:
            try:
                answer = self.call(ucma.Command.GET_EVENT, bytes(8))
            except VerbsError:
                return taken
            taken.append(struct.unpack_from("<QII", answer))

    def hold(self) -> list[dict[str, Any]]:
        """Freeze the program; returns its image."""
        self.cm.hold(self.file.queue, self.net.now)
        image: list[dict[str, Any]] = json.loads(json.dumps(checkpoint.dump(self.cm, [self.file])))
        return image

    def restore(self, image: list[dict[str, Any]], addresses: dict[bytes, bytes] | None = None) -> None:
        records = checkpoint.parse(image)

        def make(record: Any) -> Any:
            return self.new_file(bytes.fromhex(record.guid), record.id)

        (self.file,) = checkpoint.restore(self.cm, records, make, addresses or {}, self.net.now)

    def release(self) -> None:
        self.cm.unhold(self.file.queue, self.net.now)
        self.cm.on_timer(self.net.now)


class Net:
    """Delivers frames to the host that has the address now and writes its MAC in, as the switches do."""

    def __init__(self) -> None:
        self.now = 100.0
        self.places: dict[bytes, Nic] = {}
        self.wire: list[tuple[Path, bytes]] = []

    def deliver(self) -> None:
        while self.wire:
            path, mad = self.wire.pop(0)
            place = self.places.get(path.destination_ip)
            if place is not None:
                packet = SimpleNamespace(
                    source_ip=path.source_ip, destination_ip=path.destination_ip, source_mac=path.source_mac
                )
                place.cm.incoming.on_mad(packet, 1, memoryview(mad), self.now)

    def pass_time(self, seconds: float, *nics: Nic) -> None:
        """Timers run and everything that is sent arrives."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + 0.5)
            for nic in nics:
                nic.cm.on_timer(self.now)
            self.deliver()


def sockaddr(ip: bytes, port: int = PORT) -> bytes:
    return (struct.pack("<H", 2) + port.to_bytes(2, "big") + ip).ljust(28, b"\0")


def conn_param(qpn: int) -> bytes:
    return struct.pack("<II256s8B", qpn, 0, b"hello", 5, 0, 1, 1, 0, 7, 7, 1)


def move(there: Nic, here: Nic, addresses: dict[bytes, bytes] | None = None, seconds: float = 3.0) -> None:
    """The whole of a migration; the program is frozen for `seconds`."""
    image = there.hold()
    there.net.pass_time(seconds / 2, there, here)
    here.restore(image, addresses)
    if addresses is None:
        there.net.places |= {ip: here for ip, place in there.net.places.items() if place is there}
        for ip in [ip for ip, place in there.net.places.items() if place is here]:
            if bytes(10) + b"\xff\xff" + ip not in here.adapter.gids:
                here.own(ip)
    there.net.pass_time(seconds / 2, there, here)
    there.cm.discard(there.file.queue)
    here.release()


class Scene:
    """A server at B, a client at A, and a place C that the one that moves goes to."""

    def __init__(self) -> None:
        self.net = Net()
        self.client, self.server = Nic(self.net, 1, A), Nic(self.net, 2, B)
        self.spare = Nic(self.net, 3, C)
        self.ends: dict[str, Nic] = {"client": self.client, "server": self.server}
        self.heard: dict[str, list[int]] = {"client": [], "server": []}
        self.handles = {"client": 0, "server": 0}

    def step_listen(self) -> None:
        self.server.listen()

    def step_connect(self) -> None:
        self.handles["client"] = self.ends["client"].connect(B)

    def step_settle(self) -> None:
        """Deliver, and let both programs do what programs do about what they hear."""
        for _ in range(4):
            self.net.pass_time(7, *self.ends.values())
            for name, nic in self.ends.items():
                for _uid, handle, kind in nic.events():
                    self.heard[name].append(kind)
                    if kind == CONNECT_REQUEST:
                        self.handles["server"] = handle
                        nic.accept(handle, 3, conn_param(18))
                    elif kind == CONNECT_RESPONSE:
                        nic.accept(handle, 2, bytes(272))

    def step_disconnect(self) -> None:
        nic = self.ends["client"]
        nic.call(ucma.Command.DISCONNECT, struct.pack("<I", self.handles["client"]))

    def move(self, name: str) -> None:
        there = self.ends[name]
        move(there, self.spare)
        self.ends[name], self.spare = self.spare, there


STEPS: tuple[Callable[[Scene], None], ...] = (
    Scene.step_listen, Scene.step_connect, lambda scene: scene.net.deliver(), Scene.step_settle, Scene.step_disconnect,
    Scene.step_settle,
)  # fmt: skip


def connected() -> Scene:
    scene = Scene()
    for step in STEPS[:4]:
        step(scene)
    return scene
