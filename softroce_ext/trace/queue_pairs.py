"""The trace of queue pairs: one JSON line for each packet, completion, timer, posted request and change of state.

`QpTrace` is an observer of the engine (`transport.interfaces.Observer`); while no trace is on, the engine has none.
docs/trace.md has the lines' fields; `testbed.diagram.trace` reads them.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from softroce_ext.trace.packets import describe
from softroce_ext.transport.engine import Engine
from softroce_ext.transport.interfaces import FrameSink, RecvWqe, SendWqe, WorkCompletion
from softroce_ext.transport.verbs import QpState, QpType, SendFlag, WcOpcode, WcStatus, WrOpcode
from softroce_ext.wire.frame import Buffer, Packet, Path
from softroce_ext.wire.headers import BTH, GSI_QPN, PSN_HALF, PSN_MASK
from softroce_ext.wire.opcodes import FLAGS, OpFlag

VERSION: Final = 1
DEFAULT_LIMIT: Final = 2_000_000
"""Lines after which a trace ends by itself."""

_REQUESTS: Final = {int(opcode): opcode.name for opcode in WrOpcode}
_UNTOLD: Final = frozenset({"rcvd_pkts", "rdma_sends", "rdma_recvs"})
"""Counters that say nothing about a single packet."""
_REQUEST, _RESUME = int(OpFlag.REQUEST), int(OpFlag.RESUME)


class _TracedSink:
    """Notes each frame of a queue pair's turn before it goes on to the real sink."""

    def __init__(self, inner: FrameSink, qpn: int, note: Callable[[int, Path, bytes, Buffer], None]) -> None:
        self._inner = inner
        self._qpn = qpn
        self._note = note

    @property
    def room(self) -> int:
        """The real sink's."""
        return self._inner.room

    @room.setter
    def room(self, value: int) -> None:
        self._inner.room = value

    def add(self, path: Path, headers: bytes, payload: Buffer, pad: int) -> None:
        """transport.interfaces.FrameSink."""
        self._note(self._qpn, path, headers, payload)
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
        self._line: dict[str, Any] = {}
        self._counted: dict[str, int] = {}
        self._addresses: dict[bytes, str] = {}
        self._on = True
        wanted = None if self._qpns is None else sorted(self._qpns)
        self._write({"event": "start", "version": VERSION, "wall": time.time(), "qpns": wanted, **(about or {})})
        engine.observer = self
        self.changed(engine.qps)

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

    # -- transport.interfaces.Observer -----------------------------------------------------------------------------

    def changed(self, qpns: Iterable[int]) -> None:
        """Note what has changed since each of these queue pairs was looked at last."""
        for qpn in qpns:
            self._look(qpn)

    def removed(self, qpn: int) -> None:
        """A line for the end of a queue pair."""
        if self._wants(qpn):
            self._seen.pop(qpn, None)
            self._event(qpn, "gone")

    def refused(self, reason: str, length: int) -> None:
        """A line for a frame of no queue pair."""
        if self._qpns is None:
            self._write({"event": "refused", "reason": reason, "length": length})

    def receiving(self, packet: Packet) -> None:
        """The line of a packet, as far as it is known before the packet acts."""
        if self._wants(packet.destination_qpn):
            self._line = self._received(packet, packet.destination_qpn)
            self._counted = dict(self._engine.counters)

    def received(self, packet: Packet) -> None:
        """Write the line, with what the packet has raised."""
        if not self._wants(packet.destination_qpn):
            return
        line, before = self._line, self._counted
        counters = self._engine.counters
        counted = [name for name, value in counters.items() if before.get(name, 0) != value and name not in _UNTOLD]
        if counted:
            line["counted"] = counted
        self._write(line)
        self._look(packet.destination_qpn)

    def sink(self, qpn: int, inner: FrameSink) -> FrameSink:
        """A sink that notes the frames of one turn."""
        return _TracedSink(inner, qpn, self._sent) if self._wants(qpn) else inner

    def fetched(self, qpn: int, wqe: SendWqe | RecvWqe) -> None:
        """A line for a posted request."""
        if not self._wants(qpn):
            return
        if isinstance(wqe, RecvWqe):
            self._event(qpn, "post", side="receive", wr_id=wqe.wr_id, length=wqe.length)
            return
        flags = [flag.name for flag in SendFlag if wqe.flags & flag]
        opcode = _REQUESTS.get(wqe.opcode, str(wqe.opcode))
        self._event(qpn, "post", side="send", wr_id=wqe.wr_id, opcode=opcode, length=wqe.length, flags=flags)

    def completed(self, qpn: int, completion: WorkCompletion) -> None:
        """A line for a completion."""
        if not self._wants(qpn):
            return
        side = "receive" if completion.opcode >= WcOpcode.RECV else "send"
        more = {"imm": completion.imm} if completion.imm else {}
        if side == "receive":
            more["source_qpn"] = completion.src_qp
        self._event(
            qpn, "completion", side=side, wr_id=completion.wr_id, status=WcStatus(completion.status).name,
            opcode=WcOpcode(completion.opcode).name, byte_len=completion.byte_len, **more,
        )  # fmt: skip

    def timer(self, qpn: int, kind: str) -> None:
        """A line for a timer that acts."""
        if self._wants(qpn):
            self._event(qpn, "timer", timer=kind)

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
            self.lines += 1
            if self.lines < self._limit:
                return
            self._file.write(json.dumps({"t": stamped["t"], "event": "limit", "lines": self.lines}) + "\n")
        except OSError:  # the disk is full
            pass
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

    def _sent(self, qpn: int, path: Path, headers: bytes, payload: Buffer) -> None:
        fields = describe(headers)
        fields.pop("source_qpn", None)
        line = {"event": "packet", "direction": "sent", "qpn": qpn, **fields, "length": len(payload)}
        line["remote_ip"] = self._address(path.destination_ip)
        if len(path.source_ip) == 4:
            line["ip_id"] = path.ip_id  # this frame's: the real sink takes it
        qp = self._engine.qps.get(qpn)
        flags = FLAGS[headers[0]]
        if qp is not None and qp.attributes.qp_type == QpType.RC and flags & _REQUEST and not flags & _RESUME:
            # high_psn advances after a turn only: what it has not reached is new.
            if (qp.sender.high_psn - fields["psn"] - 1 & PSN_MASK) < PSN_HALF:
                line["retransmit"] = True
        self._write(line)

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

    def _end(self) -> None:
        if not self._on:
            return
        self._on = False
        if self._engine.observer is self:
            self._engine.observer = None
        with contextlib.suppress(OSError):  # the disk is full: what was written remains
            self._file.close()
