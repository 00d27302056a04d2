"""Hostile connection management: MADs that anybody on the network may send, and rdma_cm commands of any shape.

Invariants: a MAD of any kind and contents, replayed, cut, from any address, with ids that exist, existed or never did,
raises nothing and leaves a bounded number of ids, connections and timers; a MAD from another address than the peer's
changes no connection; each command is answered by success or an errno (never EIO); another program's ids are not
reachable; when both programs go nothing of them is left.
"""

from __future__ import annotations

import itertools
import random
import struct
from typing import Any

from softroce_ext.cm import messages as m
from softroce_ext.cm import ucma
from softroce_ext.cm.ids import Endpoint, EventQueue, IdState
from softroce_ext.cm.manager import CommunicationManager
from softroce_ext.device.adapter import Adapter
from softroce_ext.device.errors import VerbsError
from softroce_ext.simulation.hosts import ByteSink
from softroce_ext.transport.engine import Engine
from softroce_ext.wire import opcodes as op
from softroce_ext.wire.frame import MAX_FRAME, build
from softroce_ext.wire.frame import Path as WirePath
from softroce_ext.wire.headers import BTH_DETH, GSI_QKEY, GSI_QPN
from tests.support.fuzz.rounds import Tally, Violation
from tests.support.nic.uverbs_program import QuietHost

STEPS = 250
HERE, PEER, STRANGER = bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2]), bytes([10, 0, 0, 66])
EDGES = (0, 1, 2, 3, 7, 255, 0xFFFF, 0xFFFFFF, 0xFFFFFFFF)


def random_mad(chance: random.Random, known: list[int], remote: list[int], source: bytes, here: bytes) -> bytes:
    """A message of any kind; known, remote: ids of connections, the receiver's and the sender's."""
    kind = chance.choice(list(m.Kind))
    fields: dict[str, int] = {}
    for name, (_, bits) in m.LAYOUTS[kind].fields.items():
        value = chance.choice((0, 1, chance.choice(EDGES), chance.randrange(1 << min(bits, 63))))
        if name == "remote_comm_id" or (name == "request_id" and kind is m.Kind.SIDR_REP):
            value = chance.choice((*known, *known, value))
        elif name in ("local_comm_id", "request_id"):
            value = chance.choice((*remote, *remote, chance.randrange(8)))
        elif name == "service_id":
            value = chance.choice((0x0106 << 16, 0x0111 << 16)) | chance.choice((4000, 4000, 4001, 4002))
        elif name == "primary_local_gid":
            value = int.from_bytes(bytes(10) + b"\xff\xff" + source, "big")
        elif name in ("path_mtu", "retry_count") and chance.random() < 0.7:
            value = 3
        fields[name] = value & (1 << bits) - 1
    private = (
        m.IpHeader(chance.randrange(65536), source, here).pack() if chance.random() < 0.8 else chance.randbytes(40)
    )
    data = bytearray(m.Message(kind, chance.randrange(1 << 32), fields, private).pack())
    if chance.random() < 0.1:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(data)


def random_command(chance: random.Random, handles: list[int], ends: tuple[bytes, ...]) -> bytes:
    """One command: words that are handles, edges, addresses; of a plausible length."""
    number = chance.choice((*map(int, ucma.HANDLERS), int(ucma.Command.CREATE_ID), int(ucma.Command.GET_EVENT),
                            chance.randrange(40)))  # fmt: skip
    address = struct.pack("<HH4s", 2, chance.choice((0, 4000, 4001)).to_bytes(2, "big")[0]
                          | chance.choice((0, 0xA00F, 0xA10F)), chance.choice(ends))  # fmt: skip
    body: bytes
    if number == ucma.Command.CREATE_ID:
        body = struct.pack("<QQHB5x", chance.randrange(9), 1, chance.choice((0x0106, 0x0106, 0x0111, 7)), 2)
    else:
        handle = chance.choice(handles)
        words = [chance.choice((handle, chance.choice(EDGES))) for _ in range(chance.choice((2, 4, 6, 40, 80)))]
        edge = chance.choice(EDGES)
        parts = [struct.pack("<QI", 1, handle), struct.pack("<II", handle, edge), address.ljust(28, b"\0"),
                 struct.pack("<I", chance.choice((0, 10, 2000)))]  # fmt: skip
        body = struct.pack(f"<{len(words)}I", *words)
        if chance.random() < 0.7:
            body = parts[0] + b"".join(chance.sample(parts[1:], chance.randrange(1, 4))) + body
    length = len(body) if chance.random() < 0.9 else chance.choice((0, 8, 0xFFFF))
    message = struct.pack("<IHH", number, length, chance.choice((0, 4, 8, 400, 0xFFFF))) + body
    if chance.random() < 0.1:
        message = message[: chance.randrange(9)]
    return message


class File:
    """What a command sees of an open of rdma_cm."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.told = 0
        self.guid = bytes(8)
        self.queue = EventQueue(self._tell)
        self.other: File | None = None

    def _tell(self, count: int) -> None:
        self.told += count

    def read(self, address: int, length: int) -> bytes:
        if address == 0 or length > 4096:
            raise VerbsError(14)
        return self.chance.randbytes(length)

    def sibling(self, descriptor: int) -> File:
        if descriptor == 5 and self.other is not None:
            return self.other
        raise VerbsError(9)


class Scene:
    """A NIC with a connection manager, two programs, and a network that belongs to the attacker."""

    def __init__(self, chance: random.Random, tally: Tally, seed: int = 0) -> None:
        """seed: of the NIC's own numbers."""
        self.chance, self.tally = chance, tally
        own = random.Random(seed)
        self.engine = Engine()
        self.adapter = Adapter(self.engine, b"\2\0\0\0\0\1", 9000, 1, QuietHost())
        self.adapter.addressing.resolve = lambda _: b"\2\0\0\0\0\2"
        self.adapter.addressing.add(HERE)
        self.groups: list[tuple[bytes, bool]] = []
        """Changes of the multicast groups with members: (address, whether there are any)."""
        self.cm = CommunicationManager(
            self.adapter,
            self.engine.gsi,
            own.randrange,
            lambda _to, _from: HERE,
            lambda address, member: self.groups.append((address, member)),
        )
        self.files = [File(own), File(own)]
        self.files[0].other = self.files[1]
        self.now = 1000.0
        self.sent: list[m.Message] = []
        self.seen: list[bytes] = []
        self.handles: list[int] = [0, 1 << 20, (1 << 20) + 1]

    # -- frames ------------------------------------------------------------------------------------------------------

    def mad(self) -> bytes:
        """A message of any kind, ids mostly those of connections; replayed, or damaged, or noise."""
        chance = self.chance
        if self.seen and chance.random() < 0.15:
            return chance.choice(self.seen)
        if chance.random() < 0.05:
            return chance.randbytes(m.MAD_BYTES)
        known = [connection.local_id for connection in self.cm.connections.by_id.values()]
        remote = [connection.remote_id for connection in self.cm.connections.by_id.values()]
        return random_mad(chance, known, remote, PEER, HERE)

    def deliver(self, mad: bytes, source: bytes) -> None:
        way = WirePath(b"\2\0\0\0\0\2", b"\2\0\0\0\0\1", source, HERE, 55410)
        headers = BTH_DETH.pack((op.UD | op.SEND_ONLY) << 24 | 0xFFFF, 1, 0, GSI_QKEY, GSI_QPN)
        out = memoryview(bytearray(MAX_FRAME))
        self.engine.receive(out[: build(way, 0, headers, mad, 0, out)], self.now)
        self.engine.end_of_batch(self.now)
        self.seen.append(mad)
        del self.seen[:-40]

    # -- commands ------------------------------------------------------------------------------------------------------

    def command(self, file: File, message: bytes) -> None:
        try:
            answer = ucma.execute(self.cm, file, message, self.now)
        except VerbsError as fault:
            self.tally.refusals[f"errno {fault.number}"] += 1
            return
        if len(answer) >= 4:
            self.handles.append(struct.unpack_from("<I", answer)[0])
            del self.handles[2:-20]

    def connections(self) -> list[tuple[Any, ...]]:
        return [(c.local_id, c.remote_id, c.state, c.remote_qpn) for c in self.cm.connections.by_id.values()]

    def mad_from(self, source: bytes, mad: bytes) -> None:
        """One MAD; a stranger's changes no connection."""
        stranger = source == STRANGER
        before = self.connections() if stranger else []
        counted = sum(self.cm.counters.values())
        self.deliver(mad, source)
        self.tally.refusals["MAD"] += sum(self.cm.counters.values()) - counted
        after = self.connections() if stranger else []
        if stranger and after[: len(before)] != before:
            raise Violation(f"a MAD of a stranger changed a connection: {mad.hex()}")

    def step(self) -> None:
        """Something of our own."""
        chance = self.chance
        if chance.random() < 0.6:
            source = STRANGER if chance.random() < 0.2 else PEER
            self.play(["mad", source.hex(), self.mad().hex()])
        else:
            message = random_command(chance, self.handles, (HERE, PEER, bytes(4)))
            self.play(["command", chance.randrange(2), message.hex()])
        if chance.random() < 0.3:
            self.play(["wait", chance.choice((1e-3, 0.1, 5.0, 60.0))])

    def play(self, step: list[Any]) -> None:
        """["mad", source, bytes], ["command", file, bytes] or ["wait", seconds], noted before it is done."""
        self.tally.steps.append(step)
        if step[0] == "wait":
            self.now += step[1]
            self.cm.on_timer(self.now)
        elif step[0] == "mad":
            self.mad_from(bytes.fromhex(step[1]), bytes.fromhex(step[2]))
        else:
            self.command(self.files[step[1]], bytes.fromhex(step[2]))
        self.tally.cases += step[0] != "wait"
        sink = ByteSink()
        self.engine.frames_to_send(self.now, sink)
        if (
            sum(len(file.queue.events) for file in self.files) > 3000
            or len(self.cm.connections.by_id) > len(self.cm.ids) + 600
        ):
            raise Violation("events or connections without bound")


def listening(chance: random.Random, tally: Tally, seed: int) -> Scene:
    """A scene with ids of both programs, two of which listen."""
    scene = Scene(chance, tally, seed)
    for file, port in itertools.product(scene.files, (4000, 4001)):
        space = 0x0106 if port == 4000 else 0x0111
        created = struct.pack("<IHHQQHB5x", ucma.Command.CREATE_ID, 24, 4, 1, 1, space, 2)
        handle = struct.unpack("<I", ucma.execute(scene.cm, file, created, scene.now))[0]
        scene.handles.append(handle)
        if file is scene.files[0]:
            cm_id = scene.cm.ids[handle]
            scene.cm.addresses.bind(cm_id, Endpoint(HERE, port))
            cm_id.state, cm_id.backlog = IdState.LISTEN, 8
    return scene


def end(scene: Scene) -> None:
    """Both programs go, and nothing is left."""
    for file in scene.files:
        scene.cm.close(file.queue, scene.now)
    for _ in range(300):
        scene.now += 120
        scene.cm.on_timer(scene.now)
    left = {
        "ids": scene.cm.ids,
        "connections": scene.cm.connections.by_id,
        "peers": scene.cm.connections._by_peer,
        "groups": scene.cm.groups.by_handle,
    }
    for what, items in left.items():
        if items:
            raise Violation(f"{what} left when both programs have gone: {list(items.items())[:3]}")


def one_round(chance: random.Random, tally: Tally) -> None:
    """A listener, and then anything."""
    tally.begin(chance.randrange(1 << 32))
    scene = listening(chance, tally, tally.scene)
    for _ in range(STEPS):
        scene.step()
    end(scene)


def replay(seed: int, steps: list[Any], tally: Tally) -> None:
    """What a round has noted; seed: of the NIC's own numbers."""
    scene = listening(random.Random(0), tally, seed)
    for step in steps:
        scene.play(step)
    end(scene)
