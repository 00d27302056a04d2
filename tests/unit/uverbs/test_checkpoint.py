"""Contexts to an image and back.

Invariants: dump → restore → dump is the identity, wherever it is restored; a damaged image is refused with an error and
nothing is left; what is already here is never overwritten.
"""

from __future__ import annotations

import os
import random
import struct
import warnings
from collections.abc import Callable
from ctypes import addressof as address_of
from ctypes import create_string_buffer
from pathlib import Path

import pytest

from softroce_ext.device import checkpoint, image
from softroce_ext.device.address_handle import AddressHandle
from softroce_ext.device.errors import ImageError
from softroce_ext.device.regions import MemoryRegion, ProtectionDomain
from softroce_ext.device.user_context import UserContext
from softroce_ext.transport.interfaces import ProtectionError, SendWqe, WorkCompletion
from softroce_ext.transport.state.receiver import Acknowledge, ReadAnswer, ResponderResource
from softroce_ext.transport.verbs import Access, QpState, WrOpcode
from softroce_ext.uverbs.abi import Command
from softroce_ext.uverbs.channel import FileChannel
from softroce_ext.wire.frame import Path as WirePath
from tests.support.nic.uverbs_program import IP, Program, Upper

Make = Callable[..., Upper]
MEMORY = create_string_buffer(64)


@pytest.fixture
def full(program: Program) -> Program:
    """A program with one object of every kind, a connected queue pair, posted and completed work, unread events."""
    made = program.objects()
    pd, cq, qp = made["pd"], made["cq"], made["qp"]
    program.call(Command.REG_MR, struct.pack("<QQQII", address_of(MEMORY), 64, address_of(MEMORY), pd, 0x1F), 12)
    program.call(Command.ALLOC_MW, struct.pack("<IB3x", pd, 1), 8)
    program.call(Command.CREATE_SRQ, struct.pack("<QIIII", 5, pd, 10, 1, 3), 40)
    destination = bytes(10) + b"\xff\xff" + bytes([10, 0, 0, 2])
    handle = (
        struct.pack("<QII", 9, pd, 0)
        + destination
        + struct.pack("<IBBBx", 0, 1, 64, 0)
        + bytes([0, 0, 0, 0, 0, 1, 1, 0])
    )
    program.call(Command.CREATE_AH, handle, 12)
    vector = destination + struct.pack("<IHHBBBBBBBB", 0, 0, 0, 1, 64, 0, 0, 0, 0, 1, 1)
    values = struct.pack("<IIIIIIIHH", qp, 0x39, 0, 0, 0, 0, 7, 0, 0)
    program.call(Command.MODIFY_QP, bytes(64) + values + bytes([1, 0, 0, 0, 0, 0, 0, 0, 1] + [0] * 7))
    values = struct.pack("<IIIIIIIHH", qp, 0x121181 | 0x8000, 0, 100, 0, 0x20010, 7, 0, 0)
    program.call(Command.MODIFY_QP, vector + bytes(32) + values + bytes([2, 0, 5, 0, 0, 0, 4, 12, 1] + [0] * 7))
    values = struct.pack("<IIIIIIIHH", qp, 0x12E01, 0, 0, 200, 0, 0, 0, 0)
    program.call(Command.MODIFY_QP, bytes(64) + values + bytes([3, 0, 0, 0, 0, 4, 0, 0, 1, 14, 7, 7] + [0] * 4))
    context = program.context
    program.call(Command.REQ_NOTIFY_CQ, struct.pack("<II", cq, 0))
    for number in range(3):
        context.objects[cq].push(WorkCompletion(number, 0, 1, 2, 3, 4, 5, 6, False))
    ring = context.objects[qp].send_ring
    os.pwrite(program.queues, struct.pack("<I", 5), ring.offset + 128)
    ring.fetch()
    context.held = True
    context.objects[qp].transport.stop()
    return program


def restored(upper: Upper, path: Path, addresses: dict[bytes, bytes] | None = None) -> list[UserContext]:
    """Restore an image file into a NIC."""

    def channel(identifier: str, owner: tuple[int, int], taken: list[tuple[int, int]]) -> FileChannel:
        return FileChannel(upper.run, identifier, owner, taken)

    return checkpoint.restore(upper.adapter, *image.read(path), channel, addresses)


def written(upper: Upper, path: Path) -> Path:
    """Write the image of all contexts."""
    image.write(path, *checkpoint.dump(upper.adapter, list(upper.adapter.contexts.values())))
    return path


def test_round_trip(full: Program, second_upper: Make, tmp_path: Path) -> None:
    """Every object, handle, key, number, index, ring byte and the queue pair's whole context."""
    first = written(full.upper, tmp_path / "first")
    other = second_upper()
    (context,) = restored(other, first)
    assert set(context.objects) == set(full.context.objects)
    assert {k: type(v) for k, v in context.objects.items()} == {k: type(v) for k, v in full.context.objects.items()}
    assert set(other.adapter.keys) == set(full.upper.adapter.keys)
    assert set(other.engine.qps) == set(full.upper.engine.qps)
    assert context.held and context.pid is None
    before, _ = image.read(first)
    after, _ = image.read(written(other, tmp_path / "second"))
    # Only the way out differs: the frames carry the new host's MAC.
    there, here = (dump.contexts[0].qps[0].state["attributes"] for dump in (before, after))
    assert WirePath.from_plain(here["path"]).source_mac == other.adapter.mac
    here["path"]["source_mac"] = there["path"]["source_mac"]
    for ah, ah_there in zip(after.contexts[0].ahs, before.contexts[0].ahs, strict=True):
        assert WirePath.from_plain(ah.path).source_mac == other.adapter.mac
        ah.path["source_mac"] = ah_there.path["source_mac"]
    assert after.contexts == before.contexts


def test_a_read_that_was_being_answered(full: Program, second_upper: Make, tmp_path: Path) -> None:
    """Its memory is not there before the program is: the partner asks again. Its queue pair must not fail for it."""
    transport = full.context.queue_pairs[0].transport
    receiver = transport.receiver
    resource = ResponderResource(100, 4, 1, False, 0, address_of(MEMORY), 1, 4 * transport.attributes.path_mtu)
    receiver.resources.append(resource)
    receiver.answers.extend([Acknowledge(99, 31, 0), ReadAnswer(resource, 2)])
    (moved,) = restored(second_upper(), written(full.upper, tmp_path / "image"))
    after = moved.queue_pairs[0].transport.receiver
    assert [type(answer) for answer in after.answers] == [Acknowledge]
    assert list(after.resources) == list(receiver.resources), "it can be answered when it is asked for again"


def test_an_answer_that_a_datagram_queue_pair_had(program: Program, second_upper: Make, tmp_path: Path) -> None:
    """Earlier versions gave it one when its receive's memory was gone. It has no way out, and is no reason to stay."""
    made = program.objects()
    qp = struct.pack("<QIIIIIIIIIBBBx", 0xD1, made["pd"], made["cq"], made["cq"], 0, 1, 1, 1, 1, 0, 0, 4, 0)
    handle, _ = struct.unpack_from("<II", program.call(Command.CREATE_QP, qp, 64))
    failed = program.context.objects[handle].transport
    failed.attributes.state = QpState.ERR
    failed.receiver.answers.append(Acknowledge(0, 0x64, 0))
    program.context.held = True
    for queue_pair in program.context.queue_pairs:
        queue_pair.transport.stop()
    (moved,) = restored(second_upper(), written(program.upper, tmp_path / "image"))
    assert not moved.objects[handle].transport.receiver.answers


def test_address_handles_that_moved_here_share_their_numbers(full: Program, second_upper: Make, tmp_path: Path) -> None:
    """A number is free once it is unused here: else a program's next handle could take another's destination."""
    other = second_upper()
    adapter = other.adapter
    local = Program(other, "open-5")
    pd = ProtectionDomain(adapter.keys)
    local.context.add(pd)
    (handle,) = full.context.of(AddressHandle)
    mine = adapter.create_address_handle(local.context, pd, handle.attributes)
    assert mine.number == handle.number
    (moved,) = restored(other, written(full.upper, tmp_path / "image"))
    (theirs,) = moved.of(AddressHandle)
    adapter.destroy(moved, theirs)
    assert mine.number in adapter.ah_numbers
    adapter.forget(moved)
    assert mine.number in adapter.ah_numbers
    adapter.destroy(local.context, mine)
    assert mine.number not in adapter.ah_numbers


def test_windows_stay_what_they_are(full: Program, second_upper: Make, tmp_path: Path) -> None:
    """Bound ones to their region, range, rights and queue pair, and nobody else's; free ones free; all bind again."""
    context = full.context
    pd, region, qpn = context.of(ProtectionDomain)[0], context.of(MemoryRegion)[0], context.queue_pairs[0].qpn
    at = region.start + 8

    def bind(where: ProtectionDomain, window: int, key: int) -> None:
        request = SendWqe(
            0, WrOpcode.BIND_MW, 0, 0, 16, (), None, at, key, region.key, window << 32 | Access.REMOTE_WRITE, None
        )
        where.local_operation(request, qpn)

    keys = []
    for kind in (1, 2, 2):
        _, key = struct.unpack("<II", full.call(Command.ALLOC_MW, struct.pack("<IB3x", pd.handle, kind), 8))
        keys.append(key & ~0xFF | (key + 1) & 0xFF)
        bind(pd, key, keys[-1])
    pd.invalidate(keys[2], qpn)
    (there,) = restored(second_upper(), written(full.upper, tmp_path / "image"))
    moved = there.of(ProtectionDomain)[0]
    for key, user, opens in ((keys[0], qpn, True), (keys[0], qpn + 1, True), (keys[1], qpn, True),
                             (keys[1], qpn + 1, False), (keys[2], qpn, False)):  # fmt: skip
        for address, length, access in ((at, 16, 2), (at - 1, 2, 2), (at, 17, 2), (at, 16, 4)):
            if opens and (address, length, access) == (at, 16, 2):
                assert moved.remote(key, address, length, access, user)[1] == at
            else:
                with pytest.raises(ProtectionError):
                    moved.remote(key, address, length, access, user)
    assert there.of(MemoryRegion)[0].windows == 2
    with pytest.raises(ProtectionError):
        moved.invalidate(keys[1], qpn + 1)
    with pytest.raises(ProtectionError):
        bind(moved, keys[1], keys[1] ^ 1)
    moved.invalidate(keys[1], qpn)
    for key in keys:
        bind(moved, key, key ^ 1)
        assert moved.remote(key ^ 1, at, 16, 2, qpn)[1] == at


def test_new_objects_do_not_clash_with_restored_ones(full: Program, second_upper: Make, tmp_path: Path) -> None:
    """Handles go on where they were; the other NIC's numbers come from its own range; rings do not overlap."""
    other = second_upper()
    (context,) = restored(other, written(full.upper, tmp_path / "image"))
    taken = {
        (ring.offset, ring.size) for ring in (item.ring for item in context.objects.values() if hasattr(item, "ring"))
    }
    fresh = context.channel.completion_ring(10)
    assert all(fresh.offset + fresh.size <= at or at + size <= fresh.offset for at, size in taken)
    assert context.handles.take() not in context.objects
    mine = Program(other, "open-5").objects()
    assert mine["qpn"] not in full.upper.engine.qps


def test_an_address_that_changes(full: Program, second_upper: Make, tmp_path: Path) -> None:
    """addresses={there: here} gives every queue pair its new source; without it the old one stays."""
    path = written(full.upper, tmp_path / "image")
    here = bytes([10, 0, 0, 9])
    for base, addresses, expected in ((2, {IP: here}, here), (3, None, IP)):
        (context,) = restored(second_upper(base), path, addresses)
        qp_path = context.queue_pairs[0].transport.attributes.path
        assert qp_path is not None and qp_path.source_ip == expected
        # Nothing was ever sent on it: its partner must hear of another address all the same.
        assert context.queue_pairs[0].transport.movement.resume_pending == (addresses is not None)


def test_what_is_here_is_not_overwritten(full: Program, second_upper: Make, tmp_path: Path) -> None:
    """The same context, the same key, the same QPN: refused, and what was there is unharmed."""
    path = written(full.upper, tmp_path / "image")
    with pytest.raises(ImageError, match=f"context {full.id} exists here already"):
        restored(full.upper, path)
    same_base = second_upper(1)
    same_base.server._counter = 100
    Program(same_base).objects()
    before = dict(same_base.engine.qps)
    with pytest.raises(ImageError, match=r"QPN \d+ is taken here"):
        restored(same_base, path)
    assert same_base.engine.qps == before


def test_every_damaged_byte_is_noticed(full: Program, second_upper: Make, tmp_path: Path) -> None:
    """Flip one bit anywhere, cut anywhere: an ImageError, nothing restored, no files."""
    path = written(full.upper, tmp_path / "image")
    data = path.read_bytes()
    other = second_upper()
    noise = random.Random(2)
    for _ in range(200):
        damaged = bytearray(data)
        damaged[noise.randrange(len(data))] ^= 1 << noise.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(ImageError):
            restored(other, path)
        path.write_bytes(data[: noise.randrange(len(data))])
        with pytest.raises(ImageError):
            restored(other, path)
    assert other.adapter.contexts == {} and list((other.run / "ctx").iterdir()) == []


def test_an_image_of_an_older_nic_is_refused_by_its_version(full: Program, second_upper: Make, tmp_path: Path) -> None:
    """Its fields are others (version 3 had a queue pair's `context`): the message is about the version all the same."""
    made, rings = checkpoint.dump(full.upper.adapter, [full.context])
    plain = made.model_dump()
    plain["version"] = 3
    for record in plain["contexts"][0]["qps"]:
        record["context"] = record.pop("state")
    path = tmp_path / "image"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydantic sees that this is not an image; the file shall have it
        image.write(path, image.Image.model_construct(**plain), rings)
    with pytest.raises(ImageError, match=f"a NIC image of version 3, this NIC reads version {image.VERSION}"):
        restored(second_upper(), path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["pds"].clear(), "refers to handle"),
        (lambda c: c["pds"].append(c["pds"][0]), "two objects have handle"),
        (lambda c: c["qps"][0].update(send_cq=c["pds"][0]["handle"]), "its completion queues are something else"),
        (lambda c: c["qps"][0]["state"].update(version=99), "version 99, this NIC reads"),
        (lambda c: c["qps"][0]["state"]["sender"].pop("una_psn"), r"sender.una_psn is missing"),
        (lambda c: c["qps"][0]["state"]["sender"].update(una_psn="7"), r"sender.una_psn is '7', expected int"),
        (
            lambda c: c["qps"][0]["state"]["statistics"].update(gap_last="x"),
            r"statistics.gap_last is 'x', expected a number",
        ),
        (lambda c: c["qps"][0]["send_ring"].update(offset=c["cqs"][0]["ring"]["offset"]), "overlap"),
        (lambda c: c["cqs"][0]["ring"].update(mask=6), "no powers of two"),
        (lambda c: c["cqs"][0].update(notify=7), r"contexts.0.cqs.0.notify: Input should be less"),
        (lambda c: c.update(id="../../x"), r"contexts.0.id: String should match"),
        (lambda c: c["mws"][0].update(kind=3), r"contexts.0.mws.0.kind: Input should be less"),
        (lambda c: c.update(surprise=1), r"contexts.0.surprise: Extra inputs"),
    ],
)
def test_images_that_contradict_themselves(
    full: Program, second_upper: Make, tmp_path: Path, change: Callable[[dict[str, object]], object], message: str
) -> None:
    """A whole image (checksum right) with a wrong field: the error names it, all or nothing."""
    made, rings = checkpoint.dump(full.upper.adapter, [full.context])
    plain = made.model_dump()
    change(plain["contexts"][0])
    path = tmp_path / "image"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydantic sees that this is not an image; the file shall have it
        image.write(path, image.Image.model_construct(**plain), rings)
    other = second_upper()
    with pytest.raises(ImageError, match=message):
        restored(other, path)
    assert other.adapter.contexts == {} and other.adapter.keys == {} and other.engine.qps == {}
    assert list((other.run / "ctx").iterdir()) == []
