"""Hostile commands: whatever a program writes to its device file, or to the NIC's socket behind its back.

Invariants, for random bytes and for commands of every number (0..63, extended, unknown) with handles of the wrong kind,
of another context, freed; counts and lengths at their edges; bad pointers and descriptors; datagrams cut short, forged,
in another's name:

* each command of the owner is answered once, by its own errno or by success, never by EIO (a fault of the NIC's own);
* each refusal adds one to a refused_* counter; nothing is raised;
* another context's objects and answers are untouched, and it works on;
* when the program is gone nothing of it is left: keys, queue pairs, numbers, descriptors, files;
* without descriptors (RLIMIT_NOFILE) and on a full file system commands fail with an errno, and work again afterwards.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import random
import resource
import shutil
import socket
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from softroce_ext.device.address_handle import Destination
from softroce_ext.uverbs.abi import EXTENDED, SIZES, Command
from softroce_ext.uverbs.channel import LAYOUT_VERSION
from softroce_ext.uverbs.server import MAGIC
from tests.support.fuzz.rounds import Tally, Violation
from tests.support.nic.uverbs_program import Program, Upper

COMMANDS_A_ROUND = 120
EDGES = (0, 1, 2, 3, 15, 16, 17, 31, 32, 33, 255, 256, 4095, 32767, 32768, 65535, 65536, 1 << 20, (1 << 20) + 1,
         0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)  # fmt: skip
NAMED = [int(command) for command in Command]
FULL_SIZES = (0, 4, 8, 12, 16, 24, 32, 36, 40, 48, 56, 64, 72, 80, 112, 120, 128, 200, 1000)


@contextmanager
def upper() -> Iterator[Upper]:
    """A NIC's upper half in a folder of its own."""
    run = Path(tempfile.mkdtemp(prefix="fuzz-nic-", dir="/dev/shm"))
    made = Upper(run)
    try:
        yield made
    finally:
        made.close()
        shutil.rmtree(run, ignore_errors=True)


def descriptors() -> int:
    """Open descriptors of this process (which is NIC and program in one)."""
    return len(os.listdir("/proc/self/fd"))


class Attack:
    """A program under control of the fuzzer, and a bystander."""

    def __init__(self, nic: Upper, chance: random.Random, tally: Tally) -> None:
        self.nic = nic
        self.chance = chance
        self.tally = tally
        self.bystander = Program(nic, "open-1")
        self.theirs = self.bystander.objects()
        self.program = Program(nic, "open-2")
        made = self.program.objects()
        self.handles = list(made.values()) + list(self.theirs.values())
        self.buffer = bytearray(4096)

    KINDS: ClassVar[dict[int, str]] = {
        Command.DEALLOC_PD: "ProtectionDomain", Command.DEREG_MR: "MemoryRegion", Command.DEALLOC_MW: "MemoryWindow",
        Command.DESTROY_AH: "AddressHandle", Command.REQ_NOTIFY_CQ: "CompletionQueue",
    }  # fmt: skip
    """Commands whose body begins with a handle of this kind."""
    ANSWERED: ClassVar[dict[int, str]] = {
        Command.DESTROY_CQ: "CompletionQueue", Command.DESTROY_QP: "UserQueuePair", Command.DESTROY_SRQ:
        "SharedReceiveQueue", Command.QUERY_QP: "UserQueuePair", Command.QUERY_SRQ: "SharedReceiveQueue",
        Command.POST_SEND: "UserQueuePair",
    }  # fmt: skip
    """Commands with a handle after the response pointer."""

    def close(self) -> None:
        """Close the programs' own descriptors."""
        for program in (self.bystander, self.program):
            for descriptor in (program.reply, program.queues, program.channel):
                with contextlib.suppress(OSError):
                    os.close(descriptor)
            program._socket.close()

    def handle(self, kind: str) -> int:
        """Mostly an object of the right kind that there is."""
        objects = self.program.context.objects
        fitting = [handle for handle, item in objects.items() if type(item).__name__ == kind]
        return self.chance.choice(fitting) if fitting and self.chance.random() < 0.8 else self.number()

    def number(self) -> int:
        return self.chance.choice((self.chance.choice(EDGES), self.chance.choice(self.handles)))

    def body(self) -> bytes:
        """32-bit words that are handles, edges and small numbers; cut anywhere."""
        chance = self.chance
        size = chance.choice(FULL_SIZES)
        if chance.random() < 0.2:
            return chance.randbytes(size + chance.randrange(4))
        words = [self.number() if chance.random() < 0.6 else 0 for _ in range(size // 4)]
        return struct.pack(f"<{len(words)}I", *words)[: size - (chance.random() < 0.1)]

    def plausible(self, command: int) -> bytes:
        """A body of the right shape for `command`, with fields at their edges."""
        n, h, chance = self.number, self.handle, self.chance
        pointer = struct.pack("<Q", chance.choice((0, 0x1000, 2**64 - 1)))
        if command == Command.CREATE_QP:
            kind = chance.choice((2, 2, 3, 4, 0, 1, 8, 255))
            sizes = [chance.choice((0, 1, 10, 10, n() if chance.random() < 0.2 else 2)) for _ in range(5)]
            return pointer + struct.pack(
                "<QIIIIIIIIIBBBx", n(), h("ProtectionDomain"), h("CompletionQueue"), h("CompletionQueue"),
                h("SharedReceiveQueue"), *sizes, chance.choice((0, 1)), kind, chance.choice((0, 0, 1)),
            )  # fmt: skip
        if command == Command.MODIFY_QP:
            mask = chance.choice((1, 0x39, 0x1FFFFF, 0x121181, chance.randrange(1 << 22)))
            gid = bytes(10) + b"\xff\xff" + bytes([10, 0, 0, chance.choice((1, 2))])
            address = Destination(gid, 0, 0, 0, chance.choice((1, 1, 0, 200)), 64, 0, 0, 0, 0, 1, 1).pack()
            state, mask = chance.choice(
                ((1, 0x39), (1, 0x71), (2, 0x129181), (2, 0x101181), (3, 0x12E01), (3, 0x10001), (6, 1), (0, 1),
                 (chance.randrange(8), mask))
            )  # fmt: skip
            values = [chance.randrange(16), 1, 1, 18, chance.choice((15, n())), 0, 0]
            small = [state, state, chance.choice((3, 5, 255)), 0, 0, 1, 1, 12, chance.choice((1, 1, 9)), 14, 7, 7, 0, 0]
            return (address + bytes(32) + struct.pack("<IIIIIIIHH", h("UserQueuePair"), mask, *values)
                    + bytes(small) + bytes(2))  # fmt: skip
        if command in (Command.CREATE_CQ, Command.RESIZE_CQ):
            descriptor = chance.choice((-1, 0, 1, 5, self.program.channel, 9999, -2147483648))
            if command == Command.RESIZE_CQ:
                return pointer + struct.pack("<II", h("CompletionQueue"), n())
            sizes = chance.choice((1, 10, n())), chance.choice((0, 0, 1))
            return pointer + struct.pack("<QIIiI", n(), *sizes, descriptor, 0)
        if command == Command.REG_MR:
            begin = chance.choice((0, 1, 2**64 - 1, 2**47, _address(self.buffer)))
            length = chance.choice((0, 1, 4096, 2**32, 2**64 - 1))
            access = chance.choice((1, 7, 15, 0x1F, n()))
            return pointer + struct.pack(
                "<QQQII", begin, length, chance.choice((begin, 0, 2**64 - 1)), h("ProtectionDomain"), access
            )
        if command == Command.MODIFY_SRQ:
            return struct.pack(
                "<IIIIQ", h("SharedReceiveQueue"), chance.randrange(5), n(), n(), chance.choice((0, 1, 2**64 - 1))
            )
        if command == Command.CREATE_SRQ:
            return pointer + struct.pack(
                "<QIIII", n(), h("ProtectionDomain"), chance.choice((1, 10, n())), chance.choice((1, n())), n()
            )
        if command == Command.CREATE_AH:
            gid = bytes(10) + b"\xff\xff" + bytes([10, 0, 0, 2])
            right = struct.pack("<16sIBBBxHBBBBBx", gid, 0, chance.choice((1, 1, 77)), 64, 0, 0, 0, 0, 0, 1, 1)
            attributes = chance.choice((chance.randbytes(32), right, right))
            return pointer + struct.pack("<QII", n(), h("ProtectionDomain"), 0) + attributes
        kind = self.KINDS.get(command)
        if kind:
            return struct.pack("<I", h(kind)) + bytes(chance.choice((0, 4, 24)))
        kind = self.ANSWERED.get(command)
        if kind:
            return pointer + struct.pack("<II", h(kind), chance.choice((0, 0, n()))) + bytes(chance.choice((0, 16)))
        if command in (Command.ATTACH_MCAST, Command.DETACH_MCAST):
            group = bytes(10) + b"\xff\xff" + bytes([chance.choice((239, 10)), 0, 0, chance.randrange(3)])
            return group + struct.pack("<IHxx", h("UserQueuePair"), 0) + bytes(8)
        if command == Command.ALLOC_MW:
            return pointer + struct.pack("<IB3x", h("ProtectionDomain"), chance.choice((1, 2, 0, 255)))
        if command == Command.REREG_MR:
            return pointer + struct.pack(
                "<IIQQQII",
                h("MemoryRegion"),
                chance.randrange(8),
                0,
                0,
                0,
                h("ProtectionDomain"),
                chance.choice((1, 7, n())),
            )
        return self.body()

    def message(self) -> tuple[int, bytes]:
        """One command as it is written to the device: (number, bytes)."""
        chance = self.chance
        command = chance.choice(NAMED)
        if chance.random() < 0.15:
            command = chance.choice((chance.randrange(64), chance.randrange(64) | EXTENDED))
        if chance.random() < 0.02:
            command = chance.randrange(1 << 32)
        body = self.plausible(command) if chance.random() < 0.6 else self.body()
        if command & EXTENDED and chance.random() < 0.8:
            body = struct.pack("<QHHI", 0x1000, 0, chance.choice((0, 2, 0xFFFF)), 0) + body
        words = chance.choice((0, 1, 2, 6, 16, 64, 0xFFFF))
        if command in SIZES and chance.random() < 0.8:
            words = -(-SIZES[command][1] // 4)  # room for the whole answer
        message = struct.pack("<IHH", command, chance.choice((0, 4, 0xFFFF)), words) + body
        if chance.random() < 0.03:
            message = message[: chance.randrange(9)]
        if chance.random() < 0.01:
            message += bytes(60000)
        return command, message

    def one(self) -> None:
        """One command of the attacker."""
        _, message = self.message()
        self.play(["command", message.hex()])

    def play(self, step: list[Any]) -> None:
        """["command", bytes], ["datagram", bytes] or ["starve", descriptors left], noted before it is done."""
        self.tally.steps.append(step)
        if step[0] == "starve":
            _starve_descriptors(self, step[1])
        else:
            (self._command if step[0] == "command" else self._datagram)(bytes.fromhex(step[1]))

    def _command(self, message: bytes) -> None:
        """An answer, and a counted refusal when it is an errno."""
        command = int.from_bytes(message[:4], "little")
        counters = self.nic.engine.counters
        before = sum(count for name, count in counters.items() if name.startswith("refused_"))
        error, data, install = self.program.raw(message)
        self.tally.cases += 1
        after = sum(count for name, count in counters.items() if name.startswith("refused_"))
        what = f"command {command:#x} {message[8:72].hex()}"
        if error == errno.EIO:
            raise Violation(f"{what}: EIO")
        if after - before != bool(error):
            raise Violation(f"{what}: errno {error}, {after - before} refusals counted")
        if not error and os.environ.get("FUZZ_SUCCESS"):
            self.tally.refusals[f"ok {command & 63}"] += 1
        if error:
            self.tally.refusals[errno.errorcode.get(error, str(error))] += 1
        elif len(data) >= 4:
            self.handles.append(struct.unpack_from("<I", data)[0])
            del self.handles[8:-40]
        if install and len(self.nic.adapter.contexts[self.program.id].comp_channels) > 60:
            raise Violation("completion channels that no program holds are kept")

    def forged(self) -> None:
        """A forged datagram: truncated, of another version, in the bystander's name from another process, …"""
        chance = self.chance
        name = chance.choice((self.program.id.encode(), b"open-3", b"../../x", b"\xff" * 48, b"1-99999", b""))
        kind = chance.choice((0, 1, 3, 0xFFFF))
        head = struct.pack("<IHHII48s", chance.choice((MAGIC, 0)), chance.choice((LAYOUT_VERSION, 0)), kind,
                           chance.randrange(1 << 32), 0, name)  # fmt: skip
        message = (head + chance.randbytes(chance.choice((0, 8, 200))))[: chance.choice((0, 1, 63, 64, 300))]
        self.play(["datagram", message.hex()])

    def _datagram(self, message: bytes) -> None:
        counters = self.nic.engine.counters
        before = sum(count for what, count in counters.items() if what.startswith("refused_"))
        with contextlib.suppress(OSError):
            self.program._socket.sendto(message, str(self.nic.server.path))
        self.nic.server.serve()
        self.tally.cases += 1
        after = sum(count for what, count in counters.items() if what.startswith("refused_"))
        if after - before != 1:
            raise Violation(f"forged datagram {message[:80].hex()}: {after - before} refusals counted")
        self.tally.refusals["datagram"] += 1

    def check_bystander(self) -> None:
        """It works, and what it had is what it has."""
        context = self.bystander.context
        kinds = {handle: type(item).__name__ for handle, item in context.objects.items()}
        expected = {self.theirs["pd"]: "ProtectionDomain", self.theirs["cq"]: "CompletionQueue",
                    self.theirs["qp"]: "UserQueuePair"}  # fmt: skip
        if kinds != expected:
            raise Violation(f"the bystander has {kinds}")
        query = struct.pack("<II", self.theirs["qp"], 0)
        if self.bystander.call(Command.QUERY_QP, query, 128)[:1] is None:
            raise Violation("the bystander's query fails")


def _address(buffer: bytearray) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def _starve_descriptors(attack: Attack, left: int) -> None:
    """No descriptor is left: each command is still answered, a new open fails cleanly, and all is well afterwards."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = descriptors()
    files = sorted(path.name for path in (attack.nic.run / "ctx").iterdir())
    contexts = set(attack.nic.adapter.contexts)
    fifo = attack.nic.run / "ctx" / "open-77"
    os.mkfifo(fifo)
    answer = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    fillers = [os.open("/dev/null", os.O_RDONLY) for _ in range(highest + 1 - descriptors() + 2)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + left, hard))
    made: list[int] = []
    try:
        head = struct.pack("<IHHII48s", MAGIC, LAYOUT_VERSION, 1, 0, 0, b"open-77")
        attack.program._socket.sendto(head, str(attack.nic.server.path))
        attack.nic.server.serve()
        for _ in range(8):
            error, data, _ = attack.program.raw(struct.pack("<IHHQ", Command.CREATE_COMP_CHANNEL, 4, 1, 0x1000))
            if error not in (0, errno.EMFILE, errno.ENFILE):
                raise Violation(f"without descriptors: errno {error}")
            attack.tally.refusals[errno.errorcode.get(error, "OK")] += bool(error)
            body = struct.pack("<QIIiI", 1, 10, 0, -1, 0)
            message = struct.pack("<IHHQ", Command.CREATE_CQ, 12, 6, 0x1000) + body
            error, data, _ = attack.program.raw(message)
            if error not in (0, errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                raise Violation(f"without descriptors: errno {error}")
            if not error:
                made.append(struct.unpack_from("<I", data)[0])
            attack.tally.cases += 2
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for filler in fillers:
            os.close(filler)
    got = os.read(answer, 64) if attack.nic.engine.counters["refused_open"] or True else b""
    os.close(answer)
    fifo.unlink()
    for identifier in set(attack.nic.adapter.contexts) - contexts:
        attack.nic.adapter.forget(attack.nic.adapter.contexts[identifier])
    if got and struct.unpack_from("<i", got)[0] not in (0, errno.EMFILE, errno.ENFILE):
        raise Violation(f"open without descriptors: errno {struct.unpack_from('<i', got)[0]}")
    for handle in made:
        attack.program.call(Command.DESTROY_CQ, struct.pack("<II", handle, 0), 8)
    context = attack.program.context
    for identity, channel in list(context.comp_channels.items()):
        if not channel.users:
            context.channel.drop_fifo(channel.fifo)
            del context.comp_channels[identity]
    now = sorted(path.name for path in (attack.nic.run / "ctx").iterdir())
    if now != files:
        raise Violation(f"an open that failed left files: {set(now) - set(files)}")
    if descriptors() > before:
        raise Violation(f"{descriptors() - before} descriptors leaked")


@contextmanager
def scene(chance: random.Random, tally: Tally) -> Iterator[Attack]:
    """A program and a bystander; when the body is through the program goes, and nothing of it is left."""
    before = descriptors()
    with upper() as nic:
        attack = Attack(nic, chance, tally)
        try:
            yield attack
            attack.check_bystander()
            nic.adapter.forget(attack.program.context)
            theirs = attack.bystander.context.objects.values()
            left: dict[str, Any] = {
                "keys": nic.adapter.keys,
                "address handles": nic.adapter.ah_numbers,
                "queue pairs": [qp for qp in nic.adapter.queue_pairs.values() if qp not in theirs],
                "multicast": {group: members for group, members in nic.engine.multicast.items() if members},
            }
            for what, items in left.items():
                if items:
                    raise Violation(f"{what} are left of a program that has gone: {items}")
            attack.check_bystander()
        finally:
            attack.close()
    if descriptors() != before:
        raise Violation(f"{descriptors() - before} descriptors leaked")


def one_round(chance: random.Random, tally: Tally) -> None:
    """Some hundred commands of one program, then it goes."""
    tally.begin()
    with scene(chance, tally) as attack:
        for _ in range(COMMANDS_A_ROUND):
            if chance.random() < 0.15:
                attack.forged()
            else:
                attack.one()
        if chance.random() < 0.3:
            attack.play(["starve", chance.randrange(6)])


def replay(_: Any, steps: list[Any], tally: Tally) -> None:
    """What a round has noted."""
    with scene(random.Random(0), tally) as attack:
        for step in steps:
            attack.play(step)


__all__ = ["one_round", "socket"]
