"""Commands past the C library: truncated ones, those that rxe does not have, doorbells, multicast groups.

Invariant: the errnos are those of Linux 6.1 with rxe (compared with it in tests/interop/probe/raw_calls.py).
"""

from __future__ import annotations

import errno
import struct

import pytest

from softroce_ext.device import limits
from softroce_ext.transport.verbs import QpState
from softroce_ext.uverbs import abi
from softroce_ext.uverbs.abi import Command
from tests.support.nic.uverbs_program import Program


@pytest.mark.parametrize("command", abi.SIZES)
def test_commands_that_are_cut_do_not_begin(program: Program, command: Command) -> None:
    """ENOSPC, as the kernel says, for a short command and for one without room for its response."""
    needed, room = abi.SIZES[command]
    for size, words in ((needed - 4, room // 4), (needed, room // 4 - 1)):
        if words < 0:
            continue
        error, _, _ = program.raw(struct.pack("<IHH", command, 2 + size // 4, words) + bytes(size))
        assert error == errno.ENOSPC
    assert program.raw(struct.pack("<IHH", 1 << 28 | command, 2, 0))[0] == errno.EINVAL


@pytest.mark.parametrize("command", [12, 15, 21, 22, 29, 36, 37, 60])
def test_commands_that_rxe_has_not(program: Program, command: int) -> None:
    """Among them those that poll and post: rxe's programs do that in shared memory."""
    program.objects()
    assert program.raw(struct.pack("<IHH", command, 18, 16) + bytes(64))[0] == errno.EOPNOTSUPP


def test_a_doorbell_as_a_command(program: Program) -> None:
    """POST_SEND is taken in RTS whatever requests it carries, as rxe does; its sizes are checked."""
    made = program.objects()
    handle = made["qp"]

    def post(count: int, size: int, error: int = 0, what: int = handle) -> None:
        body = struct.pack("<IIII", what, count, 0, size) + bytes(128)
        program.call(Command.POST_SEND, body, 4, error)

    post(0, 128, errno.EINVAL)  # RESET
    qp = program.context.queue_pairs[0]
    qp.transport.attributes.state = QpState.RTS
    post(0, 128)
    post(1, 128)
    post(2, 128, errno.EINVAL)
    post(1, 64, errno.EINVAL)
    post(0, 128, errno.ENOENT, 0x7FFF)
    post(0, 128, errno.EINVAL, made["pd"])
    qp.transport.attributes.state = QpState.RESET


GROUP = bytes(10) + b"\xff\xff" + bytes([239, 0, 0, 1])


def datagram_queue_pair(program: Program, made: dict[str, int]) -> int:
    """The handle of a new UD queue pair."""
    qp = struct.pack("<QIIIIIIIIIBBBx", 0xD3, made["pd"], made["cq"], made["cq"], 0, 1, 1, 1, 1, 0, 0, 4, 0)
    return int(struct.unpack_from("<I", program.call(Command.CREATE_QP, qp, 64))[0])


def test_a_group_is_left_by_the_lid_that_it_was_joined_with(program: Program) -> None:
    """Any LID will do, but it is remembered; a member cannot be destroyed."""
    made = program.objects()
    qp = datagram_queue_pair(program, made)

    def change(command: Command, mlid: int, error: int = 0) -> None:
        program.call(command, struct.pack("<16sIHH", GROUP, qp, mlid, 0), error=error)

    for mlid in (0, 1, 0xBFFF, 0xC000, 0xFFFF):
        change(Command.ATTACH_MCAST, mlid)
        change(Command.DETACH_MCAST, mlid ^ 1, errno.EINVAL)
        program.call(Command.DESTROY_QP, struct.pack("<II", qp, 0), 4, errno.EBUSY)
        change(Command.DETACH_MCAST, mlid)
    change(Command.ATTACH_MCAST, 3)
    change(Command.ATTACH_MCAST, 4)
    change(Command.DETACH_MCAST, 4)
    change(Command.DETACH_MCAST, 3, errno.EINVAL)
    program.call(Command.DESTROY_QP, struct.pack("<II", qp, 0), 4)


@pytest.mark.parametrize(
    ("name", "groups", "members"),
    [("MAX_MCAST_GRP", 2, 1), ("MAX_MCAST_QP_ATTACH", 1, 2), ("MAX_TOTAL_MCAST_QP_ATTACH", 2, 2)],
)
def test_limits_of_groups(
    program: Program, monkeypatch: pytest.MonkeyPatch, name: str, groups: int, members: int
) -> None:
    """ENOMEM at each of the three; who leaves makes room."""
    monkeypatch.setattr(limits, name, {"MAX_MCAST_GRP": 2, "MAX_MCAST_QP_ATTACH": 2}.get(name, groups * members))
    made = program.objects()
    qps = [datagram_queue_pair(program, made) for _ in range(members + 1)]

    def change(command: Command, group: int, qp: int, error: int = 0) -> None:
        program.call(command, struct.pack("<16sIHH", GROUP[:15] + bytes([group]), qp, 0, 0), error=error)

    for group in range(groups):
        for qp in qps[:members]:
            change(Command.ATTACH_MCAST, group, qp)
    group = 0 if name == "MAX_MCAST_QP_ATTACH" else 99
    change(Command.ATTACH_MCAST, group, qps[-1], errno.ENOMEM)
    change(Command.DETACH_MCAST, 0, qps[0])
    change(Command.ATTACH_MCAST, group, qps[-1])
