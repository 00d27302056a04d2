"""The write ABI as a program sees it.

Invariants: a command is answered by its own errno and response, whatever it contains; only the process that opened a
context is obeyed; what is in use cannot be freed; what is freed is gone.
"""

from __future__ import annotations

import ctypes
import errno
import os
import random
import re
import struct
from ctypes import addressof as address_of

import pytest

from softroce_ext.device import completion
from softroce_ext.device.errors import VerbsError
from softroce_ext.native import build
from softroce_ext.transport.interfaces import WorkCompletion
from softroce_ext.uverbs import channel
from softroce_ext.uverbs.abi import Command
from softroce_ext.uverbs.channel import LAYOUT_VERSION
from softroce_ext.uverbs.commands_qp import HANDLERS
from softroce_ext.uverbs.server import MAGIC
from tests.support.nic.uverbs_program import Program, Upper

MEMORY = ctypes.create_string_buffer(64)


def modify(handle: int, mask: int, state: int) -> bytes:
    """struct ib_uverbs_modify_qp with a state, port 1 and P_Key index 0."""
    values = struct.pack("<IIIIIIIHH", handle, mask, 0, 0, 0, 0, 0, 0, 0)
    return bytes(64) + values + bytes([state, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0])


def test_every_command_has_its_handler() -> None:
    """The table is complete."""
    assert set(HANDLERS) == set(map(int, Command))


def test_the_bridge_has_the_same_layout() -> None:
    """The numbers in bridge.h are those of channel.py and server.py."""
    text = (build.SOURCES / "bridge" / "bridge.h").read_text()
    theirs = {name: int(value, 0) for name, value in re.findall(r"#define (\w+) (0x[0-9a-f]+|\d+)u?\b", text)}
    for name in ("AT_PENDING", "AT_LAYOUT", "AT_MAILBOX", "AT_MAY_POST", "AT_DIRTY", "AT_ARMED", "CONTROL_BYTES"):
        assert theirs[name] == getattr(channel, name), name
    assert theirs["LAYOUT_VERSION"] == channel.LAYOUT_VERSION
    assert theirs["HANDLES"] == channel.HANDLES
    assert theirs["MAILBOX_DATA"] == channel.MAILBOX_DATA
    assert theirs["MAGIC"] == MAGIC
    assert theirs["CQ_EXISTS"] == completion.ARM_EXISTS


def test_objects_in_use_are_busy(program: Program) -> None:
    """Bottom up fails with EBUSY, top down works, and a second time there is nothing."""
    made = program.objects()
    pd, cq, qp = (struct.pack("<I", made[name]) for name in ("pd", "cq", "qp"))
    program.call(Command.DEALLOC_PD, pd, error=errno.EBUSY)
    program.call(Command.DESTROY_CQ, cq + bytes(4), 8, error=errno.EBUSY)
    program.call(Command.DESTROY_QP, qp + bytes(4), 4)
    program.call(Command.DESTROY_CQ, cq + bytes(4), 8)
    program.call(Command.DEALLOC_PD, pd)
    program.call(Command.DEALLOC_PD, pd, error=errno.ENOENT)
    assert program.context.objects == {}
    assert program.upper.engine.qps == {}


def test_a_handle_of_another_kind_is_refused(program: Program) -> None:
    """A CQ is no PD."""
    made = program.objects()
    program.call(Command.DEALLOC_PD, struct.pack("<I", made["cq"]), error=errno.EINVAL)


def test_the_doorbell_needs_rts(program: Program) -> None:
    """The byte that the bridge looks at follows the state; a refused transition changes nothing."""
    made = program.objects()

    def may_post() -> int:
        return os.pread(program.queues, 1, 4096 + made["qp"])[0]

    assert may_post() == 0
    program.call(Command.MODIFY_QP, modify(made["qp"], 1, 3), error=errno.EINVAL)
    assert may_post() == 0
    program.call(Command.MODIFY_QP, modify(made["qp"], 0x39, 1))
    assert may_post() == 0
    program.call(Command.MODIFY_QP, modify(made["qp"], 1, 6))
    assert may_post() == 1, "in ERR a post is taken, and flushed"


def test_unread_events_do_not_count_as_reported(program: Program) -> None:
    """ibv_destroy_cq waits until as many events are acknowledged as were reported: only those that were read."""
    made = program.objects()
    cq = program.context.objects[made["cq"]]
    program.call(Command.DESTROY_QP, struct.pack("<II", made["qp"], 0), 4)
    for _ in range(3):
        program.call(Command.REQ_NOTIFY_CQ, struct.pack("<II", made["cq"], 0))
        cq.push(WorkCompletion(1, 0, 0, 0, 0, 0, 0, 0, False))
        cq.push(WorkCompletion(1, 0, 0, 0, 0, 0, 0, 0, False))  # not armed: no event
    assert os.read(program.channel, 8) == struct.pack("<Q", 0xC0)
    reported = program.call(Command.DESTROY_CQ, struct.pack("<II", made["cq"], 0), 8)
    assert struct.unpack("<II", reported) == (1, 0)
    with pytest.raises(BlockingIOError):
        os.read(program.channel, 8)


def test_solicited_notification(program: Program) -> None:
    """Armed for solicited completions: a plain one is silent, a solicited or failed one is an event."""
    made = program.objects()
    cq = program.context.objects[made["cq"]]
    program.call(Command.REQ_NOTIFY_CQ, struct.pack("<II", made["cq"], 1))
    cq.push(WorkCompletion(1, 0, 0, 0, 0, 0, 0, 0, False))
    with pytest.raises(BlockingIOError):
        os.read(program.channel, 8)
    cq.push(WorkCompletion(1, 0, 0, 0, 0, 0, 0, 0, True))
    assert len(os.read(program.channel, 64)) == 8


def test_only_the_opener_is_obeyed(upper: Upper, program: Program) -> None:
    """Another process that knows the context's name changes nothing: the kernel tells who sent."""
    child = os.fork()
    if child == 0:
        head = struct.pack("<IHHII48s", MAGIC, LAYOUT_VERSION, 2, 1, 0, program.id.encode())
        program._socket.sendto(head + struct.pack("<IHHQ", 3, 4, 1, 1), str(upper.server.path))
        os._exit(0)
    os.waitpid(child, 0)
    assert upper.server.serve() == 1
    assert program.context.objects == {}
    with pytest.raises(BlockingIOError):
        os.read(program.reply, 4)


@pytest.mark.parametrize("name", [b"../x", b"open-/../../etc", b"queues", b"open-" + b"0" * 60, b""])
def test_open_writes_to_nothing_but_its_own_fifos(upper: Upper, program: Program, name: bytes) -> None:
    """Names that are not those of an answer's FIFO are ignored."""
    before = len(upper.adapter.contexts)
    program.send(1, name[:48], b"")
    assert len(upper.adapter.contexts) == before


def test_a_fifo_that_is_a_link_or_a_file_is_ignored(upper: Upper, program: Program) -> None:
    """The directory is everybody's."""
    before = len(upper.adapter.contexts)
    (upper.run / "ctx" / "open-7").symlink_to("/etc/hostname")
    (upper.run / "ctx" / "open-8").write_text("precious")
    program.send(1, b"open-7", b"")
    program.send(1, b"open-8", b"")
    assert len(upper.adapter.contexts) == before
    assert (upper.run / "ctx" / "open-8").read_text() == "precious"


def test_noise_is_answered_and_harms_no_program(upper: Upper, program: Program) -> None:
    """Random commands, lengths and bodies: an answer each (an errno or success), and the next program works."""
    made = program.objects()
    noise = random.Random(1)
    for _ in range(1500):
        command = int(noise.choice(list(Command))) if noise.random() < 0.9 else noise.randrange(1 << 32)
        body = bytearray(noise.randbytes(noise.choice([0, 4, 8, 16, 24, 40, 64, 120, 200])))
        if len(body) >= 12 and noise.random() < 0.5:
            struct.pack_into("<I", body, noise.choice([0, 8]), noise.choice(list(made.values())))
        if command == Command.GET_CONTEXT:
            continue
        head = struct.pack("<IHH", command, 0, noise.choice([0, 1, 16, 200]))
        error, _, _ = program.raw(head + bytes(body))
        assert error != errno.EIO, f"command {command:#x} made the NIC stumble: {body.hex()}"
    upper.adapter.forget(program.context)
    assert upper.adapter.keys == {} and upper.adapter.queue_pairs == {} and upper.engine.qps == {}
    other = Program(upper, "open-9")
    assert other.objects()["pd"] == 1


@pytest.mark.parametrize(("kind", "error"), [(2, 0), (3, 0), (4, 0), (8, errno.EOPNOTSUPP), (9, errno.EOPNOTSUPP)])
def test_kinds_of_queue_pairs(program: Program, kind: int, error: int) -> None:
    """RC, UC and UD; raw packets and XRC are refused."""
    made = program.objects()
    qp = struct.pack("<QIIIIIIIIIBBBx", 1, made["pd"], made["cq"], made["cq"], 0, 10, 10, 2, 2, 0, 0, kind, 0)
    program.call(Command.CREATE_QP, qp, 64, error)


def test_a_region_must_be_mapped(program: Program) -> None:
    """EFAULT for what is not there, EINVAL for what wraps, and a key for what is."""
    made = program.objects()

    def register(start: int, length: int, error: int = 0) -> bytes:
        body = struct.pack("<QQQII", start, length, start, made["pd"], 1)
        return program.call(Command.REG_MR, body, 12, error)

    register(0, 4096, errno.EFAULT)
    register((1 << 64) - 4096, 8192, errno.EINVAL)
    memory = ctypes.create_string_buffer(8192)
    page = (ctypes.addressof(memory) + 4095) & ~4095
    register(page, 0, errno.EINVAL)  # no byte and no page
    register(5, 0, errno.EFAULT)
    _, lkey, rkey = struct.unpack("<III", register(page + 5, 0))
    assert lkey == rkey and lkey >> 8 in program.upper.adapter.keys


def test_queue_pairs_share_the_window(program: Program) -> None:
    """One alone has the whole window; many have less each, and never more on the way than a switch buffers."""
    made = program.objects()
    engine = program.upper.engine
    engine.config.window = 384
    qp = struct.pack("<QIIIIIIIIIBBBx", 1, made["pd"], made["cq"], made["cq"], 0, 1, 1, 1, 1, 0, 0, 2, 0)
    for sending in range(1, 21):
        (handle,) = struct.unpack_from("<I", program.call(Command.CREATE_QP, qp, 64))
        program.call(Command.MODIFY_QP, modify(handle, 0x39, 1))
        program.call(Command.MODIFY_QP, modify(handle, 1, 6))
        assert engine.window == min(384, 1024 // sending)
    program.upper.adapter.forget(program.context)
    assert engine.window == 384


RESET, INIT, RTR, RTS, ERR = 0, 1, 2, 3, 6


@pytest.mark.parametrize(
    ("mask", "state", "number"),
    [
        (1, ERR, errno.EINVAL),  # RESET to ERR
        (1 | 1 << 1, INIT, errno.EINVAL),  # a supposed state on the way to INIT
        (1 | 1 << 3, RESET, errno.EINVAL),  # an attribute with a move to RESET
        (1 | 1 << 14, INIT, errno.EINVAL),  # an alternate path
        (1 | 1 << 19, INIT, errno.EINVAL),  # other capabilities
        (1 | 1 << 21, INIT, errno.EOPNOTSUPP),  # a bit that the ABI does not have
    ],
)
def test_masks_that_no_transition_takes(program: Program, mask: int, state: int, number: int) -> None:
    """As Linux rxe refuses them, and nothing has changed."""
    made = program.objects()
    program.call(Command.MODIFY_QP, modify(made["qp"], mask, state), error=number)
    assert program.context.queue_pairs[0].transport.attributes.state == RESET


@pytest.mark.parametrize(
    ("kind", "number"),
    [(0, errno.EINVAL), (1, errno.EINVAL), (8, errno.EOPNOTSUPP), (9, errno.EOPNOTSUPP), (10, errno.EINVAL)],
)
def test_kinds_of_queue_pairs_that_rxe_has_not(program: Program, kind: int, number: int) -> None:
    """Also without a receive queue's CQ, which XRC's senders do not have."""
    made = program.objects()
    qp = struct.pack("<QIIIIIIIIIBBBx", 0xD1, made["pd"], made["cq"], 0, 0, 1, 0, 1, 0, 0, 0, kind, 0)
    program.call(Command.CREATE_QP, qp, 64, error=number)


def test_capabilities_are_answered_as_rxe_answers_them(program: Program) -> None:
    """What was asked for at the creation, with room shared by elements and inline data; what fits in a query."""
    made = program.objects()
    asked = struct.pack("<QIIIIIIIIIBBBx", 0xD2, made["pd"], made["cq"], made["cq"], 0, 10, 20, 2, 3, 100, 0, 2, 0)
    handle, _, *created = struct.unpack_from("<7I", program.call(Command.CREATE_QP, asked, 64))
    assert created == [10, 20, 6, 3, 100]
    queried = struct.unpack_from("<5I", program.call(Command.QUERY_QP, struct.pack("<II", handle, 0), 128), 64)
    assert queried == (15, 31, 6, 3, 100)


def _creates(program: Program, made: dict[str, int]) -> list[tuple[Command, bytes, int]]:
    """A command for each kind of object, and how much it answers."""
    pd, cq = made["pd"], made["cq"]
    at = address_of(MEMORY)
    handle = struct.pack("<QII", 9, pd, 0) + bytes(10) + b"\xff\xff" + bytes([10, 0, 0, 2])
    handle += struct.pack("<IBBBx", 0, 1, 64, 0) + bytes([0, 0, 0, 0, 0, 1, 1, 0])
    return [
        (Command.REG_MR, struct.pack("<QQQII", at, 64, at, pd, 1), 12),
        (Command.ALLOC_MW, struct.pack("<IB3x", pd, 1), 8),
        (Command.CREATE_QP, struct.pack("<QIIIIIIIIIBBBx", 0xD1, pd, cq, cq, 0, 5, 5, 1, 1, 0, 0, 2, 0), 64),
        (Command.CREATE_SRQ, struct.pack("<QIIII", 0xE0, pd, 5, 1, 0), 40),
        (Command.CREATE_AH, handle, 12),
        (Command.CREATE_CQ, struct.pack("<QIIiI", 0xC1, 10, 0, -1, 0), 24),
    ]


def _state(program: Program) -> list[object]:
    """Everything that a create changes."""
    adapter, context = program.upper.adapter, program.context
    numbers = (adapter.keys, adapter.queue_pairs, adapter.engine.qps, adapter.srq_numbers, adapter.ah_numbers)
    users = [(item.handle, item.users) for item in context.objects.values() if hasattr(item, "users")]
    space = context.channel._space
    return [*map(set, numbers), set(context.objects), users, list(space._free)]


def test_a_create_without_a_handle_leaves_nothing_behind(program: Program) -> None:
    """The context's table is full: ENOMEM, and no number, ring or count of users is lost."""
    creates = _creates(program, program.objects())
    for command, body, out in creates:
        program.call(command, body, out)
    before = _state(program)
    with pytest.raises(VerbsError):
        while True:
            program.context.handles.take()
    for command, body, out in creates:
        program.call(command, body, out, error=errno.ENOMEM)
        assert _state(program) == before, command.name


def test_a_create_without_memory_leaves_nothing_behind(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tmpfs of the rings is full, at each ring that a create makes."""
    creates = [
        item for item in _creates(program, program.objects()) if item[0] in (Command.CREATE_QP, Command.CREATE_SRQ)
    ]
    before = _state(program)
    real = os.posix_fallocate
    for command, body, out in creates:
        for rings in range(2 if command == Command.CREATE_QP else 1):
            left = [rings]

            def full(fd: int, offset: int, size: int, left: list[int] = left) -> None:
                if not left[0]:
                    raise OSError(errno.ENOSPC, "full")
                left[0] -= 1
                real(fd, offset, size)

            with monkeypatch.context() as patch:
                patch.setattr(os, "posix_fallocate", full)
                program.call(command, body, out, error=errno.ENOMEM)
            assert _state(program) == before, command.name


def test_the_numbers_of_shared_receive_queues(program: Program) -> None:
    """Two that live have different ones; one that is destroyed gives its number back."""
    made = program.objects()
    handles = []
    for _ in range(2):
        answer = program.call(Command.CREATE_SRQ, struct.pack("<QIIII", 0xE0, made["pd"], 5, 1, 9), 40)
        handle, max_wr, max_sge, srqn = struct.unpack_from("<4I", answer)
        assert (max_wr, max_sge, srqn) == (5, 1, 0)
        handles.append(handle)
    numbers = program.upper.adapter.srq_numbers
    assert len(numbers) == 2
    program.call(Command.MODIFY_SRQ, struct.pack("<IIIIQ", handles[0], 2, 0, 8, 0), error=errno.EINVAL)
    for handle in handles:
        program.call(Command.DESTROY_SRQ, struct.pack("<II", handle, 0), 4)
    assert numbers == set()
