"""Measure the CPU time of the protocol core per packet, without kernel, program or network.

Two engines exchange frames in memory. `python benchmarks/core.py [--json] [--rounds N]` prints microseconds of CPU time
per packet at requester and responder, for 1 MiB messages at MTU 4096 and for small ones. They include the ICRC and one
copy of the payload at each end, but no system calls. Each number is the best of N rounds, because disturbances can only
slow a round down.
"""

from __future__ import annotations

import argparse
import json
import time

from softroce_ext.simulation.hosts import BASE, End, Host, connect, end
from softroce_ext.transport.verbs import WrOpcode
from softroce_ext.wire.frame import MAX_FRAME, Buffer, build
from softroce_ext.wire.frame import Path as WirePath

BATCH = 64
DEPTH = 16
CASES = (
    ("write_1MiB", WrOpcode.RDMA_WRITE, 1 << 20, 40),
    ("send_1MiB", WrOpcode.SEND, 1 << 20, 40),
    ("read_1MiB", WrOpcode.RDMA_READ, 1 << 20, 40),
    ("send_64B", WrOpcode.SEND, 64, 4000),
    ("write_8B", WrOpcode.RDMA_WRITE, 8, 4000),
)


class Arena:
    """A batch of frames in one buffer, as the NIC's port keeps them."""

    def __init__(self) -> None:
        self._slots = [memoryview(bytearray(MAX_FRAME)) for _ in range(BATCH)]
        self.clear()

    def clear(self) -> None:
        """Discard the frames of the previous batch."""
        self.room = BATCH
        self.frames: list[memoryview] = []

    def add(self, path: WirePath, headers: bytes, payload: Buffer, pad: int) -> None:
        """Build one frame into the next slot (`FrameSink.add`)."""
        out = self._slots[len(self.frames)]
        ip_id = path.ip_id
        path.ip_id = ip_id + 1 & 0xFFFF
        self.room -= 1
        self.frames.append(out[: build(path, ip_id, headers, payload, pad, out)])


def one_round(opcode: WrOpcode, size: int, count: int) -> tuple[float, float]:
    """Transfer `count` messages; returns CPU microseconds per data packet at (requester, responder)."""
    here, there = end(Host(1), 17, 1 << 21), end(Host(2), 18, 1 << 21)
    connect(here, there, path_mtu=4096, timeout=20)
    if opcode == WrOpcode.SEND:
        for number in range(count):
            there.receive(number, BASE, size)
    spent = {1: 0.0, 2: 0.0}
    packets = {1: 0, 2: 0}
    arenas = {1: Arena(), 2: Arena()}

    def carry(sender: End, receiver: End) -> None:
        arena = arenas[sender.host.number]
        arena.clear()
        begin = time.thread_time()
        packets[sender.host.number] += sender.host.engine.frames_to_send(0.0, arena)
        sent = time.thread_time()
        for frame in arena.frames:
            receiver.host.engine.receive(frame, 0.0)
        receiver.host.engine.end_of_batch(0.0)
        spent[sender.host.number] += sent - begin
        spent[receiver.host.number] += time.thread_time() - sent

    posted = 0
    while len(here.scq.entries) < count:
        while posted < count and posted - len(here.scq.entries) < DEPTH:
            here.post(opcode, posted, BASE, size)
            posted += 1
        carry(here, there)
        carry(there, here)
    data = max(packets.values())
    return spent[1] / data * 1e6, spent[2] / data * 1e6


def main() -> None:
    """Run all cases and print their results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_argument("--rounds", type=int, default=5, help="rounds per case (default: %(default)s)")
    arguments = parser.parse_args()
    result = {}
    for name, opcode, size, count in CASES:
        rounds = [one_round(opcode, size, count) for _ in range(max(1, arguments.rounds))]
        requester, responder = (min(side) for side in zip(*rounds, strict=True))
        result[name] = {"requester_us": round(requester, 2), "responder_us": round(responder, 2)}
        if not arguments.json:
            print(f"{name:11} requester {requester:6.2f} µs/packet   responder {responder:6.2f} µs/packet")
    if arguments.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
