"""The link between two ends: passes frames between two interfaces, impairs RoCE frames by seed, counts, and captures.

Runs as a process of its own inside the lab's namespace (`python -m tests.interop.relay A B`) and takes JSON lines on
standard input, each answered by one line: {"link": {"loss": p, "reorder": p, "duplicate": p, "seed": n}} sets both
directions, {"capture": path or null} begins or ends a pcap of RoCE frames as they arrive, {"counts": true} asks. The
faults are those of `softroce_ext.port.impairment`. Only RoCEv2 frames (UDP port 4791) are impaired: what TCP does about
losses is not what is tested.
"""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import sys
import time

from softroce_ext.port.impairment import Faults, Impairment, ImpairmentSpec

ETH_P_ALL = 3
SO_RCVBUFFORCE = 33
SOL_PACKET = 263
PACKET_IGNORE_OUTGOING = 23
REORDERED = {"hold": 0.004, "hold_frames": 2}
"""A frame that is held back for reordering goes out after the next two frames, or after this time (seconds)."""
Link = dict[str, float]


def port(interface: str) -> socket.socket:
    """Raw socket that sees only the frames that come in from the far side."""
    raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    raw.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 32 << 20)
    raw.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    raw.bind((interface, ETH_P_ALL))
    raw.setblocking(False)
    return raw


def is_roce(frame: bytes) -> bool:
    """UDP to port 4791 over IPv4 without options, or IPv6 without extension headers."""
    kind = frame[12:14]
    if kind == b"\x08\x00":
        return frame[23] == 17 and frame[36:38] == b"\x12\xb7"
    return kind == b"\x86\xdd" and frame[20] == 17 and frame[56:58] == b"\x12\xb7"


REQUESTS = frozenset((*range(13), 19, 20, 22, 23))
"""RC opcodes of requests (IBA 9.2, table 38)."""


class Direction:
    """One direction of the link."""

    def __init__(self, into: socket.socket) -> None:
        self._into = into
        self.set({})

    def set(self, link: Link, salt: int = 0) -> None:
        """Start again with these probabilities and this seed; what was held back is dropped."""
        values = {name: link[name] for name in ("loss", "reorder", "duplicate") if name in link}
        spec = ImpairmentSpec(**values, **REORDERED)  # type: ignore[arg-type]
        self._impairment = Impairment(spec, int(link.get("seed", 0)) * 2 + salt) if any(values.values()) else None
        self._sent: dict[bytes, tuple[int, int]] = {}
        self._frames = self._roce = self._unsent = self._renumbered = 0

    @property
    def counts(self) -> dict[str, int]:
        """Frames by what became of them.

        renumbered: RC requests whose PSN was another request's (other opcode or length) before: no NIC may do that, but
        rxe 6.1 does.
        """
        faults = self._impairment.faults if self._impairment is not None else Faults()
        return {
            "frames": self._frames,
            "roce": self._roce,
            "lost": faults.lost,
            "reordered": faults.reordered,
            "duplicated": faults.duplicated,
            "unsent": self._unsent,
            "renumbered": self._renumbered,
        }

    @property
    def holds(self) -> bool:
        """Whether frames wait to be delivered."""
        return self._impairment is not None and self._impairment.next_time() is not None

    def _send(self, frame: bytes) -> None:
        try:
            self._into.send(frame)
        except OSError:
            self._unsent += 1

    def take(self, frame: bytes, roce: bool) -> None:
        """Pass one frame that came in."""
        self._frames += 1
        self._roce += roce
        if self._impairment is None or not roce:
            self._send(frame)
            return
        self._watch(frame)
        self._impairment.take(frame)
        self.release()

    def _watch(self, frame: bytes) -> None:
        """Count a request that goes by the PSN of another one."""
        at = 42 if frame[12] == 0x08 else 62  # the BTH
        if frame[at] in REQUESTS:
            what = frame[at], len(frame)
            key = frame[at + 5 : at + 8] + frame[at + 9 : at + 12]  # destination QPN, PSN
            self._renumbered += self._sent.setdefault(key, what) != what

    def release(self) -> None:
        """Send the frames that have arrived by now."""
        if self._impairment is not None:
            for frame in self._impairment.due():
                self._send(frame)


class Relay:
    """Both directions, and the commands that control them."""

    def __init__(self, first: str, second: str) -> None:
        a, b = port(first), port(second)
        self._ways = {a: Direction(b), b: Direction(a)}
        self._capture: int | None = None
        self._rest = b""

    def _command(self, message: dict[str, object]) -> dict[str, object]:
        if "link" in message:
            for salt, way in enumerate(self._ways.values()):
                way.set(message["link"], salt)  # type: ignore[arg-type]
        if "capture" in message:
            if self._capture is not None:
                os.close(self._capture)
            path, self._capture = message["capture"], None
            if path is not None:
                self._capture = os.open(str(path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
                os.write(self._capture, struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1))
        return {"counts": [way.counts for way in self._ways.values()]}

    def _pass(self, source: socket.socket) -> None:
        way = self._ways[source]
        for _ in range(64):
            try:
                frame = source.recv(65536)
            except BlockingIOError:
                return
            except OSError:
                return  # the interface is down for a moment
            roce = is_roce(frame)
            if roce and self._capture is not None:
                stamp = time.time()
                head = struct.pack("<IIII", int(stamp), int(stamp % 1 * 1e6), len(frame), len(frame))
                os.write(self._capture, head + frame)
            way.take(frame, roce)

    def run(self) -> None:
        """Until standard input ends."""
        print(json.dumps({"ready": True}), flush=True)
        sources: list[object] = [0, *self._ways]
        while True:
            held = any(way.holds for way in self._ways.values())
            ready, _, _ = select.select(sources, [], [], 0.001 if held else None)
            for source in ready:
                if isinstance(source, socket.socket):
                    self._pass(source)
                    continue
                piece = os.read(0, 65536)
                if not piece:
                    return
                *lines, self._rest = (self._rest + piece).split(b"\n")
                for line in lines:
                    print(json.dumps(self._command(json.loads(line))), flush=True)
            if held:
                for way in self._ways.values():
                    way.release()


if __name__ == "__main__":
    Relay(*sys.argv[1:3]).run()
