"""A hostile program, run with the bridge: `-m tests.system.hostile_program MODE SEED SECONDS TALLY`.

It opens the device (or rdma_cm) again and again, each time in a child that writes random and mutated commands,
scribbles on what it shares with the NIC, and dies at a random moment by a signal or without a word. MODE `verbs`, `cm`,
`hoard` (thousands of objects at once), `socket` (datagrams to the bridge's socket, without the bridge), or `canary`: an
honest program whose memory must not change, which prints what its peer must know to attack it and ends with 0 if all
is as it was.

TALLY is a file of counters that a dying child leaves right: [errno] of commands that the NIC itself refused, and
COMMANDS, DEEDS, LIVES. Exit code 0; 1 and a line when an invariant was seen to be violated.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import json
import mmap
import os
import random
import resource
import select
import signal
import socket
import struct
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from softroce_ext.uverbs.abi import Command
from softroce_ext.uverbs.channel import LAYOUT_VERSION
from softroce_ext.uverbs.server import MAGIC
from tests.fuzz import fuzz_cm, fuzz_commands
from tests.support.fuzz import scribbler
from tests.support.fuzz.rounds import Tally, Violation
from tests.system.hostile_device import (
    ATTACKER,
    COMMANDS,
    DEEDS,
    LIVES,
    OWN,
    RC,
    TALLY_BYTES,
    UC,
    UD,
    Device,
    Objects,
    Peer,
)

RUN = Path("/run/migros/nic")
LIFE = 0.5
"""Seconds that a child may live; it may have cut off its own answers and never end."""
AGAIN = 0.03
"""Seconds after which the canary connects its queue pairs again, which the first wrong frame ends."""
CREATES = {Command.ALLOC_PD: "ProtectionDomain", Command.CREATE_CQ: "CompletionQueue", Command.CREATE_QP: "QueuePair",
           Command.CREATE_SRQ: "SharedReceiveQueue", Command.REG_MR: "MemoryRegion", Command.ALLOC_MW: "MemoryWindow",
           Command.CREATE_AH: "AddressHandle"}  # fmt: skip


class Attack(fuzz_commands.Attack):
    """The generator of commands, with what this program knows of its own objects."""

    def __init__(self, device: Device, objects: Objects, peers: list[Peer], chance: random.Random) -> None:
        self.chance = chance
        self.program: Any = objects
        self.device = device
        self.buffer = bytearray(4096)
        self.known: dict[str, list[int]] = {
            "ProtectionDomain": [objects.pd],
            "CompletionQueue": [peer.cq.handle for peer in peers],
            "MemoryRegion": [peer.handle for peer in peers],
            "QueuePair": [qp.handle for peer in peers for qp in peer.qps],
        }
        self.handles = [handle for handles in self.known.values() for handle in handles]

    def handle(self, kind: str) -> int:
        """Mostly an object of the right kind that there was."""
        fitting = self.known.get(kind)
        return self.chance.choice(fitting) if fitting and self.chance.random() < 0.8 else self.number()

    def one(self) -> None:
        """One command."""
        command, message = self.message()
        error, data = self.device.raw(message)
        if not error and len(data) >= 4 and command in CREATES:
            handle = struct.unpack_from("<I", data)[0]
            self.known.setdefault(CREATES[Command(command)], []).append(handle)
            self.handles.append(handle)


def die(chance: random.Random) -> None:
    """In one of the ways in which programs end."""
    if chance.random() < 0.5:
        os.kill(os.getpid(), chance.choice((signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM)))
    os._exit(0)


def verbs_life(chance: random.Random, counts: memoryview) -> None:
    """Objects, then commands and scribbling in any order."""
    device = Device(counts)
    objects = Objects(device)
    peers = [Peer(device, objects, kind, OWN) for kind in (RC, UC, UD)]
    attack = Attack(device, objects, peers, chance)
    hand = scribbler.Scribbler(peers, chance, Tally("rings", 0))
    for _ in range(chance.choice((0, 3, 30, 300, 3000))):
        if chance.random() < 0.5:
            attack.one()
        else:
            counts[DEEDS] += 1
            with contextlib.suppress(OSError):
                hand.one()
            # What the bridge does for a doorbell; the hand leaves `pending` alone.
            with contextlib.suppress(OSError):
                os.write(
                    device.fd, struct.pack("<IHHQIIII", Command.POST_SEND, 6, 1, 0, peers[0].qps[0].handle, 0, 0, 0)
                )
        for peer in peers:
            peer.arena.check()


def cm_life(chance: random.Random, counts: memoryview) -> None:
    """Two opens of rdma_cm, listeners, and commands of any kind."""
    response = ctypes.create_string_buffer(0x10000)
    files = [os.open("/dev/infiniband/rdma_cm", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC) for _ in range(2)]
    handles = [0, 1]
    for number in range(chance.choice((0, 10, 300, 3000))):
        message = fuzz_cm.random_command(chance, handles, (OWN, ATTACKER, bytes(4)))
        if number < 4:  # ids to work with, and a listener
            message = struct.pack("<IHHQQHB5x", 0, 24, 4, 1, 0, 0x0106, 2)
        elif number < 8:
            end = struct.pack("<HHI20x", 2, 0xA00F + 256 * (number & 1), 0)
            message = struct.pack("<IHHQ", 2, 40, 0, 0) + end + struct.pack("<I", handles[number - 2])
        elif number < 10:
            message = struct.pack("<IHHII", 7, 8, 0, handles[number - 4], 8)
        at = 16 if message[:4] == bytes(4) else 8
        if len(message) >= at + 8 and message[6:8] != bytes(2):
            message = message[:at] + struct.pack("<Q", ctypes.addressof(response)) + message[at + 8 :]
        counts[COMMANDS] += 1
        try:
            os.write(chance.choice(files), message)
        except OSError as error:
            counts[error.errno or 0] += len(message) >= 24
        else:
            handles.append(struct.unpack_from("<I", response)[0])
            del handles[6:-20]


def strange_descriptors(chance: random.Random) -> list[Any]:
    """Descriptors of every kind, as objects that close them."""
    made: list[Any] = []
    for _ in range(chance.choice((1, 2, 30))):
        kind = chance.randrange(4)
        if kind == 0:
            made.append(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        elif kind == 1:
            made.append(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
        elif kind == 2:
            made.append(select.epoll())
        else:
            made.append(os.fdopen(os.open(chance.choice(("/dev/zero", "/proc/self/mem")), os.O_RDONLY), "rb"))
    return made


def socket_life(chance: random.Random, counts: memoryview) -> None:
    """Datagrams to the bridge's socket: noise, forged heads, opens of every kind, unsolicited descriptors."""
    sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sender.connect(str(RUN / "uverbs.sock"))
    held: list[int] = []
    for number in range(chance.choice((3, 30, 300))):
        name = f"open-{os.getpid()}-{number}".encode()
        path = RUN / "ctx" / name.decode()
        with contextlib.suppress(OSError):
            link = partial(os.symlink, chance.choice((str(RUN / "ctx" / "victim"), "/", "none")))
            chance.choice((os.mkfifo, os.mkfifo, os.mkfifo, Path.mkdir, Path.touch, link))(path)
            if chance.random() < 0.7:
                held.append(os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW))  # never through the link
                if chance.random() < 0.2:  # no room for the answer
                    with contextlib.suppress(OSError):
                        os.write(held[-1], bytes(1 << 20))
        name = chance.choice((name, name, name, b"open-..", b"../control.sock", b"1-0", chance.randbytes(48)))
        head = struct.pack("<IHHII48s", chance.choice((MAGIC, MAGIC, MAGIC, 0)), LAYOUT_VERSION,
                           chance.choice((1, 1, 1, 3, 2, 0, 9)), number, 0, name)  # fmt: skip
        noise = chance.randbytes(chance.choice((0, 1, 63, 64)))
        cut, long = head[: chance.randrange(64)], head + bytes(70000)
        message = chance.choice((head, head, head + noise, noise, cut, long))
        ancillary: list[Any] = []
        if chance.random() < 0.4:
            files = strange_descriptors(chance)
            numbers = [file.fileno() for file in files] + [sender.fileno()]
            numbers *= chance.choice((1, 1, 253 // len(numbers), 300))
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", numbers))]
        counts[COMMANDS] += 1
        with contextlib.suppress(OSError):
            sender.sendmsg([message], ancillary, socket.MSG_DONTWAIT if chance.random() < 0.3 else 0)
        if chance.random() < 0.5:
            with contextlib.suppress(OSError):
                path.unlink()


def hoard_life(chance: random.Random, counts: memoryview) -> None:
    """Thousands of objects of every kind, so that there is much to free at once."""
    device = Device(counts)
    objects = Objects(device)
    channel, pd = objects.channel, objects.pd
    (cq,) = struct.unpack_from("<I", device.call(Command.CREATE_CQ, struct.pack("<QIIiI", 7, 1, 0, channel, 0), 24))
    body = struct.pack("<QIIIIIIIIIBBBx", 8, pd, cq, cq, 0, 1, 1, 1, 1, 0, 0, UD, 0)
    (qp,) = struct.unpack_from("<I", device.call(Command.CREATE_QP, body, 64))
    number = chance.choice((300, 1000, 2000))
    for count in range(number):
        device.call(Command.CREATE_CQ, struct.pack("<QIIiI", 7, 1, 0, -1, 0), 24)
        device.call(Command.CREATE_QP, body, 64)
        group = bytes(10) + b"\xff\xff\xef\2" + count.to_bytes(2, "big")
        device.call(Command.ATTACH_MCAST, group + struct.pack("<IHxx", qp, 0) + bytes(8))
    response = ctypes.create_string_buffer(64)
    where = struct.pack("<Q", ctypes.addressof(response))
    file = os.open("/dev/infiniband/rdma_cm", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    for count in range(number):
        os.write(file, struct.pack("<IHHQ8sHB5x", 0, 24, 4, 1, where, 0x0111, 2))
        (handle,) = struct.unpack_from("<I", response)
        address = struct.pack("<HH4s20x", 2, 0, OWN)
        os.write(file, struct.pack("<IHHQ", 2, 40, 0, 0) + address + struct.pack("<I", handle))
        join = struct.pack("<HH4s20x", 2, 0, b"\xef\3" + count.to_bytes(2, "big"))
        os.write(file, struct.pack("<IHH8sQ", 16, 48, 4, where, 1) + join + struct.pack("<I", handle))
        counts[COMMANDS] += 3


def raise_the_clock(seconds: float) -> None:
    """A child that never ends, whatever it has masked, is ended by its parent; this is for one that computes."""
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 2, int(seconds) + 2))


LIVES_OF = {"verbs": verbs_life, "cm": cm_life, "socket": socket_life, "hoard": hoard_life}


def nursery(mode: str, seed: int, seconds: float, counts: memoryview) -> int:
    """One child after the other until the time is over."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        counts[LIVES] += 1
        seed += 1
        child = os.fork()
        if not child:
            chance = random.Random(seed)
            raise_the_clock(10 * LIFE)
            try:
                LIVES_OF[mode](chance, counts)
            except Violation as violation:
                print(f"seed {seed}: {violation}", flush=True)
                os._exit(1)
            except (OSError, struct.error):
                pass  # no resources, or its own files are damaged
            die(chance)
        end = time.monotonic() + (10 * LIFE if mode == "hoard" else LIFE)
        while (done := os.waitpid(child, os.WNOHANG))[0] == 0:
            if time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.001)
        if os.waitstatus_to_exitcode(done[1]) > 0:
            return 1
    return 0


def fill(peer: Peer) -> None:
    """Post receives until the queues are full."""
    for qp in peer.qps:
        ring = qp.receive_ring or qp.srq.ring
        while (peer.get(ring, scribbler.PRODUCER) + 1 - peer.get(ring, scribbler.CONSUMER)) & ring.mask:
            peer.post(ring, peer.receive(0, [(peer.arena.address + 64, 256, peer.key)]))


def canary(counts: memoryview) -> int:
    """Queue pairs of every kind connected with the attacker's address, pages that are his and pages that are not."""
    device = Device(counts)
    objects = Objects(device)
    open_peers = [Peer(device, objects, kind, ATTACKER) for kind in (RC, UC, UD)]
    closed = Peer(device, objects, RC, ATTACKER, access=1)
    peers = [*open_peers, closed]
    for peer in peers:
        fill(peer)
    print(
        json.dumps(
            {
                "qpns": [qp.qpn for peer in peers for qp in peer.qps],
                "keys": [peer.key for peer in open_peers],
                "addresses": [peer.arena.address for peer in open_peers],
                "closed": [closed.arena.address, closed.key],
            }
        ),
        flush=True,
    )
    while not select.select([sys.stdin], [], [], AGAIN)[0]:
        for peer in peers:
            with contextlib.suppress(OSError):  # a wrong frame has ended it between two of the steps
                peer.connect_all()
            fill(peer)
    for peer in peers:
        peer.arena.check()
    page = bytearray(closed.arena.map[mmap.PAGESIZE : 2 * mmap.PAGESIZE])
    page[64 : 64 + 256] = b"\xa5" * 256  # its own receives
    if page.strip(b"\xa5"):
        raise Violation("a page without remote access changed")
    return 0


def main() -> int:
    mode, seed, seconds, tally = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
    file = os.open(tally, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.ftruncate(file, TALLY_BYTES)
    counts = memoryview(mmap.mmap(file, TALLY_BYTES)).cast("Q")
    try:
        return canary(counts) if mode == "canary" else nursery(mode, seed, seconds, counts)
    except Violation as violation:
        print(violation, flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())
