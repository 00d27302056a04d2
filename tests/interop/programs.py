"""The table of programs: how each is started at both ends, and what it can be asked for.

Words in braces are filled in for each run: {ip} the server's address, {own} the end's, {gid} its GID index, {group} a
multicast address, {mtu} the path MTU, {size} the message's bytes, {count} how many messages.
Device rxe0 is the only one at either end.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Final

TCP: Final = 18515
"""Where perftest and libibverbs' examples listen."""
SIZES: Final = ("tiny", "byte", "mtu-1", "mtu", "mtu+1", "mtus", "mib")
"""Size classes; `bytes_of` gives the number."""
WRONG: Final = re.compile(r"invalid data|[Dd]ata (verification|mismatch)|data verification failed|cq completion failed")
"""Said by a program that ends with 0 all the same."""


def bytes_of(size: str, mtu: int) -> int:
    """A size class as a number of bytes, for a path MTU."""
    return {"byte": 1, "tiny": 64, "mtu-1": mtu - 1, "mtu": mtu, "mtu+1": mtu + 1, "mtus": 3 * mtu + 17,
            "mib": 1 << 20}[size]  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One program with one way to call it."""

    name: str
    transport: str
    """RC, UC or UD."""
    server: str
    client: str = ""
    """Without: the server's words and {ip}."""
    sizes: tuple[str, ...] = SIZES
    port: int = TCP
    """TCP port that the server listens on when the client may come; 0: the server uses rdma_cm."""
    steady: bool = False
    """The server does not end by itself: it is ended after the client, and its exit code says nothing."""
    lossless: bool = False
    """Never ends when a datagram is lost, so it runs on a clean link only."""
    families: tuple[int, ...] = (4, 6)
    """What it can be told to use."""
    slow: int = 1
    """Divides the count of messages."""

    @property
    def cm(self) -> bool:
        """Whether the connection is made by rdma_cm."""
        return self.port == 0

    @property
    def needs_cm(self) -> bool:
        """Whether it cannot run without rdma_cm (qperf is called with -cm1)."""
        return self.cm or self.name.startswith("qperf")

    def words(self, side: str, **values: object) -> list[str]:
        """The command line of `server` or `client`."""
        text = self.server if side == "server" else self.client or f"{self.server} {{ip}}"
        return text.format(**values).split()


SMALL: Final = ("byte", "tiny", "mtu-1", "mtu")
"""What fits into one packet."""
FIXED: Final = ("tiny",)
"""Programs whose size is their own."""


def _pingpong(kind: str, transport: str, sizes: tuple[str, ...] = SIZES, more: str = "") -> list[Row]:
    base = f"ibv_{kind}_pingpong -g {{gid}} -s {{size}} -n {{count}} -c{more}"
    lossless = transport != "RC"
    return [
        Row(f"ibv_{kind}_pingpong", transport, base, sizes=sizes, lossless=lossless),
        Row(f"ibv_{kind}_pingpong -e", transport, base + " -e", sizes=sizes, lossless=lossless),
    ]


def _perftest(name: str, transport: str = "RC", options: str = "", sizes: tuple[str, ...] = SIZES) -> Row:
    base = f"{name} -x {{gid}} -F -n {{count}}"
    if sizes != FIXED:
        base += " -s {size}"
    if transport != "UD":
        base += " -m {mtu}"
    if transport != "RC":
        base += f" -c {transport}"
    label = " ".join(filter(None, (name, "" if transport == "RC" else transport, options)))
    port = 0 if "-R" in options else TCP
    # With -R perftest looks its server's name up as IPv4 only.
    families = (4,) if port == 0 else (4, 6)
    words = f"{base} {options}".strip()
    return Row(label, transport, words, sizes=sizes, port=port, lossless=transport != "RC", families=families)


ROWS: Final[tuple[Row, ...]] = (
    *_pingpong("rc", "RC", more=" -m {mtu}"),
    *_pingpong("uc", "UC", more=" -m {mtu}"),
    *_pingpong("ud", "UD", SMALL),
    *_pingpong("srq", "RC", more=" -m {mtu} -q 4"),
    *(_perftest(f"ib_{verb}_{kind}") for verb in ("send", "write", "read") for kind in ("lat", "bw")),
    *(_perftest(f"ib_{verb}_{kind}", "UC") for verb in ("send", "write") for kind in ("lat", "bw")),
    *(_perftest(f"ib_send_{kind}", "UD", sizes=SMALL) for kind in ("lat", "bw")),
    *(_perftest(f"ib_atomic_{kind}", options=f"-A {verb}", sizes=FIXED)
      for kind in ("lat", "bw") for verb in ("FETCH_AND_ADD", "CMP_AND_SWAP")),
    # Its server waits for one queue's event by taking the other's too, and hangs when an ACK is late.
    replace(_perftest("ib_send_lat", options="-e"), lossless=True),
    _perftest("ib_send_bw", options="-e"),
    _perftest("ib_send_lat", options="-I 64", sizes=("byte", "tiny")),
    _perftest("ib_send_bw", options="-b"),
    _perftest("ib_write_bw", options="-b -q 4"),
    # An emulated peer needs seconds for 16 MiB; with the default of 67 ms everything is asked for again and again.
    _perftest("ib_read_bw", options="-q 4 -o 4 -u 17"),
    _perftest("ib_send_bw", options="--use-srq -q 2"),
    _perftest("ib_send_lat", options="-R"),
    _perftest("ib_write_bw", options="-R"),
    _perftest("ib_read_bw", options="-R"),
    _perftest("ib_send_bw", "UD", options="-R", sizes=SMALL),
    Row("rping", "RC", "rping -s -a {ip} -C {count} -S {size} -v -V", "rping -c -a {ip} -C {count} -S {size} -v -V",
        sizes=("tiny", "mtu-1", "mtu", "mtu+1", "mtus"), port=0, slow=10),
    Row("ucmatose", "RC", "ucmatose -b {ip} -c 2 -C {count} -S {size}", "ucmatose -s {ip} -c 2 -C {count} -S {size}",
        port=0),
    Row("udaddy", "UD", "udaddy -b {ip} -c 1 -C {count} -S {size}", "udaddy -s {ip} -c 1 -C {count} -S {size}",
        sizes=SMALL, port=0, lossless=True),
    Row("rdma_server, rdma_client", "RC", "rdma_server -s {ip}", "rdma_client -s {ip}", sizes=FIXED, port=0),
    Row("cmtime", "RC", "cmtime -b {ip} -c 20", "cmtime -s {ip} -c 20", sizes=FIXED, port=0,
        steady=True),
    Row("mckey", "UD", "mckey -m {group} -b {ip} -C {count} -S {size}",
        "mckey -m {group} -b {own} -s -C {count} -S {size}", sizes=SMALL, port=0, lossless=True),
    Row("rstream -T v", "RC", "rstream -b {ip} -C {count} -S {size} -I 1 -T v",
        "rstream -s {ip} -C {count} -S {size} -I 1 -T v", port=0),
    Row("riostream -T v", "RC", "riostream -b {ip} -C {count} -S {size} -I 1 -T v",
        "riostream -s {ip} -C {count} -S {size} -I 1 -T v", port=0),
    *(Row(f"qperf {test}", "RC", "qperf", f"qperf {{ip}} -cm1 -t 1 -m {{size}} {test}", sizes=("tiny", "mtus"),
          port=19765, steady=True, families=(4,)) for test in ("rc_bi_bw", "rc_rdma_read_bw")),
    *(Row(f"qperf {test}", "RC", "qperf", f"qperf {{ip}} -cm1 -t 1 {test}", sizes=FIXED, port=19765, steady=True,
          families=(4,))
      for test in ("ver_rc_compare_swap", "ver_rc_fetch_add")),
)  # fmt: skip
"""qperf makes RC connections by rdma_cm only where a GID is needed: its UC and UD tests cannot name one. It knows IPv4
only."""
