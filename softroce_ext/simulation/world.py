"""A world for the sans-IO core: hosts with memory, keys and queues, a seeded bad network, and a clock that is a number.

Nothing here sleeps or does input or output. A `Link` has a bandwidth, a delay and a queue, and may lose, reorder,
duplicate and corrupt frames from a seed; a `World` moves time from one event to the next, and raises `Stuck` when
nothing will ever happen again.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from softroce_ext.transport.context import QpContext
from softroce_ext.transport.engine import Engine, EngineConfig
from softroce_ext.transport.interfaces import MemoryFault, ProtectionError, RecvWqe, SendWqe, Sge
from softroce_ext.transport.qp import QueuePair
from softroce_ext.transport.verbs import Access, QpType, SendFlag, WrOpcode
from softroce_ext.wire.frame import MAX_FRAME, Buffer, Path, build, udp_source_port

BASE = 0x10000
ALL_ACCESS = int(Access.LOCAL_WRITE | Access.REMOTE_WRITE | Access.REMOTE_READ | Access.REMOTE_ATOMIC)


class Stuck(AssertionError):
    """The run did not reach what it waited for."""


class Ram:
    """A process's memory from BASE on. Writes are invisible until `flush`, as in the NIC."""

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)
        self.deferred: list[tuple[int, Buffer]] = []
        self.unmapped: set[int] = set()
        """Addresses whose access faults (at `read`, and at `flush` for a write)."""

    def _check(self, address: int, length: int) -> int:
        at = address - BASE
        if at < 0 or at + length > len(self.data) or any(address <= bad < address + length for bad in self.unmapped):
            raise MemoryFault(address, length)
        return at

    def read(self, address: int, length: int) -> Buffer:
        at = self._check(address, length)
        return memoryview(self.data)[at : at + length]

    def write(self, address: int, data: Buffer) -> None:
        self.deferred.append((address, data))

    def flush(self) -> None:
        deferred, self.deferred = self.deferred, []
        fault = None
        for address, data in deferred:
            try:
                at = self._check(address, len(data))
            except MemoryFault as error:
                fault = fault or error
                continue
            self.data[at : at + len(data)] = data
        if fault:
            raise fault


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

    def remote(self, rkey: int, address: int, length: int, access: int) -> tuple[Ram, int]:
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

    def push(self, *values: Any) -> None:
        wc = Wc(*values)
        if self.on_push:
            self.on_push(wc)
        self.entries.append(wc)


class Events:
    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

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
    def context(self) -> QpContext:
        return self.qp.context

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
            sink = ByteSink()
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
    qp = QueuePair(QpContext(qpn, sq_sig_all, srq, int(kind)), sq, rq, scq, rcq, pd, None, events)
    host.engine.add_qp(qp)
    return End(qp, ram, pd, sq, rq, scq, rcq, events, host)


def path_between(a: End, b: End, ipv6: bool = False) -> Path:
    qpns = a.context.qpn, b.context.qpn
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
    to_rts(a, path_between(a, b), b.context.qpn, sq_psn=psn_a, rq_psn=psn_b, **attributes)
    to_rts(b, path_between(b, a), a.context.qpn, sq_psn=psn_b, rq_psn=psn_a, **attributes)


@dataclass
class Link:
    """The network: delivers to whoever has the destination address; impairments are probabilities per frame."""

    seed: int = 0
    loss: float = 0.0
    reorder: float = 0.0
    duplicate: float = 0.0
    corrupt: float = 0.0
    delay: float = 10e-6
    spacing: float = 0.0
    """Seconds between two frames on the wire: with some, frames arrive one by one instead of in batches."""
    drop: Callable[[bytes], bool] | None = None
    """Besides: frames to lose on purpose."""
    bandwidth: float = 0.0
    """Bit/s; 0: without limit."""
    queue: int = 0
    """Bytes that may wait for the wire; what comes then is lost. 0: without limit."""
    jitter: float = 0.0
    """Seconds; each frame's delay is longer by up to that (and frames may overtake each other)."""
    log: list[tuple[float, str, bytes]] | None = None
    """When it is a list: what became of each frame."""
    faults: dict[str, int] = field(default_factory=dict)
    """How many frames each fault befell."""
    random: random.Random = field(init=False)
    _free_at: float = 0.0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def carry(self, frame: bytes, now: float) -> list[tuple[float, bytes]]:
        """When, and as what, a frame arrives."""
        if self.drop and self.drop(frame):
            return self._fate(now, "dropped", frame)
        chance = self.random.random
        if chance() < self.loss:
            return self._fate(now, "lost", frame)
        copies = 2 if chance() < self.duplicate else 1
        wire = self.spacing + (8 * len(frame) / self.bandwidth if self.bandwidth else 0.0)
        start = max(now, self._free_at)
        if self.queue and (start - now) * self.bandwidth / 8 > self.queue:
            return self._fate(now, "overflowed", frame)
        sent, now = now, start + wire
        self._free_at = now
        arrivals = []
        for copy in range(copies):
            late = chance() < self.reorder
            delay = self.delay * (1 + (10 * chance() if late else 0))
            if self.jitter:
                delay += self.jitter * chance()
            carried = frame
            corrupt = chance() < self.corrupt
            if corrupt:
                spoiled = bytearray(frame)
                spoiled[self.random.randrange(14, len(frame))] ^= 1 << self.random.randrange(8)
                carried = bytes(spoiled)
            self._fate(sent, "corrupted" if corrupt else "duplicated" if copy else "late" if late else "", frame)
            arrivals.append((now + delay, carried))
        return arrivals

    def _fate(self, now: float, fate: str, frame: bytes) -> list[tuple[float, bytes]]:
        if fate:
            self.faults[fate] = self.faults.get(fate, 0) + 1
        if self.log is not None:
            self.log.append((now, fate, frame))
        return []


class World:
    """Hosts on one link. `location` says who has an IP address now (the reroute of a migration changes it)."""

    def __init__(self, *hosts: Host, link: Link | None = None) -> None:
        self.hosts = list(hosts)
        self.link = link or Link()
        self.location = {address(host.number): host for host in hosts for address in (ip, ip6)}
        self.now = 1000.0
        self.trace: list[tuple[float, bytes]] = []
        """Every frame that was sent, when."""
        self._sequence = 0
        self._air: list[tuple[float, int, bytes]] = []
        self._actions: list[tuple[float, int, Callable[[], None]]] = []
        self.after_step: Callable[[], None] | None = None

    def at(self, when: float, action: Callable[[], None]) -> None:
        """Call `action` at the time `when`."""
        self._sequence += 1
        heapq.heappush(self._actions, (when, self._sequence, action))

    def send(self, frames: list[bytes]) -> None:
        for frame in frames:
            self.trace.append((self.now, frame))
            for when, carried in self.link.carry(frame, self.now):
                self._sequence += 1
                heapq.heappush(self._air, (when, self._sequence, carried))

    def step(self, until: float = float("inf")) -> bool:
        """Let everything that is due now happen, else move the clock on to the next event, but not beyond `until`.

        False when nothing will happen until then.
        """
        due: dict[int, list[bytes]] = {}
        acted = False
        while self._actions and self._actions[0][0] <= self.now:
            heapq.heappop(self._actions)[2]()
            acted = True
        while self._air and self._air[0][0] <= self.now:
            frame = heapq.heappop(self._air)[2]
            host = self.location.get(destination_of(frame))
            if host is not None and host.alive:
                due.setdefault(host.number, []).append(frame)
        worked = acted or bool(due)
        for host in self.hosts:
            if host.alive:
                sent = host.turn(due.get(host.number, []), self.now)
                worked = worked or bool(sent)
                self.send(sent)
        if self.after_step:
            self.after_step()
        if worked:
            return True
        times = [heap[0][0] for heap in (self._air, self._actions) if heap]
        times += [when for host in self.hosts if host.alive and (when := host.engine.next_timer()) is not None]
        if not times or min(times) > until:
            return False
        self.now = max(min(times), self.now + 1e-9)
        return True

    def run(self, until: Callable[[], bool], limit: float = 600.0) -> None:
        """Step until `until()`; raises Stuck after `limit` seconds of virtual time."""
        end_at = self.now + limit
        while not until():
            if (not self.step() or self.now > end_at) and not until():
                raise Stuck(f"at {self.now:.3f}: {[dict(host.engine.counters) for host in self.hosts]}")

    def settle(self, seconds: float = 1.0) -> None:
        """Let `seconds` pass."""
        end_at = self.now + seconds
        while self.step(end_at):
            pass
        self.now = end_at
