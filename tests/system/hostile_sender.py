"""A hostile host: `-m tests.system.hostile_sender KIND SEED SECONDS RATE TARGET` sends frames from interface eth0.

KIND `frames`: captures of Linux rxe with bits, bytes and lengths changed, noise, and frames with a right ICRC and wrong
contents: to the canary's queue pairs from their partner's address, to everybody else's from a stranger's. KIND `mads`:
management datagrams of every kind, captured and made, from a partner and from strangers. TARGET is JSON: mac, ip, and
what the canary has printed. Prints how many frames it has sent.
"""

from __future__ import annotations

import json
import random
import socket
import struct
import sys
import time
from typing import Any

from softroce_ext.wire import opcodes as op
from softroce_ext.wire.frame import MAX_FRAME, build
from softroce_ext.wire.frame import Path as WirePath
from softroce_ext.wire.headers import BTH_DETH, GSI_QKEY, GSI_QPN
from tests.fuzz import fuzz_cm, fuzz_frames

BURST = 100
STRANGER = bytes([10, 9, 0, 66])
RESUME = 0x19
"""Not sent by strangers to the honest programs: it moves a connection if its PSN is right, and is no authentication."""
MTU = 1024


class Sender:
    """Makes frames for one NIC."""

    def __init__(self, chance: random.Random, source_mac: bytes, target: dict[str, Any]) -> None:
        self.chance = chance
        self.target = target
        self.macs = bytes.fromhex(target["mac"].replace(":", "")), source_mac
        self.here, self.there = bytes([10, 9, 0, 2]), socket.inet_aton(target["ip"])
        self._out = memoryview(bytearray(MAX_FRAME + 64))

    def _built(self, source: bytes, headers: bytes, payload: bytes) -> bytes:
        pad = -len(payload) & 3
        way = WirePath(self.macs[1], self.macs[0], source, self.there, 0xC000 + self.chance.randrange(64))
        head = bytearray(headers)
        head[1] |= pad << 4
        length = build(way, self.chance.randrange(65536), bytes(head), payload, pad, self._out)
        return bytes(self._out[:length])

    def frame(self) -> bytes:
        """Any frame."""
        chance, target = self.chance, self.target
        if chance.random() < 0.4:
            frame = bytearray(fuzz_frames.mutated(chance))
            frame[0:12] = self.macs[0] + self.macs[1]
            return bytes(frame[: MAX_FRAME + 64])
        source, qpn, psn = (
            self.here,
            chance.choice(target["qpns"]),
            chance.choice((0, 0, 1, 2, chance.randrange(1 << 24))),
        )
        opcode = chance.choice(list(op.TABLE))
        if chance.random() < 0.4:
            source, psn = STRANGER, chance.randrange(1 << 24)
            qpn = chance.choice(((target["qpns"][0] & 0xFF0000) + chance.randrange(256), 1, 0, 0xFFFFFF))
            while opcode == RESUME:
                opcode = chance.choice(list(op.TABLE))
        ack_byte = chance.choice((0, 0x80, 0xC0, chance.randrange(256)))
        pkey = chance.choice((0xFFFF,) * 12 + (0x7FFF, 0))
        headers = struct.pack(">III", opcode << 24 | pkey, qpn, ack_byte << 24 | psn)
        address = chance.choice((*target["addresses"], target["closed"][0], chance.choice(fuzz_frames.EDGES64)))
        address = max(0, min(2**64 - 1, address + chance.choice((0, 0, 8, 4092, -4, -4096))))
        for header in op.TABLE[opcode].headers:
            keys = (*target["keys"], target["closed"][1])
            headers += fuzz_frames.extended_header(chance, header.name, address, keys, MTU, 0)
        payload = b""
        if op.FLAGS[opcode] & op.OpFlag.PAYLOAD:
            payload = chance.randbytes(chance.choice((0, 1, 4, 8, 64, MTU, MTU, MTU + 4, 4096)))
        return self._built(source, headers, payload)

    def mad(self) -> bytes:
        """Any management datagram, sometimes of another length, for another Q_Key."""
        chance = self.chance
        source = chance.choice((self.here, self.here, self.here, STRANGER))
        data = fuzz_cm.random_mad(chance, [], [], source, self.there)
        if chance.random() < 0.1:
            data = chance.randbytes(chance.choice((0, 24, 252, 256, 260)))
        qkey = GSI_QKEY if chance.random() < 0.95 else chance.randrange(1 << 32)
        head = (op.UD | op.SEND_ONLY) << 24 | 0xFFFF
        return self._built(source, BTH_DETH.pack(head, GSI_QPN, chance.randrange(1 << 24), qkey, GSI_QPN), data)


def main() -> None:
    kind, seed, seconds, rate = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as out:
        out.bind(("eth0", 0))
        sender = Sender(random.Random(seed), out.getsockname()[4], json.loads(sys.argv[5]))
        make = sender.frame if kind == "frames" else sender.mad
        sent = 0
        started = now = time.monotonic()
        while now < started + seconds:
            for _ in range(BURST):
                try:
                    out.send(make())
                    sent += 1
                except OSError:
                    continue  # longer than the interface takes, or shorter than a frame
            now = time.monotonic()
            time.sleep(max(0.0, started + sent / rate - now))
        print(sent)


if __name__ == "__main__":
    main()
