"""The link between two ends: passes frames between two interfaces, spoils RoCE frames by seed, counts, and captures.

Runs as a process of its own inside the lab's namespace (`python relay.py A B`, standard library only) and takes JSON
lines on standard input, each answered by one line: {"link": {"loss": p, "reorder": p, "duplicate": p, "seed": n}} sets
both directions, {"capture": path or null} begins or ends a pcap of RoCE frames as they arrive, {"counts": true} asks.
Only RoCEv2 frames (UDP port 4791) are spoilt: what TCP does about losses is not our matter.
"""

from __future__ import annotations

import json
import os
import random
import select
import socket
import struct
import sys
import time

ETH_P_ALL = 3
SO_RCVBUFFORCE = 33
SOL_PACKET = 263
PACKET_IGNORE_OUTGOING = 23
HELD_SECONDS = 0.004
"""A frame held back for reordering goes out after the next two frames, or after this time."""
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
    """One way over the link."""

    def __init__(self, into: socket.socket) -> None:
        self._into = into
        self.counts = dict.fromkeys(("frames", "roce", "lost", "reordered", "duplicated", "unsent", "renumbered"), 0)
        """renumbered: RC requests whose PSN was another request's (other opcode or length) before: no NIC may do that,
        but rxe 6.1 does."""
        self.held: list[tuple[float, int, bytes]] = []
        """(send not later than, frames still to pass first, frame)."""
        self.set({})

    def set(self, link: Link, salt: int = 0) -> None:
        """Begin anew with these probabilities and this seed."""
        self._loss, self._reorder = link.get("loss", 0.0), link.get("reorder", 0.0)
        self._duplicate = link.get("duplicate", 0.0)
        self._dice = random.Random(link.get("seed", 0) * 2 + salt)
        self._clean = not (self._loss or self._reorder or self._duplicate)
        self._sent: dict[bytes, tuple[int, int]] = {}
        self.counts = dict.fromkeys(self.counts, 0)

    def _send(self, frame: bytes) -> None:
        try:
            self._into.send(frame)
        except OSError:
            self.counts["unsent"] += 1

    def take(self, frame: bytes, roce: bool, now: float) -> None:
        """One frame that came in."""
        self.counts["frames"] += 1
        self.counts["roce"] += roce
        if self._clean or not roce:
            self._send(frame)
            return
        self._watch(frame)
        loss, reorder, duplicate = (self._dice.random() for _ in range(3))
        if loss < self._loss:
            self.counts["lost"] += 1
        elif reorder < self._reorder:
            self.counts["reordered"] += 1
            self.held.append((now + HELD_SECONDS, 2, frame))
            return
        else:
            self._send(frame)
            if duplicate < self._duplicate:
                self.counts["duplicated"] += 1
                self._send(frame)
        self.held = [(end, left - 1, late) for end, left, late in self.held]
        self.release(now)

    def _watch(self, frame: bytes) -> None:
        """Count a request that goes by the PSN of another one."""
        at = 42 if frame[12] == 0x08 else 62  # the BTH
        if frame[at] in REQUESTS:
            what = frame[at], len(frame)
            key = frame[at + 5 : at + 8] + frame[at + 9 : at + 12]  # destination QPN, PSN
            self.counts["renumbered"] += self._sent.setdefault(key, what) != what

    def release(self, now: float) -> None:
        """Send what has been held back for long enough."""
        for entry in [entry for entry in self.held if entry[1] <= 0 or entry[0] <= now]:
            self.held.remove(entry)
            self._send(entry[2])


class Relay:
    """Both directions, and who controls them."""

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

    def _pass(self, source: socket.socket, now: float) -> None:
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
            way.take(frame, roce, now)

    def run(self) -> None:
        """Until standard input ends."""
        print(json.dumps({"ready": True}), flush=True)
        sources: list[object] = [0, *self._ways]
        while True:
            held = any(way.held for way in self._ways.values())
            ready, _, _ = select.select(sources, [], [], 0.001 if held else None)
            now = time.monotonic()
            for source in ready:
                if isinstance(source, socket.socket):
                    self._pass(source, now)
                    continue
                piece = os.read(0, 65536)
                if not piece:
                    return
                *lines, self._rest = (self._rest + piece).split(b"\n")
                for line in lines:
                    print(json.dumps(self._command(json.loads(line))), flush=True)
            if held:
                for way in self._ways.values():
                    way.release(now)


if __name__ == "__main__":
    Relay(*sys.argv[1:3]).run()
