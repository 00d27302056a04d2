"""Hostile frames: whatever arrives on the wire.

Invariants, for random bytes, for damaged captures of Linux rxe, and for frames with a right ICRC and wrong contents,
delivered in batches to queue pairs of every type in every state over IPv4 and IPv6:

* nothing is raised, and a batch's work is bounded (the watchdog; the frames sent for it; the watched memory's calls);
* no byte outside the registered regions is read or written, and none against the access that they grant;
* a frame that changes nothing and is not answered adds one to a counter other than rcvd_pkts; one that `parse` refuses
  adds one to exactly one refused_* counter and to nothing else;
* queue pairs that a frame does not name are as they were;
* nothing grows without bound: answers, timers, records, counters.
"""

from __future__ import annotations

import random
import struct
from typing import Any

from softroce_ext.simulation.hosts import ALL_ACCESS, BASE, ByteSink, Cq, Events, Pd, Ram, Region, WorkQueue
from softroce_ext.transport.engine import V4_MAPPED, Engine, EngineConfig
from softroce_ext.transport.interfaces import Buffer, ProtectionError, RecvWqe, SendWqe, Sge
from softroce_ext.transport.queue_pair import QueuePair
from softroce_ext.transport.rc.in_order import MAX_HELD
from softroce_ext.transport.rc.responder import MAX_PENDING_ANSWERS
from softroce_ext.transport.services import make_queue_pair
from softroce_ext.transport.state.attributes import Attributes
from softroce_ext.transport.state.movement import MovementState
from softroce_ext.transport.state.queue_pair import QueuePairState
from softroce_ext.transport.verbs import QpState, QpType
from softroce_ext.wire import opcodes as op
from softroce_ext.wire.frame import MAX_FRAME, build, parse
from softroce_ext.wire.frame import Path as WirePath
from tests.fuzz.queue_pairs import queue_pairs
from tests.support.fuzz.rounds import Tally, Violation
from tests.support.transport import rxe_captures

MEMORY = 1 << 16
OPEN, READ_ONLY, CLOSED = (BASE + 4096, 16384), (BASE + 24576, 8192), (BASE + 40960, 8192)
"""The regions (address, length): all access; remote read only; none from outside. The gaps are in no region."""
HERE, THERE = bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2])
HERE6, THERE6 = bytes.fromhex("fd" + "00" * 14 + "01"), bytes.fromhex("fd" + "00" * 14 + "02")
GROUP = bytes([239, 1, 2, 3])
QKEY = 0x11111111
EDGES32 = (0, 1, 2, 3, 4, 7, 8, 1023, 1024, 1025, 4096, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
EDGES64 = (0, 1, BASE, OPEN[0], OPEN[0] + 16380, READ_ONLY[0], CLOSED[0], 2**63, 2**64 - 1, 2**64 - 8)


class WatchedRam(Ram):
    """A process's memory with guard bytes around its regions, whose every access is checked again, independently."""

    def __init__(self) -> None:
        super().__init__(MEMORY)
        self.data[:] = bytes([0xA5]) * MEMORY
        self.calls = 0

    def _inside(self, address: int, length: int, regions: tuple[tuple[int, int], ...], what: str) -> None:
        self.calls += 1
        if not any(begin <= address and address + length <= begin + size for begin, size in regions):
            raise Violation(f"{what} of {length} bytes at {address:#x}, outside every region")

    def read(self, address: int, length: int) -> Buffer:
        self._inside(address, length, (OPEN, READ_ONLY), "read")
        return super().read(address, length)

    def write(self, address: int, data: Buffer) -> None:
        self._inside(address, len(data), (OPEN,), "write")
        super().write(address, data)

    def check(self) -> None:
        """Guard bytes and the regions that may not be written are unchanged."""
        begin, size = OPEN
        at = begin - BASE
        if self.data[:at].strip(b"\xa5") or self.data[at + size :].strip(b"\xa5"):
            raise Violation("a guard byte changed")


class WatchedPd(Pd):
    """Address handles besides."""

    def address(self, ah_number: int) -> WirePath:
        if ah_number != 1:
            raise ProtectionError("no such address handle")
        return path(False)


def path(ipv6: bool, back: bool = False, port: int = 0xC123) -> WirePath:
    """From here to there, or back."""
    here, there = (HERE6, THERE6) if ipv6 else (HERE, THERE)
    macs = (b"\2\0\0\0\0\1", b"\2\0\0\0\0\2")
    if back:
        return WirePath(macs[1], macs[0], there, here, port)
    return WirePath(macs[0], macs[1], here, there, port)


def extended_header(
    chance: random.Random, name: str, address: int, rkeys: tuple[int, ...], mtu: int, msn: int
) -> bytes:
    """One header after the BTH: this address, mostly one of these keys, the rest at its edges."""
    rkey = chance.choice((*rkeys, 0, 9, 0xFFFFFFFF))
    if name == "RETH":
        return struct.pack(">QII", address, rkey, chance.choice((8, mtu, 3000, *EDGES32)))
    if name == "AtomicETH":
        return struct.pack(">QIQQ", address, rkey, chance.choice(EDGES64), chance.choice(EDGES64))
    if name == "AETH":
        syndrome = chance.choice((0x1F, 0x1F, 0x60, 0x65, 0x20, chance.randrange(256)))
        return struct.pack(">I", syndrome << 24 | chance.choice((msn, 0, 0xFFFFFF)))
    if name == "DETH":
        return struct.pack(">II", chance.choice((QKEY, QKEY, QKEY, 0, 0x80010000)), chance.randrange(1 << 32))
    if name == "IETH":
        return struct.pack(">I", chance.choice((9, 9, 0, 0xFFFFFFFF)))
    return chance.randbytes(8 if name == "AtomicAckETH" else 4)


def held(qp: QueuePair) -> int:
    """Packets that wait for answers to leave; only RC holds any."""
    return len(getattr(qp, "held", ()))


class Scene:
    """One NIC with queue pairs."""

    def __init__(self, chance: random.Random, specs: list[dict[str, Any]]) -> None:
        """specs: as `queue_pair` makes them; what is missing is as it is in a fresh queue pair."""
        self.chance = chance
        self.engine = Engine(EngineConfig(migros=True))
        self.now = 1000.0
        self.ram = WatchedRam()
        self.pd = WatchedPd(self.ram)
        self.pd.regions[1] = Region(*OPEN, ALL_ACCESS)
        self.pd.regions[2] = Region(*READ_ONLY, 4)
        self.pd.regions[3] = Region(*CLOSED, 1)
        self.qps: list[QueuePair] = []
        self.cq = Cq()
        for spec in specs:
            self._add(spec)
        self.engine.multicast[V4_MAPPED + GROUP] = [qp for qp in self.qps if qp.attributes.qp_type == QpType.UD]
        self.pull(64)

    def _add(self, spec: dict[str, Any]) -> None:
        kind, state, variant = QpType[spec["kind"]], QpState[spec["state"]], spec.get("variant", 0)
        queue_pair_state = QueuePairState(Attributes(spec["qpn"], int(kind)))
        sends, receives = WorkQueue(), WorkQueue()
        qp = make_queue_pair(queue_pair_state, sends, receives, self.cq, self.cq, self.pd, Events())
        self.engine.add_qp(qp)
        self.qps.append(qp)
        qp.attributes.path = path(spec.get("ipv6", False))
        qp.attributes.destination_qpn = 1000 + spec["qpn"]
        qp.attributes.qkey, qp.attributes.timeout, qp.attributes.path_mtu = QKEY, 14, 1024
        qp.attributes.qp_access_flags = ALL_ACCESS
        for name, value in spec.get("set", {}).items():
            (record,) = (record for record in qp.state.records() if hasattr(record, name))
            setattr(record, name, value)
        qp.sender.retry_left = qp.attributes.retry_cnt
        qp.attributes_changed()
        qp.attributes.state = int(state)
        for wr_id, (away, length, key) in enumerate(spec.get("receives", ())):
            receives.posted.append(RecvWqe(wr_id, length, (Sge(OPEN[0] + away, length, key),)))
        if spec.get("sends"):
            for wr_id, (opcode, length) in enumerate(spec["sends"]):
                sges = (Sge(OPEN[0], length, 1),)
                sends.posted.append(SendWqe(wr_id, opcode, 2, 0, length, sges, None, BASE, 1, 1, 2, None))
            qp.attributes.state = int(QpState.RTS)
            qp.make_ready()
            self.pull(64)
            qp.attributes.state = int(state)
        if variant == 1:
            qp.stop()
        elif variant == 2 and state in (QpState.RTS, QpState.SQD):
            qp.movement.state, qp.movement.pause_psn, qp.movement.pause_deadline = (
                MovementState.PAUSED,
                qp.sender.una_psn,
                self.now + 60,
            )
        elif variant == 3:
            qp.stop()
            qp.resume()

    def pull(self, frames: int) -> list[bytes]:
        """Send at most `frames` frames' room, once."""
        sink = ByteSink(frames)
        self.engine.frames_to_send(self.now, sink)
        return sink.frames

    # -- making frames -----------------------------------------------------------------------------------------------

    def frame(self) -> tuple[bytes, QueuePair | None]:
        """A frame with a right ICRC for one queue pair (or for none), most of it plausible."""
        chance = self.chance
        if chance.random() < 0.06:
            return self._management(), None
        qp = chance.choice(self.qps)
        attributes = qp.attributes
        receiver = qp.receiver
        ipv6 = attributes.path is not None and attributes.path.ipv6
        back = path(ipv6, back=True)
        if chance.random() < 0.05:
            back = back.replace(source_ip=bytes(chance.choice((HERE6, THERE6) if ipv6 else (HERE, THERE, bytes(4)))))
        codes = [code for code in op.TABLE if code & 0xE0 == qp.service] if chance.random() < 0.95 else list(range(256))
        opcode = chance.choice(codes)
        psn = self._psn(qp, bool(op.FLAGS[opcode] & op.OpFlag.RESPONSE))
        qpn = attributes.qpn
        if chance.random() < 0.03:
            qpn = chance.choice((0, 1, 2, 15, 0xFFFFFF, 0xFFFFFE, chance.randrange(1 << 24)))
            if qpn == 0xFFFFFF and not ipv6 and chance.random() < 0.7:
                back = back.replace(destination_ip=GROUP)
        pkey = chance.choice((0xFFFF,) * 12 + (0x7FFF, 0, 1, 0xFFFE))
        ack_byte = chance.choice((0, 0x80, 0xC0, 0x40, 0x60, 0xE0, 0x50, 0xD0, chance.randrange(256)))
        flags = chance.choice((0, 0, 0x80, 0x40, 0x40, 0xC0))
        headers = bytearray(struct.pack(">III", opcode << 24 | flags << 16 | pkey, qpn, ack_byte << 24 | psn))
        for header in op.TABLE[opcode].headers if opcode in op.TABLE else ():
            headers += self._header(header.name, qp)
        payload = b""
        if op.FLAGS[opcode] & op.OpFlag.PAYLOAD or chance.random() < 0.02:
            mtu = attributes.path_mtu
            length = chance.choice((0, 1, 4, 8, mtu - 4, mtu, mtu, mtu, mtu + 4, 4096, chance.randrange(64)))
            if chance.random() < 0.3 and receiver.write_left:
                length = min(receiver.write_left, mtu)
            payload = chance.randbytes(length)
        pad = -len(payload) & 3
        headers[1] |= pad << 4
        return self._built(back, bytes(headers), payload, pad), qp if qpn == attributes.qpn else None

    def _built(self, way: WirePath, headers: bytes, payload: bytes, pad: int) -> bytes:
        out = memoryview(bytearray(MAX_FRAME + 64))
        return bytes(out[: build(way, self.chance.randrange(65536), headers, payload, pad, out)])

    def _management(self) -> bytes:
        """A datagram to QP1."""
        chance = self.chance
        qkey = chance.choice((0x80010000, 0x80010000, 0, QKEY))
        headers = struct.pack(">IIIII", chance.choice((0x64, 0x65)) << 24 | 0xFFFF, 1, chance.randrange(1 << 32), qkey,
                              chance.randrange(1 << 32))  # fmt: skip
        if headers[0] == 0x65:
            headers += bytes(4)
        return self._built(
            path(chance.random() < 0.5, back=True),
            headers,
            chance.randbytes(4 * chance.choice((0, 6, 63, 64, 64, 65))),
            0,
        )

    def _psn(self, qp: QueuePair, response: bool) -> int:
        chance = self.chance
        centre = (
            chance.choice((qp.sender.una_psn, qp.sender.send_psn, qp.sender.high_psn))
            if response
            else qp.receiver.expected_psn
        )
        step = chance.choice((0,) * 10 + (1, 2, -1, -2, -3, 127, 128, 129, -128, -129, 0x7FFFFF, 0x800000, 0x800001))
        return centre + step & 0xFFFFFF

    def _header(self, name: str, qp: QueuePair) -> bytes:
        address = self.chance.choice((OPEN[0], OPEN[0] + 8, *EDGES64))
        return extended_header(self.chance, name, address, (1, 1, 1, 1, 2, 3), qp.attributes.path_mtu, qp.receiver.msn)

    # -- delivering and checking -------------------------------------------------------------------------------------

    def fingerprints(self) -> list[tuple[Any, ...]]:
        """What must not change in a queue pair that no frame names."""
        return [self._fingerprint(qp) for qp in self.qps]

    @staticmethod
    def _fingerprint(qp: QueuePair) -> tuple[Any, ...]:
        attributes, sender, receiver = qp.attributes, qp.sender, qp.receiver
        return (
            attributes.state, receiver.expected_psn, receiver.msn, sender.una_psn, sender.high_psn, receiver.message,
            len(sender.inflight), len(receiver.resources), attributes.path, receiver.recv_wqe, qp.movement.state,
            qp.movement.announce,
        )  # fmt: skip

    def play(self, step: list[Any], tally: Tally) -> None:
        """[[[frame, QPN that it names or null, how often], …], seconds after it, frames sent then]; noted first."""
        tally.steps.append(step)
        batch, wait, pull = step
        frames = [bytes.fromhex(frame) for frame, _, times in batch for _ in range(times)]
        named = [self.engine.qps.get(qpn) for _, qpn, times in batch for _ in range(times)]
        self.deliver(frames, named, wait, pull, tally)

    def deliver(self, frames: list[bytes], named: list[QueuePair | None], wait: float, pull: int, tally: Tally) -> None:
        """One batch: receive, flush, timers, a turn to send; then every check of this module's invariants."""
        engine = self.engine
        before = dict(engine.counters)
        fingerprints = self.fingerprints()
        holding = list(engine.holding)
        single = frames[0] if len(frames) == 1 else None
        picture = self._picture(named[0]) if single is not None else None
        calls = self.ram.calls
        buffers = [bytearray(frame) for frame in frames]
        for buffer in buffers:
            engine.receive(memoryview(buffer), self.now)
        engine.end_of_batch(self.now)
        verdict = parse(memoryview(single)) if single is not None else None
        new = {name: count - before.get(name, 0) for name, count in engine.counters.items()}
        new = {name: count for name, count in new.items() if count}
        refused = sum(count for name, count in new.items() if name.startswith("refused_"))
        for name, count in new.items():
            if name.startswith(("refused_", "dropped_")):
                tally.refusals[name] += count
        if isinstance(verdict, str) and new != {f"refused_{verdict}": 1}:
            raise Violation(f"parse says {verdict}, the counters say {new}")
        if verdict is not None and not isinstance(verdict, str):
            multicast = verdict.destination_qpn == 0xFFFFFF
            if refused > 1 and not multicast:
                raise Violation(f"one frame, several refusals: {new}")
            if named[0] is not None and set(new) == {"rcvd_pkts"} and picture == self._picture(named[0]):
                raise Violation(f"{op.name_of(verdict.opcode)} had no effect and no counter ({self._what(named[0])})")
        for buffer in buffers:
            buffer[:] = bytes(len(buffer))
        if self.ram.calls - calls > 40 * len(frames):
            raise Violation(f"{self.ram.calls - calls} accesses of memory for {len(frames)} frames")
        self.now += wait
        engine.on_timer(self.now)
        self.pull(pull)
        self.ram.check()
        groups = any(frame[30:34] == GROUP for frame in frames)
        for qp, was, now in zip(self.qps, fingerprints, self.fingerprints(), strict=True):
            timed = qp.attributes.state == QpState.ERR or qp.attributes.retry_cnt != 7
            if (
                was != now
                and qp not in named
                and qp not in holding
                and not timed
                and not (groups and qp.attributes.qp_type == QpType.UD)
            ):
                sent = was[:4] == now[:4] and was[5:] != now[5:]  # the fetch of a request is no disturbance
                if not sent and was[4] == now[4]:
                    raise Violation(f"{self._what(qp)} changed though no frame named it: {was} {now}")
        self._check_growth()
        tally.cases += len(frames)

    def _picture(self, qp: QueuePair | None) -> Any:
        if qp is None:
            return None
        seen = len(self.cq.entries), getattr(qp, "ack_pending", False), len(self.pd.regions), held(qp)
        return qp.state.to_plain(), bytes(self.ram.data), *seen

    def _what(self, qp: QueuePair) -> str:
        attributes, sender, receiver = qp.attributes, qp.sender, qp.receiver
        return (
            f"{QpType(attributes.qp_type).name} {QpState(attributes.state).name} "
            f"{MovementState(qp.movement.state).name} expected={receiver.expected_psn:#x} una={sender.una_psn:#x} "
            f"high={sender.high_psn:#x} answers={len(receiver.answers)}"
        )

    def _check_growth(self) -> None:
        engine = self.engine
        for qp in self.qps:
            many = len(qp.receiver.answers) > MAX_PENDING_ANSWERS + 70 or held(qp) > MAX_HELD
            if many or len(qp.receiver.resources) > 128 or len(qp.sender.inflight) > 64:
                raise Violation(f"grows: {self._what(qp)}")
        if engine.held != sum(held(qp) for qp in self.qps):
            raise Violation(f"{engine.held} packets are said to wait")
        if len(engine._timers) > 64 + 8 * len(self.qps):
            raise Violation(f"{len(engine._timers)} timers for {len(self.qps)} queue pairs")
        if len(engine.ready) > len(self.qps) + 1 or engine.touched or engine.completions or engine.written:
            raise Violation("the engine's lists were not emptied")
        if len(engine.counters) > 80:
            raise Violation(f"{len(engine.counters)} counters")


_CAPTURED = [captured.frame for name in rxe_captures.names() for captured in rxe_captures.read(name)]


def mutated(chance: random.Random) -> bytes:
    """A frame of Linux rxe with some bits, bytes or its length changed; or noise."""
    if chance.random() < 0.1:
        return chance.randbytes(chance.choice((0, 1, 13, 14, 33, 42, 57, 58, 61, 78, 200, 1500)))
    frame = bytearray(chance.choice(_CAPTURED))
    for _ in range(chance.choice((1, 1, 2, 5))):
        kind = chance.randrange(4)
        at = chance.randrange(len(frame)) if frame else 0
        if kind == 0 and frame:
            frame[at] ^= 1 << chance.randrange(8)
        elif kind == 1 and frame:
            frame[at] = chance.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif kind == 2:
            del frame[at:]
        else:
            frame[at:at] = chance.randbytes(chance.choice((1, 2, 4, 64)))
    return bytes(frame)


FRAMES_A_ROUND = 300


def one_round(chance: random.Random, tally: Tally) -> None:
    """A fresh NIC and some hundred frames."""
    tally.begin(queue_pairs(chance))
    scene = Scene(chance, tally.scene)
    frames = 0
    while frames < FRAMES_A_ROUND:
        size = chance.choice((1, 1, 1, 1, 2, 8))
        batch: list[list[Any]] = []
        for _ in range(size):
            frame, qp = (mutated(chance), None) if chance.random() < 0.25 else scene.frame()
            batch.append([frame.hex(), qp.attributes.qpn if qp is not None else None, 1])
        if chance.random() < 0.02:
            batch = [[*batch[0][:2], 64]]  # a flood of one
        scene.play([batch, chance.choice((1e-6, 1e-5, 1e-3, 0.07)), chance.choice((0, 1, 16, 64))], tally)
        frames += sum(times for _, _, times in batch)


def replay(specs: list[dict[str, Any]], steps: list[Any], tally: Tally) -> None:
    """What a round has noted."""
    scene = Scene(random.Random(0), specs)
    for step in steps:
        scene.play(step, tally)
