"""Hostile input to a live NIC: a process of its own on a veth, attacked from the wire and by programs.

Invariants, while each attack runs and after it:

* the NIC lives, and it says nothing on its standard error;
* honest programs beside it end with 0, every byte checked;
* no byte changes outside the offender's own registered regions (a canary's pages, the offender's guard pages);
* each frame and each command that is refused is counted; every frame that arrived is counted somewhere;
* when the offenders are dead nothing is left of them: contexts, files, descriptors, and memory does not grow.

The budget is printed (`pytest -s`). HOSTILE_SECONDS=600 makes each attack that long, HOSTILE_SEED repeats one.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from softroce_ext.process.management import COMMANDS as COMMANDS_OF_CONTROL
from tests.system import programs
from tests.system.hostile_device import COMMANDS, DEEDS, LIVES, TALLY_BYTES
from tests.system.nic_pair import Host, finish, nics, pair, until

SECONDS = float(os.environ.get("HOSTILE_SECONDS", "2.5"))
SEED = int(os.environ.get("HOSTILE_SEED", "20260"))
RATE = 6000
"""Frames in a second: what a NIC on a loaded machine refuses and still serves honest programs in time."""
GROWTH = 48 << 20
"""Bytes that the NIC's memory may grow by: Python's arenas, and what is kept for the next of its kind."""
PAUSE = 2.0
"""Seconds that the NIC may be away for on a loaded machine; RDMA programs give a connection up after about four."""
RPINGS = 20
PARSE = ("length", "not_roce", "ip_header", "ip_fragment", "udp_checksum", "bth_version", "opcode", "icrc")
"""Refusals of a frame before anything else looks at it."""
PINGPONG = ["ibv_rc_pingpong", "-g", "1", "-c", "-n", "200", "-s", "2000"]


class Watch:
    """Two hosts with NICs; the first one's NIC is attacked. What it looks like before and after."""

    def __init__(self, first: Host, second: Host, folder: Path) -> None:
        self.first, self.second, self.folder = first, second, folder
        self.honest = 0
        self.faults: list[str] = []
        assert pair(first, second, PINGPONG)[1][0] == 0
        self.settle()
        self.before = self.counters()
        self.descriptors, self.memory = self._descriptors(), self._memory()

    def counters(self) -> dict[str, int]:
        with self.first.control() as control:
            found: dict[str, int] = control.call("counters")["counters"]
            return found

    def new(self) -> dict[str, int]:
        """What was counted since the beginning."""
        return {name: count - self.before.get(name, 0) for name, count in self.counters().items()}

    @property
    def pid(self) -> int:
        assert self.first.nic is not None
        return self.first.nic.pid

    def _descriptors(self) -> list[str]:
        """What the NIC has open; a counter gets its file when it is first needed."""
        found = []
        for path in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                found.append(os.readlink(path))
        return sorted(name for name in found if "/sys/class/" not in name)

    def _memory(self) -> int:
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    def settle(self) -> None:
        """Until nothing is left of programs that have ended."""
        until = time.monotonic() + 10
        while time.monotonic() < until:
            with self.first.control() as control:
                if not control.call("status")["contexts"] and not self.left():
                    return
            time.sleep(0.05)
        raise AssertionError(f"left of programs that have ended: {self.left()}")

    def left(self) -> list[str]:
        """Folders of opens that the NIC has made."""
        return [path.name for path in self.first.path("/run/migros/nic/ctx").iterdir() if path.name[0].isdigit()]

    def work(self, words: list[str], until: Callable[[], bool]) -> None:
        """Honest programs, one pair after the other, until the attack is over (in a thread)."""
        try:
            while not until():
                server, client = self.both(words)
                if (server[0], client[0]) != (0, 0):
                    self.faults.append(f"{server}\n{client}")
                    return
                self.honest += 1
        except Exception as error:
            self.faults.append(repr(error))

    def both(self, words: list[str]) -> tuple[tuple[int, str], tuple[int, str]]:
        if words[0] != "rping":
            return pair(self.first, self.second, words)
        listening = self.first.start(*words, "-s", "-a", self.first.ip)
        self.first.wait_for_cm_listener(listening)
        result = finish(self.second.start(*words, "-c", "-a", self.first.ip))
        code, output = finish(listening, 5)
        if "rdma_get_cm_event: Bad file descriptor" in output and output.count("server ping data") == RPINGS:
            code = 0  # rping's own race at its end: one thread closes what the other waits for
        return (code, output), result

    def check(self) -> None:
        """The invariants that hold after every attack."""
        assert not self.faults, self.faults[0]
        assert self.honest > 0, "no honest program ended while the attack was on"
        assert self.first.nic is not None and self.first.nic.poll() is None, "the NIC has died"
        self.settle()
        until = time.monotonic() + 5
        while (now := self._descriptors()) != self.descriptors and time.monotonic() < until:
            time.sleep(0.05)  # a connection to the control socket is closed after its answer
        assert now == self.descriptors
        assert self._memory() - self.memory < GROWTH, f"{(self._memory() - self.memory) >> 20} MiB more"
        # It works as on the first day.
        assert [code for code, _ in pair(self.first, self.second, PINGPONG)] == [0, 0]

    def tell(self, what: str, more: str) -> None:
        """The budget as it ran, and what was refused."""
        refusals = ("refused_", "dropped_", "cm_")
        new = {
            name: count for name, count in self.new().items() if count and name.startswith(refusals) and "/" not in name
        }
        new.pop("cm_received", None)
        top = sorted(new.items(), key=lambda item: -item[1])
        kinds = " ".join(f"{name.removeprefix('refused_')}={count}" for name, count in top[:8])
        print(
            f"\n{what}: seed {SEED}, {SECONDS:g} s, {more}; {self.honest} honest pairs; memory "
            f"{(self._memory() - self.memory) >> 10:+} KiB\n  refused: {kinds} (+{max(0, len(top) - 8)} kinds)"
        )


@pytest.fixture
def watch(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Iterator[Watch]:
    with nics() as (first, second):
        yield Watch(first, second, tmp_path)
    assert "Traceback" not in capfd.readouterr().err, "the NIC met a fault of its own"


def start_program(watch: Watch, mode: str, number: int, bridge: bool = True) -> tuple[subprocess.Popen[str], Path]:
    """A hostile program on the first host, and the file of its counters."""
    tally = watch.folder / f"tally-{mode}-{number}"
    seed = str(SEED + 1000 * number)
    words = programs.module("hostile_program", mode, seed, str(SECONDS), str(tally), python=sys.executable)
    environment = watch.first.environment() if bridge else dict(os.environ)
    process = subprocess.Popen(
        watch.first.enter(*words), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    return process, tally


def totals(tallies: list[Path]) -> list[int]:
    """The sums of counter files."""
    tables = [memoryview(path.read_bytes()[:TALLY_BYTES]).cast("Q") for path in tallies]
    return [sum(row) for row in zip(*tables, strict=True)]


def attack_by_programs(watch: Watch, modes: list[str], honest: list[str], bridge: bool = True) -> list[int]:
    """Hostile programs at once, honest ones between; the sums of what the hostile ones counted."""
    started = [start_program(watch, mode, number, bridge) for number, mode in enumerate(modes)]
    watch.work(honest, lambda: all(process.poll() is not None for process, _ in started))
    for process, _ in started:
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output
    return totals([tally for _, tally in started])


def check_refusals(watch: Watch, counted: list[int]) -> None:
    """What programs were told is what the NIC has counted (an honest program may have been refused something too)."""
    new = watch.new()
    for number in range(1, 134):
        name = f"refused_command_{errno.errorcode.get(number, number)}"
        assert new.get(name, 0) >= counted[number], f"{name}: {new.get(name, 0)} counted of {counted[number]}"
    assert new.get("refused_command_EIO", 0) == 0, "EIO is a fault of the NIC's own"


def test_programs(watch: Watch) -> None:
    """Commands of every shape and scribbled queues, by programs that die at any moment."""
    counted = attack_by_programs(watch, ["verbs", "verbs"], PINGPONG)
    watch.check()
    check_refusals(watch, counted)
    watch.tell("programs", f"{counted[LIVES]} lives, {counted[COMMANDS]} commands, {counted[DEEDS]} scribbles")
    assert counted[LIVES] > 2 and counted[COMMANDS] > 100 and counted[DEEDS] > 100


def attack_from_outside(watch: Watch, kind: str, honest: list[str]) -> tuple[int, str]:
    """Frames from the second host while honest programs run and a canary waits; (frames sent, the canary's verdict)."""
    canary, _ = start_program(watch, "canary", 0)
    assert canary.stdout is not None
    target = json.loads(canary.stdout.readline())
    (link,) = json.loads(watch.first.run("ip", "-j", "link", "show", "eth0").stdout)
    target |= {"mac": link["address"], "ip": watch.first.ip}
    options = kind, str(SEED), str(SECONDS), str(RATE), json.dumps(target)
    words = programs.module("hostile_sender", *options, python=sys.executable)
    sender = subprocess.Popen(watch.second.enter(*words), stdout=subprocess.PIPE, text=True)
    watch.work(honest, lambda: sender.poll() is not None)
    sent, _ = sender.communicate(timeout=60)
    verdict, _ = canary.communicate("", timeout=20)
    assert canary.returncode == 0, verdict
    return int(sent), verdict


def check_frames(watch: Watch) -> None:
    """Every frame that the kernel handed over is either refused by its form or counted as received."""
    new = watch.new()
    refused = sum(new.get(f"refused_{name}", 0) for name in PARSE)
    assert new["rx_packets"] == refused + new["rcvd_pkts"]


def test_frames(watch: Watch) -> None:
    """A flood of damaged and of wrong frames."""
    sent, _ = attack_from_outside(watch, "frames", PINGPONG)
    watch.check()
    check_frames(watch)
    watch.tell("frames", f"{sent} frames")
    kinds = {name for name, count in watch.new().items() if count and name.startswith("refused_")}
    assert kinds >= {"refused_icrc", "refused_length", "refused_address", "refused_qpn", "refused_pkey", "refused_mad"}


def test_management_datagrams_and_rdma_cm(watch: Watch) -> None:
    """MADs of every kind, and programs that write whatever to rdma_cm, while a stock program connects and checks."""
    hostile, tally = start_program(watch, "cm", 0)
    sent, _ = attack_from_outside(watch, "mads", ["rping", "-C", str(RPINGS), "-V", "-v"])
    output, _ = hostile.communicate(timeout=60)
    assert hostile.returncode == 0, output
    counted = totals([tally])
    watch.check()
    check_frames(watch)
    watch.tell("rdma_cm", f"{sent} MADs, {counted[LIVES]} lives, {counted[COMMANDS]} commands")
    assert counted[LIVES] > 2 and counted[COMMANDS] > 100


def hostile_line(chance: random.Random) -> bytes:
    """What may be written to the control socket; nothing that a lawful request could do."""
    names = [name for name in COMMANDS_OF_CONTROL if name not in ("shutdown", "trace", "capture")]
    names += ["nothing", "", None, 7, [], {}]
    values = [None, 0, -1, 2**70, 1e308, "", "x", "\ud800", "\0", "9-9", [], [[]], {}, {"a": "b"}, ["9-9"], [0], True]
    words = [
        "pids",
        "contexts",
        "file",
        "addresses",
        "ip",
        "timeout",
        "wait",
        "reset",
        "qpns",
        "limit",
        "source_ip",
        "x",
    ]
    kind = chance.randrange(8)
    if kind == 0:
        return chance.randbytes(chance.choice((1, 100, 5000)))
    if kind == 1:
        return chance.choice((b"[", b'{"a":', b'[{"x":')) * chance.choice((10, 1000, 100_000)) + b"\n"
    if kind == 2:
        return b"x" * chance.choice((100, 1 << 16, 5 << 20))
    if kind == 3:
        return json.dumps({"command": "status", "x": "y" * (1 << chance.randrange(21))}).encode() + b"\n"
    request = {"command": chance.choice(names)} | {
        chance.choice(words): chance.choice(values) for _ in range(chance.randrange(4))
    }
    if request.get("file"):
        request["file"] = "/none/such"  # a file that it may write would be a lawful request
    line = json.dumps(request).encode() + b"\n"
    return line[: chance.randrange(len(line))] if kind == 4 else line * chance.choice((1, 1, 30))


def write_to_control(watch: Watch, chance: random.Random, until: float) -> dict[str, int]:
    """Connections that send anything, read or not, and close at any time."""
    done = {"connections": 0, "bytes": 0, "answers": 0}
    held: list[socket.socket] = []
    while time.monotonic() < until:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(0.2)
        with contextlib.suppress(OSError):
            client.connect(str(watch.first.path("/run/migros/nic/control.sock")))
            for _ in range(chance.randrange(6)):
                data = hostile_line(chance)
                client.sendall(data)
                done["bytes"] += len(data)
                if chance.random() < 0.5:
                    done["answers"] += client.recv(1 << 20).count(b'"ok"')
        done["connections"] += 1
        held.append(client)
        while len(held) > 20 or (held and chance.random() < 0.5):
            held.pop(chance.randrange(len(held))).close()
    for client in held:
        client.close()
    return done


def test_sockets(watch: Watch) -> None:
    """Datagrams to the bridge's socket with anything in and beside them, lines of any kind to the control socket."""
    done: dict[str, int] = {}
    until = time.monotonic() + SECONDS
    writer = threading.Thread(
        target=lambda: done.update(write_to_control(watch, random.Random(SEED), until)), daemon=True
    )
    writer.start()
    counted = attack_by_programs(watch, ["socket", "socket"], PINGPONG, bridge=False)
    writer.join(timeout=30)
    for path in watch.first.path("/run/migros/nic/ctx").glob("open-*"):
        with contextlib.suppress(FileNotFoundError):  # the NIC has taken it, or put it away
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    watch.check()
    told = ", ".join(f"{count} {name}" for name, count in done.items())
    watch.tell("sockets", f"{counted[LIVES]} lives, {counted[COMMANDS]} datagrams; control socket: {told}")
    new = watch.new()
    for kind in ("datagram_length", "datagram_kind", "datagram_context", "open"):
        assert new.get(f"refused_{kind}", 0) > 0, f"no refused_{kind} was counted"
    assert done["answers"] > 10


def test_a_full_tmpfs(watch: Watch) -> None:
    """A program fills the file system that it shares with the NIC: running programs continue, new ones get an errno."""
    host = watch.first
    assert host.run("mount", "-o", "remount,size=16m", "/run/migros").returncode == 0
    with host.control() as control:
        control.call("trace", file="/run/migros/trace")
        control.call("trace_qp", file="/run/migros/trace-qp")
        control.call("capture", file="/run/migros/pcap")
    program, _ = start_program(watch, "canary", 0)
    assert program.stdout is not None and program.stdout.readline()
    words = [*PINGPONG, "-n", "5000"]
    server = host.start(*words)
    host.wait_for_listener(18515, server)
    client = watch.second.start(*words, host.ip)
    before = host.received()
    until(lambda: host.received() > before + 100, "traffic")
    host.run("dd", "if=/dev/zero", "of=/run/migros/nic/ctx/fill", "bs=4k")
    for _ in range(3):
        code, output = finish(host.start("ibv_rc_pingpong"), 10)
        assert code not in (0, -1), output
    before = host.received()
    until(lambda: host.received() > before + 100, "traffic with a full file system")
    assert client.poll() is None, finish(client)
    assert [finish(client)[0], finish(server)[0]] == [0, 0]
    verdict, _ = program.communicate("", timeout=20)
    assert program.returncode == 0, verdict
    host.path("/run/migros/nic/ctx/fill").unlink()
    with host.control() as control:
        for command in ("trace", "trace_qp", "capture"):
            control.call(command, file=None)
    watch.honest += 1
    watch.check()


def test_hoarders(watch: Watch) -> None:
    """Programs with thousands of objects that die: freeing those must not keep the NIC from everybody else."""
    pauses: list[float] = []
    over = threading.Event()

    def ask() -> None:
        with watch.first.control() as control:
            while not over.wait(0.02):
                started = time.monotonic()
                control.call("counters")
                pauses.append(time.monotonic() - started)

    asker = threading.Thread(target=ask, daemon=True)
    asker.start()
    counted = attack_by_programs(watch, ["hoard"], PINGPONG)
    over.set()
    asker.join(timeout=30)
    watch.check()
    watch.tell("hoarders", f"{counted[LIVES]} lives, {counted[COMMANDS]} commands, longest pause {max(pauses):.2f} s")
    assert max(pauses) < PAUSE
