"""The trace of queue pairs: one JSON line for each packet, completion, timer, posted request and change of state.

While no trace is on, nothing of this is in the way: `QpTrace` puts its own versions of a few methods *on the engine
object* (and of `fetch` before each queue), and takes them away again. docs/trace.md has the lines' fields;
`testbed.diagram.trace` reads them.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, Protocol

from softroce_ext.trace.packets import describe
from softroce_ext.transport.engine import Engine
from softroce_ext.transport.interfaces import FrameSink, RecvWqe, SendWqe
from softroce_ext.transport.queue_pair import QueuePair
from softroce_ext.transport.verbs import QpState, QpType, SendFlag, WcOpcode, WcStatus, WrOpcode
from softroce_ext.wire.frame import Buffer, Packet, Path, parse
from softroce_ext.wire.headers import BTH, GSI_QPN, PSN_HALF, PSN_MASK
from softroce_ext.wire.opcodes import FLAGS, OpFlag

VERSION: Final = 1
DEFAULT_LIMIT: Final = 2_000_000
"""Lines after which a trace ends by itself."""

_REQUESTS: Final = {int(opcode): opcode.name for opcode in WrOpcode}
_UNTOLD: Final = frozenset({"rcvd_pkts", "rdma_sends", "rdma_recvs"})
"""Counters that say nothing about a single packet."""
_REQUEST, _RESUME = int(OpFlag.REQUEST), int(OpFlag.RESUME)


class _Queue(Protocol):
    def fetch(self) -> Any: ...

    def retire(self) -> None: ...


class _TracedQueue:
    """A send or receive queue that says what is fetched from it."""

    __slots__ = ("_note", "inner", "retire")

    def __init__(self, inner: _Queue, note: Callable[[Any], None]) -> None:
        self.inner = inner
        self.retire = inner.retire
        self._note = note

    def fetch(self) -> Any:
        """As the queue's own."""
        wqe = self.inner.fetch()
        if wqe is not None:
            self._note(wqe)
        return wqe


class _TracedSink:
    """Tells of each frame before it goes on to the real sink."""

    def __init__(self, inner: FrameSink, note: Callable[[Path, bytes, Buffer], None]) -> None:
        self._inner = inner
        self._note = note

    @property
    def room(self) -> int:
        """The real sink's."""
        return self._inner.room

    @room.setter
    def room(self, value: int) -> None:
        self._inner.room = value

    def add(self, path: Path, headers: bytes, payload: Buffer, pad: int) -> None:
        """transport.engine.FrameSink."""
        self._note(path, headers, payload)
        self._inner.add(path, headers, payload, pad)


class QpTrace:
    """A trace that is on, from its construction until `close` (or until `limit` lines, or a full disk)."""

    def __init__(
        self,
        engine: Engine,
        file: str,
        qpns: Iterable[int] | None = None,
        *,
        about: Mapping[str, Any] | None = None,
        limit: int = DEFAULT_LIMIT,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """qpns: of which queue pairs (None: all, those to come too); about: more for the first line.

        Raises OSError when `file` cannot be written.
        """
        self.path = file
        self.lines = 0
        self._engine = engine
        self._limit = limit
        self._clock = clock
        self._qpns = None if qpns is None else frozenset(qpns)
        self._file = open(file, "w", buffering=1 << 16, encoding="utf-8")  # noqa: SIM115
        self._seen: dict[int, tuple[Any, ...]] = {}
        self._senders: dict[tuple[int, int], tuple[Path, int]] = {}
        self._addresses: dict[bytes, str] = {}
        self._on = True
        wanted = None if self._qpns is None else sorted(self._qpns)
        self._write({"event": "start", "version": VERSION, "wall": time.time(), "qpns": wanted, **(about or {})})
        # Shadow the class's methods on this one object: without a trace they are not there at all.
        self._originals = {name: getattr(engine, name) for name in self._SHADOWS}
        vars(engine).update({name: getattr(self, name) for name in self._SHADOWS})
        for qp in engine.qps.values():
            self._join(qp)

    _SHADOWS = ("add_qp", "remove_qp", "receive", "end_of_batch", "on_timer", "frames_to_send", "publish")

    def close(self) -> int:
        """End the trace; returns the number of its lines."""
        self._end()
        return self.lines

    def flush(self) -> None:
        """Have what was noted in the file."""
        if self._on:
            try:
                self._file.flush()
            except OSError:
                self._end()

    # -- what stands before the engine's methods -------------------------------------------------------------------

    def add_qp(self, qp: QueuePair) -> None:
        """Engine.add_qp."""
        self._originals["add_qp"](qp)
        self._join(qp)

    def remove_qp(self, qpn: int) -> None:
        """Engine.remove_qp."""
        qp = self._engine.qps.get(qpn)
        self._originals["remove_qp"](qpn)
        if qp is not None and self._wants(qpn):
            self._leave(qp)
            self._seen.pop(qpn, None)
            self._event(qpn, "gone")

    def receive(self, frame: memoryview, now: float) -> None:
        """Engine.receive."""
        packet = parse(frame)
        if isinstance(packet, str):
            if self._qpns is None:
                self._write({"event": "refused", "reason": packet, "length": len(frame)})
            self._originals["receive"](frame, now)
            return
        qpn = packet.destination_qpn
        if not self._wants(qpn):
            self._originals["receive"](frame, now)
            return
        line = self._received(packet, qpn)
        counters = self._engine.counters
        before = dict(counters)
        self._originals["receive"](frame, now)
        counted = [name for name, value in counters.items() if before.get(name, 0) != value and name not in _UNTOLD]
        if counted:
            line["counted"] = counted
        self._write(line)
        self._look(qpn)

    def end_of_batch(self, now: float) -> None:
        """Engine.end_of_batch. Called without anything received when programs are held: then all may have changed."""
        qpns = [qp.attributes.qpn for qp in self._engine.touched] or list(self._engine.qps)
        self._originals["end_of_batch"](now)
        for qpn in qpns:
            self._look(qpn)

    def on_timer(self, now: float) -> None:
        """Engine.on_timer."""
        due = [qp for qp in self._engine.qps.values() if qp.heap_at is not None and qp.heap_at <= now]
        for qp in due:
            kind = _timer_due(qp, now)
            if kind is not None and self._wants(qp.attributes.qpn):
                self._event(qp.attributes.qpn, "timer", timer=kind)
        self._originals["on_timer"](now)
        for qp in due:
            self._look(qp.attributes.qpn)

    def frames_to_send(self, now: float, sink: FrameSink) -> int:
        """Engine.frames_to_send."""
        ready = [qp.attributes.qpn for qp in self._engine.ready if isinstance(qp, QueuePair)]
        for qpn in ready:
            self._look(qpn)
        total: int = self._originals["frames_to_send"](now, _TracedSink(sink, self._sent))
        for qpn in ready:
            self._look(qpn)
        return total

    def publish(self) -> None:
        """Engine.publish."""
        for entry in self._engine.completions:
            qpn, completion = entry.queue_pair.attributes.qpn, entry.completion
            if self._wants(qpn):
                side = "receive" if completion.opcode >= WcOpcode.RECV else "send"
                more = {"imm": completion.imm} if completion.imm else {}
                if side == "receive":
                    more["source_qpn"] = completion.src_qp
                self._event(
                    qpn, "completion", side=side, wr_id=completion.wr_id, status=WcStatus(completion.status).name,
                    opcode=WcOpcode(completion.opcode).name, byte_len=completion.byte_len, **more,
                )  # fmt: skip
        self._originals["publish"]()

    # -- lines -----------------------------------------------------------------------------------------------------

    def _wants(self, qpn: int) -> bool:
        return self._qpns is None or qpn in self._qpns

    def _event(self, qpn: int, event: str, **fields: Any) -> None:
        self._write({"event": event, "qpn": qpn, **fields})

    def _write(self, line: dict[str, Any]) -> None:
        if not self._on:
            return
        stamped = {"t": round(line.pop("t", None) or self._clock(), 7), **line}
        try:
            self._file.write(json.dumps(stamped, separators=(",", ":")) + "\n")
        except OSError:
            self._end()
            return
        self.lines += 1
        if self.lines == self._limit:
            self._file.write(json.dumps({"t": stamped["t"], "event": "limit", "lines": self.lines}) + "\n")
            self._end()

    def _received(self, packet: Packet, qpn: int) -> dict[str, Any]:
        line = {"t": self._clock(), "event": "packet", "direction": "received", "qpn": qpn}
        line |= describe(packet.raw[packet.headers_at - BTH.size :])
        line["remote_qpn"] = line.pop("source_qpn", None)
        if line["remote_qpn"] is None:
            qp = self._engine.qps.get(qpn)
            line["remote_qpn"] = qp.attributes.destination_qpn if qp is not None else None
        line |= {"length": len(packet.payload), "remote_ip": self._address(packet.source_ip)}
        if len(packet.source_ip) == 4:
            line["ip_id"] = int.from_bytes(packet.raw[18:20])
        return line

    def _sent(self, path: Path, headers: bytes, payload: Buffer) -> None:
        fields = describe(headers)
        qpn = fields.pop("source_qpn", None) or self._sender(path, fields["remote_qpn"])
        if qpn is None or not self._wants(qpn):
            return
        line = {"event": "packet", "direction": "sent", "qpn": qpn, **fields, "length": len(payload)}
        line["remote_ip"] = self._address(path.destination_ip)
        if len(path.source_ip) == 4:
            line["ip_id"] = path.ip_id  # this frame's: the real sink takes it
        qp = self._engine.qps.get(qpn)
        flags = FLAGS[headers[0]]
        if qp is not None and qp.attributes.qp_type == QpType.RC and flags & _REQUEST and not flags & _RESUME:
            # high_psn moves on after a queue pair's turn only: what it has not reached is new.
            if (qp.sender.high_psn - fields["psn"] - 1 & PSN_MASK) < PSN_HALF:
                line["retransmit"] = True
        self._write(line)

    def _sender(self, path: Path, remote_qpn: int) -> int | None:
        """The queue pair that sends along `path`: each has a Path object of its own."""
        known = self._senders.get((id(path), remote_qpn))
        if known is not None and known[0] is path:
            return known[1]
        for qpn, qp in self._engine.qps.items():
            if qp.attributes.path is path and qp.attributes.destination_qpn == remote_qpn:
                self._senders[id(path), remote_qpn] = path, qpn
                return qpn
        return None

    def _address(self, address: bytes) -> str:
        text = self._addresses.get(address)
        if text is None:
            text = self._addresses[address] = str(ipaddress.ip_address(bytes(address)))
        return text

    def _look(self, qpn: int) -> None:
        """Note what has changed in a queue pair's state since it was looked at last."""
        qp = self._engine.qps.get(qpn)
        if qp is None or qpn == GSI_QPN or not self._wants(qpn):
            return
        attributes, movement, rnr_wait = qp.attributes, qp.movement, qp.sender.rnr_deadline is not None
        path = attributes.path
        now = (
            attributes.state, movement.stopped, movement.paused, movement.resume_pending, rnr_wait,
            attributes.destination_qpn, path,
        )  # fmt: skip
        before = self._seen.get(qpn)
        if now == before:
            return
        self._seen[qpn] = now
        ends = {}
        if path is not None:
            ends = {"local_ip": self._address(path.source_ip), "remote_ip": self._address(path.destination_ip)}
        self._event(
            qpn, "state", type=QpType(attributes.qp_type).name, state=QpState(attributes.state).name,
            stopped=movement.stopped, paused=movement.paused, resuming=movement.resume_pending, rnr_wait=rnr_wait,
            remote_qpn=attributes.destination_qpn, **ends,
        )  # fmt: skip

    # -- queues ----------------------------------------------------------------------------------------------------

    def _join(self, qp: QueuePair) -> None:
        qpn = qp.attributes.qpn
        if not self._wants(qpn):
            return

        def sends(wqe: SendWqe) -> None:
            flags = [flag.name for flag in SendFlag if wqe.flags & flag]
            opcode = _REQUESTS.get(wqe.opcode, str(wqe.opcode))
            self._event(qpn, "post", side="send", wr_id=wqe.wr_id, opcode=opcode, length=wqe.length, flags=flags)

        def receives(wqe: RecvWqe) -> None:
            self._event(qpn, "post", side="receive", wr_id=wqe.wr_id, length=wqe.length)

        qp.send_queue = _TracedQueue(qp.send_queue, sends)
        qp.receive_queue = _TracedQueue(qp.receive_queue, receives)
        self._look(qpn)

    @staticmethod
    def _leave(qp: QueuePair) -> None:
        for name in ("send_queue", "receive_queue"):
            queue = getattr(qp, name)
            if isinstance(queue, _TracedQueue):
                setattr(qp, name, queue.inner)

    def _end(self) -> None:
        if not self._on:
            return
        self._on = False
        for name in self._SHADOWS:
            vars(self._engine).pop(name, None)
        for qp in self._engine.qps.values():
            self._leave(qp)
        with contextlib.suppress(OSError):  # the disk is full: what is there is there
            self._file.close()


def _timer_due(qp: QueuePair, now: float) -> str | None:
    """Which of a queue pair's timers acts now (in the order of `transport.timers.on_timer`); None: none of them."""
    if qp.movement.stopped:
        return None
    for waits, deadline, kind in (
        (qp.movement.resume_pending, qp.movement.resume_deadline, "resume"),
        (qp.movement.paused, qp.movement.pause_deadline, "pause"),
        (qp.sender.rnr_deadline is not None, qp.sender.rnr_deadline, "rnr"),
        (True, qp.sender.ack_deadline, "ack"),
    ):
        if waits:
            return kind if deadline is not None and deadline <= now else None
    return None
