"""A host for the sans-IO core: memory, keys, queues and queue pairs, all in plain objects that tests may look into."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from softroce_ext.transport.engine import Engine, EngineConfig
from softroce_ext.transport.interfaces import MemoryFault, ProtectionError, RecvWqe, SendWqe, Sge, WorkCompletion
from softroce_ext.transport.queue_pair import QueuePair
from softroce_ext.transport.services import make_queue_pair
from softroce_ext.transport.state.attributes import Attributes
from softroce_ext.transport.state.movement import Movement
from softroce_ext.transport.state.queue_pair import QueuePairState
from softroce_ext.transport.state.receiver import Receiver
from softroce_ext.transport.state.sender import Sender
from softroce_ext.transport.state.statistics import Statistics
from softroce_ext.transport.verbs import Access, QpType, SendFlag, WrOpcode
from softroce_ext.wire.frame import MAX_FRAME, Buffer, Path, build, udp_source_port

BASE = 0x10000
ALL_ACCESS = int(Access.LOCAL_WRITE | Access.REMOTE_WRITE | Access.REMOTE_READ | Access.REMOTE_ATOMIC)


class Ram:
    """A process's memory from BASE on. Writes are invisible until `flush`, as in the NIC."""

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)
        self.deferred: list[tuple[int, Buffer]] = []
        self.fault: MemoryFault | None = None
        """Of a deferred write, until `flush` tells."""
        self.unmapped: set[int] = set()
        """Addresses whose access faults (at `read`, and at `flush` for a write)."""

    def _check(self, address: int, length: int) -> int:
        at = address - BASE
        if at < 0 or at + length > len(self.data) or any(address <= bad < address + length for bad in self.unmapped):
            raise MemoryFault(address, length)
        return at

    def read(self, address: int, length: int) -> Buffer:
        self._carry_out()
        at = self._check(address, length)
        return memoryview(self.data)[at : at + length]

    def write(self, address: int, data: Buffer) -> None:
        self.deferred.append((address, data))

    def flush(self) -> None:
        self._carry_out()
        fault, self.fault = self.fault, None
        if fault:
            raise fault

    def _carry_out(self) -> None:
        deferred, self.deferred = self.deferred, []
        for address, data in deferred:
            try:
                at = self._check(address, len(data))
            except MemoryFault as error:
                self.fault = self.fault or error
                continue
            self.data[at : at + len(data)] = data


@dataclass
class Region:
    """A memory region: what a key allows."""

    address: int
    length: int
    access: int


class Pd:
    """Keys of one process; lkey and rkey are the same number."""

    def __init__(self, ram: Ram) -> None:
        self.ram = ram
        self.regions: dict[int, Region] = {}
        self.paths: dict[int, Path] = {}
        """Address handles, by number."""

    def address(self, ah_number: int) -> Path:
        if ah_number not in self.paths:
            raise ProtectionError(f"no address handle {ah_number}")
        return self.paths[ah_number]

    def _find(self, key: int, address: int, length: int, access: int) -> tuple[Ram, int]:
        region = self.regions.get(key)
        if (
            region is None
            or address < region.address
            or address + length > region.address + region.length
            or access & ~region.access
        ):
            raise ProtectionError(f"key {key:#x}")
        return self.ram, address

    def local(self, lkey: int, address: int, length: int, access: int) -> tuple[Ram, int]:
        return self._find(lkey, address, length, access)

    def remote(self, rkey: int, address: int, length: int, access: int, qpn: int) -> tuple[Ram, int]:
        return self._find(rkey, address, length, access)

    def invalidate(self, rkey: int, qpn: int) -> None:
        if self.regions.pop(rkey, None) is None:
            raise ProtectionError("no such window")

    def local_operation(self, wqe: SendWqe, qpn: int) -> None:
        if wqe.opcode != WrOpcode.LOCAL_INV:
            raise ProtectionError("no memory windows here")
        self.invalidate(wqe.imm, qpn)


class WorkQueue:
    """A send or receive queue: what was posted, and how far the NIC has fetched and retired."""

    def __init__(self) -> None:
        self.posted: list[Any] = []
        self.fetched = 0
        self.retired = 0

    def fetch(self) -> Any:
        if self.fetched == len(self.posted):
            return None
        self.fetched += 1
        return self.posted[self.fetched - 1]

    def retire(self) -> None:
        assert self.retired < self.fetched, "retired a request that was never fetched"
        self.retired += 1


@dataclass
class Wc:
    """A work completion as it was pushed, with a copy of what its receive's memory held at that moment."""

    wr_id: int
    status: int
    opcode: int
    byte_len: int
    imm: int
    qp_num: int
    src_qp: int
    wc_flags: int
    solicited: bool
    data: bytes = b""


class Cq:
    """Completions in order; `on_push` may look at memory at the very moment of the completion."""

    def __init__(self) -> None:
        self.entries: list[Wc] = []
        self.on_push: Callable[[Wc], None] | None = None
        self.room = float("inf")
        """Completions that it holds."""

    def push(self, completion: WorkCompletion) -> bool:
        wc = Wc(*completion)
        if self.on_push:
            self.on_push(wc)
        if len(self.entries) >= self.room:
            return False
        self.entries.append(wc)
        return True


class Events:
    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []
        self.gone = False
        """The process has ended."""

    def owner_gone(self, qpn: int) -> bool:
        return self.gone

    def qp_event(self, qpn: int, event: int) -> None:
        self.seen.append((qpn, int(event)))


class ByteSink:
    """Builds frames into bytes."""

    def __init__(self, room: int = 64) -> None:
        self.room = room
        self.frames: list[bytes] = []
        self._out = memoryview(bytearray(MAX_FRAME))

    def add(self, path: Path, headers: bytes, payload: Buffer, pad: int) -> None:
        assert self.room > 0, "more frames than there was room for"
        self.room -= 1
        ip_id = path.ip_id
        path.ip_id = ip_id + 1 & 0xFFFF
        self.frames.append(bytes(self._out[: build(path, ip_id, headers, payload, pad, self._out)]))


def mac(number: int) -> bytes:
    return b"\x02\0\0\0\0" + bytes((number,))


def ip(number: int) -> bytes:
    return bytes((10, 0, 0, number))


def ip6(number: int) -> bytes:
    return b"\xfd" + bytes(14) + bytes((number,))


def destination_of(frame: bytes) -> bytes:
    """The destination address of a frame, 4 or 16 bytes."""
    return frame[38:54] if frame[12:14] == b"\x86\xdd" else frame[30:34]


@dataclass
class End:
    """One queue pair with everything that its application would have."""

    qp: QueuePair
    ram: Ram
    pd: Pd
    sq: WorkQueue
    rq: WorkQueue
    scq: Cq
    rcq: Cq
    events: Events
    host: Host

    @property
    def state(self) -> QueuePairState:
        return self.qp.state

    @property
    def attributes(self) -> Attributes:
        return self.qp.attributes

    @property
    def sender(self) -> Sender:
        return self.qp.sender

    @property
    def receiver(self) -> Receiver:
        return self.qp.receiver

    @property
    def movement(self) -> Movement:
        return self.qp.movement

    @property
    def statistics(self) -> Statistics:
        return self.qp.statistics

    def post(self, opcode: WrOpcode, wr_id: int, address: int = BASE, length: int = 0, **more: Any) -> None:
        """Post a send request of one element (or of `sges`) and ring the doorbell."""
        flags = more.pop("flags", int(SendFlag.SIGNALED))
        sges = more.pop("sges", (Sge(address, length, 1),))
        wqe = SendWqe(
            wr_id,
            opcode,
            flags,
            more.pop("imm", 0),
            sum(sge.length for sge in sges),
            sges,
            more.pop("inline", None),
            more.pop("remote_address", BASE),
            more.pop("rkey", 1),
            more.pop("compare_add", 0),
            more.pop("swap", 0),
            more.pop("destination", None),
        )
        assert not more, f"unknown {more}"
        if wqe.inline is not None:
            wqe = wqe._replace(length=len(wqe.inline))
        self.sq.posted.append(wqe)
        self.host.engine.ring(self.qp)

    def receive(self, wr_id: int, address: int = BASE, length: int = 0, sges: tuple[Sge, ...] | None = None) -> None:
        """Post a receive."""
        elements = sges if sges is not None else (Sge(address, length, 1),)
        self.rq.posted.append(RecvWqe(wr_id, sum(sge.length for sge in elements), elements))


class Host:
    """One NIC: an engine, its address, and the frames that are on their way to it."""

    def __init__(self, number: int, config: EngineConfig | None = None) -> None:
        self.number = number
        self.engine = Engine(config)
        self.alive = True
        """A dead host takes no frames and sends none."""
        self.room = 64
        """Frames that it builds before they leave."""

    def turn(self, frames: list[bytes], now: float, batch: int = 64) -> list[bytes]:
        """Receive `frames` in batches, run timers, return the frames to send. Buffers are spoiled after each batch."""
        engine = self.engine
        for begin in range(0, len(frames), batch):
            buffers = [bytearray(frame) for frame in frames[begin : begin + batch]]
            for buffer in buffers:
                engine.receive(memoryview(buffer), now)
            engine.end_of_batch(now)
            for buffer in buffers:
                buffer[:] = b"\xee" * len(buffer)
        engine.on_timer(now)
        return self.pull(now)

    def pull(self, now: float) -> list[bytes]:
        """The frames that the engine wants to send now."""
        frames: list[bytes] = []
        while True:
            sink = ByteSink(self.room)
            if not self.engine.frames_to_send(now, sink):
                return frames
            frames += sink.frames


def end(
    host: Host, qpn: int, memory: int = 1 << 16, *, srq: bool = False, sq_sig_all: bool = False, kind: int = QpType.RC
) -> End:
    """A new queue pair in RESET with its own memory (one region, key 1, all of it) and queues."""
    ram = Ram(memory)
    pd = Pd(ram)
    pd.regions[1] = Region(BASE, memory, ALL_ACCESS)
    sq, rq, scq, rcq, events = WorkQueue(), WorkQueue(), Cq(), Cq(), Events()
    state = QueuePairState(Attributes(qpn, int(kind), sq_sig_all, srq))
    qp = make_queue_pair(state, sq, rq, scq, rcq, pd, events)
    host.engine.add_qp(qp)
    return End(qp, ram, pd, sq, rq, scq, rcq, events, host)


def path_between(a: End, b: End, ipv6: bool = False) -> Path:
    qpns = a.attributes.qpn, b.attributes.qpn
    address = ip6 if ipv6 else ip
    here, there = a.host.number, b.host.number
    return Path(mac(here), mac(there), address(here), address(there), udp_source_port(0, *qpns))


def to_rts(here: End, path: Path, remote_qpn: int, **attributes: Any) -> None:
    """RESET → INIT → RTR → RTS; `attributes` override the defaults."""
    values: dict[str, Any] = {
        "path": path, "path_mtu": 1024, "destination_qpn": remote_qpn, "rq_psn": 0, "max_dest_rd_atomic": 16,
        "min_rnr_timer": 12, "timeout": 14, "retry_cnt": 7, "rnr_retry": 7, "sq_psn": 0, "max_rd_atomic": 16,
        "qp_access_flags": ALL_ACCESS,
    } | attributes  # fmt: skip
    modify = here.qp.modify
    modify({"qp_state": 1, "pkey_index": 0, "port_num": 1, "qp_access_flags": values["qp_access_flags"]})
    names = ("path", "path_mtu", "destination_qpn", "rq_psn", "max_dest_rd_atomic", "min_rnr_timer")
    modify({"qp_state": 2, **{name: values[name] for name in names}})
    last = ("timeout", "retry_cnt", "rnr_retry", "sq_psn", "max_rd_atomic")
    modify({"qp_state": 3, **{name: values[name] for name in last}})


def connect(a: End, b: End, psn_a: int = 0x123456, psn_b: int = 0xFFFFF0, **attributes: Any) -> None:
    """Connect two ends to each other."""
    to_rts(a, path_between(a, b), b.attributes.qpn, sq_psn=psn_a, rq_psn=psn_b, **attributes)
    to_rts(b, path_between(b, a), a.attributes.qpn, sq_psn=psn_b, rq_psn=psn_a, **attributes)
