"""Invariant: what Linux refuses is refused with the same errno, before anything is changed.

The whole comparison is tests/interop/test_calls.py, with Linux itself; here are the rules that it found.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable
from typing import Any

import pytest

from softroce_ext.cm import messages as m
from softroce_ext.cm.fields import ece
from softroce_ext.cm.ids import PS_IB, PS_TCP, PS_UDP
from softroce_ext.cm.ucma import Command
from softroce_ext.device.errors import VerbsError
from tests.support.cm.lab import HERE, THERE, Lab
from tests.support.cm.mads import mads

LOOPBACK, ANY = bytes((127, 0, 0, 1)), bytes(4)


def refused(number: int, what: Callable[[], Any]) -> None:
    """It fails with this errno."""
    with pytest.raises(VerbsError) as caught:
        what()
    assert errno.errorcode[caught.value.number] == errno.errorcode[number]


def address(ip: bytes, port: int = 0) -> bytes:
    """struct sockaddr_in."""
    return struct.pack("<H2s4s8x", socket.AF_INET, port.to_bytes(2, "big"), ip)


class Program(Lab):
    """One that makes calls."""

    def create(self, space: int = PS_TCP, kind: int = 2) -> int:
        return int(struct.unpack("<I", self.command(0, struct.pack("<QQHB5x", 7, 0, space, kind)))[0])

    def bind(self, handle: int, ip: bytes, port: int = 0) -> None:
        self.command(Command.BIND, struct.pack("<IHH128s", handle, 16, 0, address(ip, port)))

    def resolve(self, handle: int, ip: bytes, port: int = 7000) -> None:
        body = struct.pack("<IIHHI128s128s", handle, 100, 0, 16, 0, b"", address(ip, port))
        self.command(Command.RESOLVE_ADDR, body)

    def event(self) -> tuple[int, int]:
        """Kind and status of the next one."""
        _, _, kind, status = struct.unpack_from("<QIIi", self.command(Command.GET_EVENT, bytes(8)))
        return kind, status


@pytest.fixture
def program() -> Program:
    return Program()


def test_no_room_for_an_answer_comes_first(program: Program) -> None:
    refused(errno.ENOSPC, lambda: program.command(Command.GET_EVENT, bytes(8), 323))
    refused(errno.ENOSPC, lambda: program.command(Command.DESTROY_ID, struct.pack("<QII", 0, 99, 0), 3))
    refused(errno.ENOSPC, lambda: program.command(Command.QUERY, struct.pack("<QII", 0, program.create(), 0), 271))


def test_a_command_that_is_none(program: Program) -> None:
    refused(errno.ENOSYS, lambda: program.command(Command.GET_OPTION, bytes(64)))
    refused(errno.EINVAL, lambda: program.command(23, bytes(64)))


def test_zeros_stand_for_what_was_not_written(program: Program) -> None:
    handle = program.create()
    program.bind(handle, HERE, 7000)
    program.command(Command.LISTEN, struct.pack("<I", handle))  # no backlog
    refused(errno.EINVAL, lambda: program.command(Command.CONNECT, bytes(279)))


def test_loopback_is_bound_like_any_and_leads_nowhere(program: Program) -> None:
    handle = program.create()
    program.bind(handle, LOOPBACK, 7000)
    refused(errno.EADDRNOTAVAIL, lambda: program.bind(program.create(), HERE, 7000))
    program.resolve(handle, LOOPBACK)
    assert program.event() == (0, 0)  # ADDR_RESOLVED
    refused(errno.ENODEV, lambda: program.command(Command.RESOLVE_ROUTE, struct.pack("<II", handle, 100)))


def test_one_bound_to_the_device_reaches_itself_by_any_address(program: Program) -> None:
    handle = program.create()
    program.bind(handle, HERE)
    program.resolve(handle, ANY)
    assert program.event() == (0, 0)
    refused(errno.EINVAL, lambda: program.command(Command.RESOLVE_ROUTE, struct.pack("<II", handle, 0)))
    program.command(Command.RESOLVE_ROUTE, struct.pack("<II", handle, 100))
    assert program.event() == (2, 0)  # ROUTE_RESOLVED
    cm_id = program.cm.ids[handle]
    assert program.cm.addresses.path(cm_id).destination_ip == HERE


def test_a_path_is_told_although_the_neighbour_is_gone(program: Program) -> None:
    handle = program.create()
    program.resolve(handle, THERE)
    program.command(Command.RESOLVE_ROUTE, struct.pack("<II", handle, 100))
    program.cm.adapter.addressing.resolve = lambda _ip: None
    answer = program.command(Command.QUERY, struct.pack("<QII", 0, handle, 1))
    assert struct.unpack_from("<I", answer) == (1,)
    assert answer[24:56] == bytes(10) + b"\xff\xff" + THERE + bytes(10) + b"\xff\xff" + HERE


@pytest.mark.parametrize(
    ("first", "second", "number"),
    [(HERE, HERE, errno.EADDRINUSE), (HERE, ANY, errno.EADDRNOTAVAIL), (ANY, ANY, errno.EADDRNOTAVAIL)],
)
def test_a_port_that_somebody_has(program: Program, first: bytes, second: bytes, number: int) -> None:
    program.bind(program.create(), first, 7000)
    refused(number, lambda: program.bind(program.create(), second, 7000))
    program.bind(program.create(PS_UDP), second, 7000)  # another port space


def test_who_listens_shares_its_port_no_more(program: Program) -> None:
    handles = [program.create(), program.create()]
    for handle in handles:
        program.cm.ids[handle].reuse = True
        program.bind(handle, HERE, 7000)
    refused(errno.EADDRINUSE, lambda: program.cm.listen(program.cm.ids[handles[0]], 1))
    program.command(Command.DESTROY_ID, struct.pack("<QII", 0, handles[1], 0))
    program.cm.listen(program.cm.ids[handles[0]], 1)
    again = program.create()
    program.cm.ids[again].reuse = True
    refused(errno.EADDRINUSE, lambda: program.bind(again, HERE, 7000))


def test_an_address_has_the_size_of_its_family(program: Program) -> None:
    handle = program.create()
    for family, size in ((socket.AF_INET, 15), (socket.AF_INET6, 16), (1, 16), (99, 0), (0, 16)):
        body = struct.pack("<IHHH126s", handle, size, 0, family, b"")
        refused(errno.EINVAL, lambda body=body: program.command(Command.BIND, body))  # type: ignore[misc]
    mapped = struct.pack("<HHI16sI", socket.AF_INET6, 0, 0, bytes(10) + b"\xff\xff" + HERE, 0)
    body = struct.pack("<IHH128s", handle, 28, 0, mapped)
    refused(errno.EADDRNOTAVAIL, lambda: program.command(Command.BIND, body))


def test_the_infiniband_port_space_chooses_its_type(program: Program) -> None:
    assert [program.cm.ids[program.create(PS_IB, kind)].qp_type for kind in (2, 3, 4, 9)] == [2, 3, 4, 2]


def test_reasons_that_are_not_a_program_s(program: Program) -> None:
    for reason, number in ((6, errno.EINVAL), (8, errno.EINVAL), (0, errno.ENOENT), (35, errno.ENOENT)):
        body = struct.pack("<IBBxx256s", 99, 0, reason, b"")
        refused(number, lambda body=body: program.command(Command.REJECT, body))  # type: ignore[misc]


def test_ece_goes_both_ways() -> None:
    """The vendor's 24 bits and the options, in a REQ and in a REP, and into the event."""
    fields = {"vendor_id": 0x345678}
    request = m.unpack(m.Message(m.Kind.REQ, 1, fields, b"", 0x9ABCDEF0).pack())
    reply = m.Message(
        m.Kind.REP, 1, {"vendor_id_high": 0x34, "vendor_id_middle": 0x56, "vendor_id_low": 0x78}, b"", 0x9ABCDEF0
    )
    assert ece(request) == ece(m.unpack(reply.pack())) == (0x345678, 0x9ABCDEF0)
    assert ece(m.Message(m.Kind.RTU, 1, {})) == (0, 0)


def test_what_cannot_be_accepted_is_rejected(program: Program) -> None:
    program.listener(7174)
    program.mad(mads("cm_rping")[0], THERE)
    _, child, kind, _ = struct.unpack_from("<QIIi", program.command(Command.GET_EVENT, bytes(8)))
    assert kind == 4  # CONNECT_REQUEST
    param = struct.pack("<II256s8B", 17, 0, b"", 197, 0, 1, 1, 0, 7, 7, 1)  # more private data than a REP takes
    body = struct.pack("<Q", 5) + param + struct.pack("<II", child, 0)
    refused(errno.EINVAL, lambda: program.command(Command.ACCEPT, body))
    assert [(message.kind, message["reason"]) for message in program.sent] == [(m.Kind.REJ, 28)]
