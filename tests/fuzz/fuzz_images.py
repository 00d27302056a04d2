"""Damaged images: a NIC image with a right checksum and any field changed, and management requests of any shape.

Invariants: an image is restored whole or refused by an ImageError (one line, naming the place) with nothing left: no
context, object, key, number, descriptor or file; a restored one can be resumed, can send, can be dumped again and
forgotten, whatever its numbers are. A request to the management socket is answered, by an error or by success.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import random
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from softroce_ext.device import checkpoint, image
from softroce_ext.device.errors import ImageError
from softroce_ext.uverbs.abi import Command
from softroce_ext.uverbs.channel import FileChannel
from tests.fuzz.fuzz_commands import descriptors, upper
from tests.fuzz.fuzz_rings import Loop
from tests.support.fuzz.rounds import Tally, Violation
from tests.support.fuzz.scribbler import Peer, install_guard
from tests.support.nic.uverbs_program import Program, Upper

MUTATIONS = 25
VALUES: tuple[Any, ...] = (
    0, 1, -1, 2, 3, 4, 7, 31, 32, 63, 64, 255, 256, 4095, 4096, 65535, 65536, 2**24 - 1, 2**24, 2**31, 2**32 - 1, 2**32,
    2**63, 2**64 - 1, 2**64, 10**40, 1.5, -0.0, 1e308, None, True, False, "", "0", "zz", "00", "ff" * 16, "ff" * 5000,
    "comp-0", "../../x", "1-0", [], [0], [[]], {}, {"a": 1},
)  # fmt: skip


def full_program(nic: Upper, chance: random.Random) -> tuple[Program, list[Peer]]:
    """A program with objects of every kind and traffic under way."""
    program = Program(nic)
    made = program.objects()
    peers = [Peer(nic, program, kind, srq) for kind, srq in ((2, False), (3, False), (4, False), (2, True))]
    (window,) = struct.unpack_from("<I", program.call(Command.ALLOC_MW, struct.pack("<IB3x", made["pd"], 2), 8))
    region = next(item for item in program.context.objects.values() if type(item).__name__ == "MemoryRegion")
    item = program.context.objects[window]
    item.region, item.iova, item.end, item.access = region, region.iova, region.end, 7
    region.windows += 1
    loop = Loop(nic)
    for peer in peers:
        for qp in peer.qps:
            for _ in range(chance.randrange(4)):
                opcode = chance.choice((0, 2, 4, 5)) if peer.kind == 2 else 2
                length = 8 if opcode == 5 else chance.choice((8, 3000))
                sges = [(peer.arena.address, length, peer.key)]
                peer.post(qp.send_ring, peer.send(1, opcode, 2, sges, address=peer.arena.address, rkey=peer.key))
            peer.ring(qp)
            if qp.receive_ring is not None and chance.random() < 0.7:
                peer.post(qp.receive_ring, peer.receive(3, [(peer.arena.address, 4096, peer.key)]))
    for _ in range(chance.randrange(4)):
        loop.round()
    for qp in program.context.queue_pairs:
        qp.transport.stop()
    nic.engine.end_of_batch(loop.now)
    program.context.held = True
    return program, peers


def places(plain: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place of a JSON value, as keys from the root."""
    found = [path] if path else []
    if isinstance(plain, dict):
        for key, value in plain.items():
            found += places(value, (*path, key))
    elif isinstance(plain, list):
        for index, value in enumerate(plain):
            found += places(value, (*path, index))
    return found


def change(plain: Any, chance: random.Random) -> list[Any]:
    """A change of one place: [path, deed, value]; deeds: "append" it once more, "delete", "add", "set"."""
    path = chance.choice(places(plain))
    holder = plain
    for key in path[:-1]:
        holder = holder[key]
    deed = chance.randrange(6)
    if deed == 0 and isinstance(holder, list):
        return [list(path), "append", None]
    if deed == 1:
        return [list(path), "delete", None]
    if deed == 2 and isinstance(holder[path[-1]], int):
        return [list(path), "add", chance.choice((1, -1, 64, 4096, 65536))]
    return [list(path), "set", chance.choice(VALUES)]


def apply(plain: Any, step: list[Any]) -> None:
    """Carry a change out; what it puts in is a copy, since later changes may change that."""
    (*path, key), deed, value = copy.deepcopy(step)
    holder = plain
    for part in path:
        holder = holder[part]
    if deed == "append":
        holder.append(holder[key])
    elif deed == "delete":
        del holder[key]
    elif deed == "add":
        holder[key] += value
    else:
        holder[key] = value


def write(path: Path, text: bytes, packed: bytes) -> None:
    """An image file with a right checksum."""
    body = image.MAGIC + struct.pack("<QQ", len(text), len(packed)) + text + packed
    path.write_bytes(body + struct.pack("<I", zlib.crc32(body)))


def check_empty(nic: Upper, why: str) -> None:
    """Nothing of a refused image is here."""
    left = {
        "contexts": nic.adapter.contexts, "keys": nic.adapter.keys, "queue pairs": nic.adapter.queue_pairs,
        "engine": nic.engine.qps, "address handles": nic.adapter.ah_numbers,
        "groups": {group for group, members in nic.engine.multicast.items() if members},
        "files": list((nic.run / "ctx").iterdir()),
    }  # fmt: skip
    for what, items in left.items():
        if items:
            raise Violation(f"{why}: {what} left: {items}")


def run_it(nic: Upper) -> None:
    """A restored program continues (its process does not exist, so its memory faults), is dumped again and goes."""
    loop = Loop(nic)
    for context in list(nic.adapter.contexts.values()):
        for qp in context.queue_pairs:
            qp.transport.resume(None)
    for step in range(6):
        loop.now += 0.5 * step
        loop.round()
        for frame in loop.frames[:8]:
            nic.engine.receive(memoryview(bytearray(frame)), loop.now)
        nic.engine.end_of_batch(loop.now)
    checkpoint.dump(nic.adapter, list(nic.adapter.contexts.values()))
    for context in list(nic.adapter.contexts.values()):
        context.summary()
        nic.adapter.forget(context)


class Lab:
    """A NIC with a program whose image was taken, and another that gets it."""

    def __init__(self, nic: Upper, other: Upper, seed: int) -> None:
        """seed: of what the program was doing."""
        self.nic, self.other = nic, other
        self.program, self._peers = full_program(nic, random.Random(seed))
        made, rings = checkpoint.dump(nic.adapter, [self.program.context])
        self.text = made.model_dump_json()
        self.packed = zlib.compress(rings.bytes(), 1)

    def case(self, steps: list[Any], tally: Tally) -> None:
        """Restore the image with changes; a step ["rings", n]: n zero bytes instead of what the rings held."""
        path = self.nic.run / "image"
        plain, blob = json.loads(self.text), self.packed
        for step in steps:
            if step[0] == "rings":
                blob = zlib.compress(bytes(step[1]), 9)
            else:
                apply(plain, step)
        write(path, json.dumps(plain).encode(), blob)
        tally.cases += 1
        before = descriptors()
        try:
            checkpoint.restore(self.other.adapter, *image.read(path), self._channel)
        except ImageError as error:
            if not steps:
                raise Violation(f"the image as it was is refused: {error}") from error
            tally.refusals[type(error.__cause__ or error).__name__] += 1
        else:
            try:
                run_it(self.other)
            except Exception as error:
                raise Violation(f"restored with {steps} changed, then: {error!r}") from error
        check_empty(self.other, str(steps))
        if descriptors() != before:
            gc.collect()  # an error's frames refer to what was half made until the next collection
        if descriptors() != before:
            raise Violation(f"{steps}: {descriptors() - before} descriptors leaked")

    def _channel(self, identifier: str, owner: tuple[int, int], taken: list[tuple[int, int]]) -> FileChannel:
        return FileChannel(self.other.run, identifier, owner, taken)

    def close(self) -> None:
        """Close the program's descriptors."""
        for descriptor in (self.program.reply, self.program.queues, self.program.channel):
            os.close(descriptor)
        self.program._socket.close()


@contextmanager
def lab(seed: int) -> Iterator[Lab]:
    """Both NICs."""
    install_guard()
    with upper() as nic, upper() as other:
        made = Lab(nic, other, seed)
        gc.collect()
        try:
            yield made
        finally:
            made.close()


def one_round(chance: random.Random, tally: Tally) -> None:
    """One program's image, changed in many ways."""
    seed = chance.randrange(1 << 32)
    with lab(seed) as here:
        for number in range(MUTATIONS + 1):
            tally.begin(seed)
            plain = json.loads(here.text)
            for _ in range(chance.choice((1, 1, 1, 2, 4)) if number else 0):
                tally.steps.append(change(plain, chance))
                apply(plain, tally.steps[-1])
            if number and chance.random() < 0.01:
                tally.steps.append(["rings", chance.choice((0, 1, 1 << 22))])
            here.case(tally.steps, tally)


def replay(seed: int, steps: list[Any], tally: Tally) -> None:
    """One image with these changes; seed: of what its program was doing."""
    tally.begin(seed)
    tally.steps = steps
    with lab(seed) as here:
        here.case(steps, tally)
