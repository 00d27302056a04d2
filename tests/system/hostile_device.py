"""An open of the device by a program of ours that speaks the kernel's ABI through the bridge, without libibverbs.

For hostile programs (`hostile_program.py`), which need to say what no library would.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from softroce_ext.device.address_handle import Destination
from softroce_ext.uverbs.abi import EXTENDED, MODIFY_QP, Command
from tests.support.fuzz import scribbler

COMMANDS, DEEDS, LIVES = 200, 201, 202
TALLY_BYTES = 256 * 8
OWN, ATTACKER = bytes([10, 9, 0, 1]), bytes([10, 9, 0, 2])
LOCAL = (Command.POST_SEND, Command.REQ_NOTIFY_CQ)
"""Commands that the bridge may answer itself."""
RC, UC, UD = 2, 3, 4


class Device:
    """An open of the device through the bridge; what `uverbs_program.Program` is to a NIC in the same process."""

    def __init__(self, counts: memoryview) -> None:
        self.counts = counts
        self.fd = os.open("/dev/infiniband/uverbs0", os.O_RDWR | os.O_CLOEXEC)
        self.directory = Path(os.readlink(f"/proc/self/fd/{self.fd}")).parent
        # The file behind the bridge's back, so that it can be cut, too.
        self.queues = os.open(self.directory / "queues", os.O_RDWR | os.O_CLOEXEC)
        self._response = ctypes.create_string_buffer(8 * 2 * 0x10000)

    def raw(self, message: bytes) -> tuple[int, bytes]:
        """One command with the response going to memory of ours: (errno, response)."""
        number = int.from_bytes(message[:4], "little")
        words = int.from_bytes(message[6:8], "little")
        if len(message) >= 16 and (words or number & EXTENDED):
            message = message[:8] + struct.pack("<Q", ctypes.addressof(self._response)) + message[16:]
        self.counts[COMMANDS] += 1
        try:
            os.write(self.fd, message)
        except OSError as error:
            if len(message) >= 24 and number not in LOCAL:
                self.counts[error.errno or 0] += 1
            return error.errno or 0, b""
        return 0, self._response.raw[:256]

    def call(self, command: int, body: bytes, out: int = 0) -> bytes:
        """A command that must succeed."""
        pointer = bytes(8) if out else b""
        error, data = self.raw(
            struct.pack("<IHH", command, (8 + len(pointer) + len(body)) // 4, out // 4) + pointer + body
        )
        if error:
            raise OSError(error, f"command {command}: {os.strerror(error)}")
        return data[:out]


def ring_at(device: Device, offset: int, size: int) -> Any:
    """What of a ring a `scribbler.Peer` looks at."""
    log2, mask = struct.unpack("<II", os.pread(device.queues, 8, offset))
    return SimpleNamespace(offset=offset, size=size, element=1 << log2, mask=mask)


class Objects:
    """GET_CONTEXT, a domain, a channel: what a program begins with."""

    def __init__(self, device: Device) -> None:
        device.call(Command.GET_CONTEXT, b"", 8)
        (self.channel,) = struct.unpack("<i", device.call(Command.CREATE_COMP_CHANNEL, b"", 4))
        (self.pd,) = struct.unpack("<I", device.call(Command.ALLOC_PD, b"", 4))


class Peer(scribbler.Peer):
    """A pair of queue pairs of one kind and one registered page between two that are not."""

    def __init__(self, device: Device, objects: Objects, kind: int, remote: bytes, access: int = 0x1F) -> None:
        """remote: the address that both are connected with: our own, or an attacker's."""
        self.program: Any = device
        self.kind = kind
        self.arena = scribbler.Arena()
        region = struct.pack("<QQQII", self.arena.address, mmap.PAGESIZE, self.arena.address, objects.pd, access)
        self.handle, self.key, _ = struct.unpack("<III", device.call(Command.REG_MR, region, 12))
        made = device.call(Command.CREATE_CQ, struct.pack("<QIIiI", 7, 50, 0, objects.channel, 0), 24)
        handle, _, offset, size = struct.unpack_from("<IIQI", made)
        self.cq: Any = SimpleNamespace(handle=handle, ring=ring_at(device, offset, size))
        shared, srq = 0, None
        if kind == RC and access & 2:
            body = struct.pack("<QIIII", 9, objects.pd, 10, 2, 0)
            made = device.call(Command.CREATE_SRQ, body, 40)
            shared, offset, size = *struct.unpack_from("<I", made), *struct.unpack_from("<QI", made, 16)
            srq = SimpleNamespace(handle=shared, ring=ring_at(device, offset, size))
        self.qps: list[Any] = []
        for _ in range(2):
            body = struct.pack(
                "<QIIIIIIIIIBBBx", 8, objects.pd, handle, handle, shared, 10, 10, 2, 2, 64, 0, kind, srq is not None
            )
            made = device.call(Command.CREATE_QP, body, 64)
            number, qpn = struct.unpack_from("<II", made)
            receive, send = struct.unpack_from("<QI", made, 32), struct.unpack_from("<QI", made, 48)
            self.qps.append(
                SimpleNamespace(
                    handle=number, qpn=qpn, srq=srq, send_ring=ring_at(device, *send),
                    receive_ring=ring_at(device, *receive) if srq is None else None,
                )
            )  # fmt: skip
        self.remote = remote
        self.connect_all()

    def connect_all(self) -> None:
        """To RTS, from whatever state."""
        for here, there in (self.qps, self.qps[::-1]):
            self._to_rts(here, there.qpn)

    def _to_rts(self, qp: Any, qpn: int) -> None:
        to = Destination(bytes(10) + b"\xff\xff" + self.remote, 0, 0, 0, 1, 64, 0, 0, 0, 0, 1, 1).pack()
        rc, connected = self.kind == RC, self.kind != UD
        masks = (
            0x1,
            0x31 | (0x8 if connected else 0x40),
            0x1 | (0x101180 if connected else 0) | (0x28000 if rc else 0),
            0x10001 | (0x2E00 if rc else 0),
        )
        for state, mask in enumerate(masks):
            self.program.call(
                Command.MODIFY_QP,
                MODIFY_QP.pack(
                    to, bytes(32), qp.handle, mask, 0x11111111, 0, 0, qpn, 15, 0, 0, state, state, 3, 0, 0,
                    4, 4, 1, 1, 14, 7, 7, 0, 0,
                ),
            )  # fmt: skip
