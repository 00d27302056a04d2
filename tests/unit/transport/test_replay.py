"""Invariant: given the same work requests and the partner's captured answers, our NIC sends the frames that rxe sent.

Each case posts what the program at side a posted, feeds side b's captured frames at their times, and compares the
frames that the engine emits with side a's, byte for byte (identification taken from the capture, MigrOS off). The
other way round: fed with side a's frames, the engine answers as side b did. Time is the capture's, and the engine's
own timers run in between.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from softroce_ext.simulation.hosts import BASE, ByteSink, End, Host, Region, end, to_rts
from softroce_ext.simulation.link import Link
from softroce_ext.transport.engine import EngineConfig
from softroce_ext.transport.verbs import SendFlag, WcStatus, WrOpcode
from softroce_ext.wire import opcodes as op
from softroce_ext.wire.frame import Path, parse
from softroce_ext.wire.opcodes import FLAGS, HEADERS_LENGTH, OpFlag
from tests.support.transport import rxe_captures as captures
from tests.support.transport.rxe_captures import SIDE_A, SIDE_B, Captured

MEMORY = 1 << 18
RXE = EngineConfig(migros=False, retry_read_gaps=False)
WRITE_OPS = {op.WRITE_FIRST, op.WRITE_ONLY, op.WRITE_ONLY_IMM}


@dataclass
class Message:
    """What side a's program posted, read back from its first transmission in the capture."""

    opcode: WrOpcode
    first: Captured
    data: bytes = b""
    length: int = 0
    remote_address: int = 0
    rkey: int = 0
    imm: int = 0
    solicited: bool = False
    swap: int = 0
    compare_add: int = 0
    psns: set[int] = field(default_factory=set)


def messages_of(frames: list[Captured], mtu: int = 1024) -> list[Message]:
    """The messages of one sender's requests, each packet counted once."""
    result: list[Message] = []
    seen: set[int] = set()
    for captured in frames:
        packet = parse(memoryview(captured.frame))
        assert not isinstance(packet, str)
        flags = OpFlag(FLAGS[packet.opcode])
        if packet.psn in seen:
            continue  # a retransmission
        at = packet.headers_at
        headers = captured.frame[at : at + HEADERS_LENGTH[packet.opcode]]
        if flags & OpFlag.START:
            if flags & OpFlag.ATOMIC:
                kind = WrOpcode.ATOMIC_FETCH_AND_ADD if packet.opcode == op.FETCH_ADD else WrOpcode.ATOMIC_CMP_AND_SWP
            elif flags & OpFlag.READ:
                kind = WrOpcode.RDMA_READ
            else:
                kind = WrOpcode.RDMA_WRITE if flags & OpFlag.WRITE else WrOpcode.SEND
            message = Message(kind, captured)
            result.append(message)
            if flags & (OpFlag.WRITE | OpFlag.READ | OpFlag.ATOMIC):
                message.remote_address = int.from_bytes(headers[:8])
                message.rkey = int.from_bytes(headers[8:12])
            if flags & OpFlag.READ:
                message.length = int.from_bytes(headers[12:16])
            if flags & OpFlag.ATOMIC:
                message.length = 8
                first, second = int.from_bytes(headers[12:20]), int.from_bytes(headers[20:28])
                is_add = kind == WrOpcode.ATOMIC_FETCH_AND_ADD
                message.compare_add, message.swap = (first, 0) if is_add else (second, first)
        message = result[-1]
        answers = -(-message.length // mtu) if message.opcode == WrOpcode.RDMA_READ else 1
        seen.update(packet.psn + i & 0xFFFFFF for i in range(max(1, answers)))
        message.data += bytes(packet.payload)
        message.solicited |= bool(packet.first_word & 0x800000)
        if flags & OpFlag.IMM:
            message.imm = int.from_bytes(headers[-4:], "little")
            message.opcode = WrOpcode.SEND_WITH_IMM if message.opcode == WrOpcode.SEND else WrOpcode.RDMA_WRITE_WITH_IMM
        if flags & OpFlag.INVALIDATE:
            message.imm = int.from_bytes(headers)
            message.opcode = WrOpcode.SEND_WITH_INV
        if message.opcode not in (WrOpcode.RDMA_READ, WrOpcode.ATOMIC_CMP_AND_SWP, WrOpcode.ATOMIC_FETCH_AND_ADD):
            message.length = len(message.data)
    return result


def path_of(frame: bytes) -> Path:
    return Path(frame[6:12], frame[0:6], frame[26:30], frame[30:34], int.from_bytes(frame[34:36]), frame[15], frame[22])


def connections(frames: list[Captured]) -> list[list[Captured]]:
    """The capture's frames by connection: a new QP at b begins a new one (our captures never interleave two)."""
    parts: list[list[Captured]] = []
    current = None
    for captured in frames:
        key = captured.destination_qpn if captured.source == SIDE_A else current
        if key != current:
            parts.append([])
            current = key
        parts[-1].append(captured)
    return parts


class Replay:
    """One end driven by a capture: frames of the other side go in at their times, what comes out is collected."""

    def __init__(self, frames: list[Captured], side: bytes, **attributes: Any) -> None:
        self.frames = frames
        self.side = side
        own = [captured for captured in frames if captured.source == side]
        other = [captured for captured in frames if captured.source != side]
        template = own[0].frame if own else None
        if template is None:  # this side never speaks in the capture
            peer = path_of(other[0].frame)
            path = Path(
                peer.destination_mac, peer.source_mac, peer.destination_ip, peer.source_ip, peer.udp_source_port
            )
            remote = 0x99
        else:
            path = path_of(template)
            remote = own[0].destination_qpn
        local = other[0].destination_qpn if other else 0x99
        self.own = own
        self.other = other
        self.host = Host(1, RXE)
        self.end: End = end(self.host, local, MEMORY)
        requests = [captured for captured in frames if captured.source == SIDE_A]
        psn = requests[0].psn
        attributes = {"timeout": 20, "rq_psn": psn, "sq_psn": psn} | attributes
        to_rts(self.end, path, remote, **attributes)
        self.emitted: list[bytes] = []

    def pull(self, now: float) -> None:
        while True:
            sink = ByteSink()
            assert self.end.attributes.path is not None
            number = len(self.emitted)
            if number < len(self.own):
                self.end.attributes.path.ip_id = self.own[number].ip_id
            sink.room = 1  # one at a time, for the capture's own identification
            if not self.host.engine.frames_to_send(now, sink):
                return
            self.emitted += sink.frames

    def until(self, when: float, now: float) -> float:
        """Let timers run up to `when`."""
        engine = self.host.engine
        while (timer := engine.next_timer()) is not None and timer <= when:
            now = max(now, timer)
            engine.on_timer(now)
            self.pull(now)
        return when

    def run(self, events: list[tuple[float, Callable[[], None] | Captured]], linger: float = 0.0) -> None:
        """Frames and callables at their times."""
        now = 0.0
        for when, event in sorted(events, key=lambda item: item[0]):
            now = self.until(when, now)
            if isinstance(event, Captured):
                self.host.engine.receive(memoryview(event.frame), now)
                self.host.engine.end_of_batch(now)
            else:
                event()
            self.pull(now)
        self.until(now + linger, now)

    def same_frames(self) -> None:
        assert [frame.hex() for frame in self.emitted] == [captured.frame.hex() for captured in self.own]


def mtu_of(name: str) -> int:
    return {"rc_mtu256": 256, "rc_ackreq": 256, "rc_mtu4096": 4096}.get(name, 1024)


CLEAN = (
    "rc_send", "rc_send_imm", "rc_send_inv", "rc_write", "rc_write_imm", "rc_read", "rc_mtu256", "rc_mtu4096",
    "rc_psn_wrap", "rc_ackreq", "rc_burst", "rc_atomic", "nak_inv_req", "nak_psn_seq", "nak_rem_access", "nak_rem_op",
    "nak_rnr",
)  # fmt: skip
TIMER = (
    "retx_ack_lost", "retx_atomic_ack", "retx_read_req", "retx_read_resp", "retx_send_timeout", "retx_write_last",
)  # fmt: skip
REQUESTER: dict[str, dict[str, Any]] = {
    **{name: {} for name in CLEAN},
    **{name: {"timeout": 17} for name in TIMER},
    "nak_rnr_exhausted": {"rnr_retry": 2},
    "retx_exhausted": {"timeout": 12, "retry_cnt": 3},
}
"""Captures, and what a's queue pair has besides the defaults."""
STATUS = {
    "nak_inv_req": [9, 9, 11, 9],
    "nak_rem_access": [10, 10, 10, 10],
    "nak_rem_op": [11],
    "nak_rnr_exhausted": [13],
    "retx_exhausted": [12],
    "rc_send_inv": [0, 0, 10],
}


@pytest.mark.parametrize("name", REQUESTER)
def test_requester_sends_what_rxe_sent(name: str) -> None:
    statuses: list[int] = []
    messages: list[Message] = []
    for frames in connections(captures.read(name)):
        start = frames[0].time
        frames = [captured._replace(time=captured.time - start) for captured in frames]
        replay = Replay(frames, SIDE_A, path_mtu=mtu_of(name), **REQUESTER[name])
        here = replay.end
        address = BASE
        events: list[tuple[float, Callable[[], None] | Captured]] = [(item.time, item) for item in replay.other]
        own = messages_of(replay.own, mtu_of(name))
        for number, message in enumerate(own):
            here.ram.data[address - BASE : address - BASE + len(message.data)] = message.data
            flags = SendFlag.SIGNALED | (SendFlag.SOLICITED if message.solicited else 0)
            events.append(
                (
                    message.first.time,
                    lambda h=here, m=message, i=number, a=address, f=flags: h.post(  # type: ignore[misc]
                        m.opcode, i, a, m.length, flags=int(f), imm=m.imm, remote_address=m.remote_address,
                        rkey=m.rkey, swap=m.swap, compare_add=m.compare_add,
                    ),
                )
            )  # fmt: skip
            message.psns = {address}
            address += message.length + 64
        # rxe's clock is a jiffy; what its timers sent comes at most that much after ours.
        replay.run(events, linger=0.1)
        replay.same_frames()
        statuses += [wc.status for wc in here.scq.entries]
        messages += own
        for message, wc in zip(own, here.scq.entries, strict=False):
            if message.opcode == WrOpcode.RDMA_READ and wc.status == 0:
                # Every byte of the READ stands where it belongs: compare with the last transmission of each PSN.
                sent = {item.psn: bytes(_payload(item)) for item in replay.other if FLAGS[item.opcode] & OpFlag.READ}
                packets = range(message.first.psn, message.first.psn + max(1, -(-message.length // mtu_of(name))))
                at = message.psns.pop() - BASE
                whole = b"".join(sent[psn & 0xFFFFFF] for psn in packets)
                assert here.ram.data[at : at + message.length] == whole
    assert statuses == STATUS.get(name, [0] * len(messages))


def _payload(captured: Captured) -> memoryview:
    packet = parse(memoryview(captured.frame))
    assert not isinstance(packet, str)
    return packet.payload


RESPONDER = [name for name in REQUESTER if name not in ("retx_exhausted", "rc_send_inv")]
"""rc_send_inv needs memory windows, which are the device's."""
LOST_BEFORE_B = {
    "nak_psn_seq": [2], "retx_read_req": [0], "retx_send_timeout": [0], "retx_write_last": [4],
}  # fmt: skip
"""Positions among side a's frames of those that never reached b."""
LOST_FROM_B = {"retx_ack_lost": [0], "retx_atomic_ack": [0], "retx_read_resp": [2]}
"""Positions among our answers of those that b sent too, but that are not in the file."""
NO_ACCESS = {("nak_inv_req", 0): 1 | 4 | 8, ("nak_inv_req", 1): 1 | 2 | 8}
"""Access flags of b's QP, by capture and connection, where they matter."""


@pytest.mark.parametrize("name", RESPONDER)
def test_responder_answers_what_rxe_answered(name: str) -> None:
    for index, frames in enumerate(connections(captures.read(name))):
        start = frames[0].time
        frames = [captured._replace(time=captured.time - start) for captured in frames]
        mtu = mtu_of(name)
        access = NO_ACCESS.get((name, index), 15)
        replay = Replay(
            frames, SIDE_B, path_mtu=mtu, qp_access_flags=access, min_rnr_timer=14 if "exhausted" in name else 24
        )
        here = replay.end
        messages = messages_of(replay.other, mtu)
        _prepare_memory(name, index, replay, messages, mtu)
        receives = [m for m in messages if m.opcode not in (0, 4, 5, 6)]
        if name == "nak_rem_op":
            here.pd.regions.pop(1)
        incoming = [item for i, item in enumerate(replay.other) if i not in LOST_BEFORE_B.get(name, [])]
        if name == "nak_inv_req" and index == 3:
            # The relay moved the atomic's address by 4 after this file's tap.
            incoming = []
        events: list[tuple[float, Callable[[], None] | Captured]] = [(item.time, item) for item in incoming]
        for number, message in enumerate(receives):
            length = 32 if name == "nak_inv_req" else max(64, message.length)
            when = 0.0
            if name == "nak_rnr":
                when = 0.29  # posted just before the last attempt
            if name != "nak_rnr_exhausted":
                events.append(
                    (when - 1e-6, lambda h=here, i=number, n=length: h.receive(i, BASE + 131072, n))  # type: ignore[misc]
                )
        if not incoming:
            continue
        lost = set(LOST_FROM_B.get(name, []))
        own, replay.own = replay.own, _with_gaps(replay.own, lost)
        replay.run(events)
        emitted = [frame for i, frame in enumerate(replay.emitted) if i not in lost]
        assert [frame.hex() for frame in emitted] == [captured.frame.hex() for captured in own]


def _with_gaps(own: list[Captured], lost: set[int]) -> list[Captured]:
    """Own frames with a stand-in (its identification does not matter) for each that is not in the file."""
    result = list(own)
    for position in sorted(lost):
        result.insert(position, own[0])
    return result


def _prepare_memory(name: str, index: int, replay: Replay, messages: list[Message], mtu: int) -> None:
    """b's regions as its program had them, holding the data that its READ responses and ATOMIC ACKs show."""
    here = replay.end
    regions: dict[int, tuple[int, int]] = {}
    for message in messages:
        if message.opcode in (0, 1, 4, 5, 6) and message.length:
            low, high = regions.get(message.rkey, (message.remote_address, 0))
            regions[message.rkey] = (
                min(low, message.remote_address), max(high, message.remote_address + message.length),
            )  # fmt: skip
    if name == "nak_rem_access":
        return  # wrong key, wrong key, beyond the region, no atomic access: none of these accesses is allowed
    if not regions:
        return
    low = min(begin for begin, _ in regions.values())
    shift = low - BASE - 4096
    remote = here.pd.remote

    def shifted(rkey: int, address: int, length: int, access: int, qpn: int) -> Any:
        return remote(rkey, address - shift, length, access, qpn)

    here.pd.remote = shifted  # type: ignore[method-assign]
    for key, (begin, stop) in regions.items():
        here.pd.regions[key] = Region(begin - shift, stop - begin, 15)
    responses = {item.psn: item for item in replay.own}
    for message in messages:
        at = message.remote_address - shift - BASE
        if message.opcode == WrOpcode.RDMA_READ:
            for number in range(max(1, -(-message.length // mtu))):
                captured = responses.get((message.first.psn + number) & 0xFFFFFF)
                if captured is not None and FLAGS[captured.opcode] & OpFlag.READ:
                    payload = _payload(captured)
                    here.ram.data[at + number * mtu : at + number * mtu + len(payload)] = payload
    atomics = [message for message in messages if message.opcode in (5, 6)]
    if atomics and name != "nak_inv_req":
        answer = next(item for item in replay.own if item.opcode == op.ATOMIC_ACKNOWLEDGE)
        at = atomics[0].remote_address - shift - BASE
        here.ram.data[at : at + 8] = answer.frame[58:66][::-1]


def test_link_and_status_names() -> None:
    """The tables above speak of the statuses that the captures' descriptions name."""
    assert [WcStatus(code).name for code in (9, 10, 11, 12, 13)] == [
        "REM_INV_REQ_ERR", "REM_ACCESS_ERR", "REM_OP_ERR", "RETRY_EXC_ERR", "RNR_RETRY_EXC_ERR",
    ]  # fmt: skip
    assert Link().loss == 0
