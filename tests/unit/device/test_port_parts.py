"""The parts behind the port: impairment, capture, the management socket's client.

Invariants: the same seed gives the same faults, and no fault is invented (every frame out is one that went in, or a
damaged copy); a capture is a pcap that another reader understands.
"""

from __future__ import annotations

import select
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scapy.utils import RawPcapReader

from softroce_ext.control import ControlClient, ControlError
from softroce_ext.control.server import ControlServer
from softroce_ext.port.capture import Capture
from softroce_ext.port.impairment import Impairment, ImpairmentSpec


class Clock:
    """A clock that stands until it is moved."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def passed(spec: str, seed: int, frames: list[bytes]) -> list[bytes]:
    """What comes out of the cable."""
    clock = Clock()
    cable = Impairment(ImpairmentSpec.parse(spec), seed, clock)
    out = []
    for frame in frames:
        clock.now += 0.0001
        cable.take(frame)
        out += cable.due()
    clock.now += 20
    return out + cable.due()


FRAMES = [struct.pack(">I", number) * 20 for number in range(2000)]


def test_a_good_cable_changes_nothing() -> None:
    """No faults: the same frames in the same order."""
    assert passed("", 1, FRAMES) == FRAMES


def test_the_same_seed_gives_the_same_faults() -> None:
    """And another seed others."""
    spec = "loss=0.1,duplicate=0.1,reorder=0.1,corrupt=0.1"
    assert passed(spec, 1, FRAMES) == passed(spec, 1, FRAMES)
    assert passed(spec, 1, FRAMES) != passed(spec, 2, FRAMES)


@pytest.mark.parametrize("fault", ["loss", "duplicate", "reorder", "corrupt"])
def test_each_fault_does_what_it_says(fault: str) -> None:
    """At 10 %: about a tenth of the frames, and no other fault."""
    out = passed(f"{fault}=0.1", 3, FRAMES)
    unchanged = [frame for frame in out if frame in set(FRAMES)]
    if fault == "loss":
        assert 1700 < len(out) < 1900 and sorted(unchanged) == out
    elif fault == "duplicate":
        assert 2100 < len(out) < 2300 and sorted(out) == out and set(out) == set(FRAMES)
    elif fault == "reorder":
        assert sorted(out) == FRAMES and out != FRAMES
    else:
        changed = [(a, b) for a, b in zip(FRAMES, out, strict=True) if a != b]
        assert 100 < len(changed) < 300
        for before, after in changed:
            difference = int.from_bytes(before, "big") ^ int.from_bytes(after, "big")
            assert difference.bit_count() == 1, "one bit of one frame"


def test_delay_is_for_every_frame() -> None:
    """No frame arrives before its time, and the time of the next one is known."""
    clock = Clock()
    cable = Impairment(ImpairmentSpec(delay=0.5), 0, clock)
    cable.take(b"x" * 60)
    assert cable.due() == [] and cable.next_time() == 0.5
    clock.now = 0.5
    assert cable.due() == [b"x" * 60] and cable.next_time() is None


def test_a_capture_is_a_pcap(tmp_path: Path) -> None:
    """Read by another implementation: lengths, cut contents, nanosecond times."""
    path = tmp_path / "x.pcap"
    capture = Capture(str(path), snaplen=50)
    capture.write([memoryview(b"a" * 60), memoryview(b"b" * 40)])
    capture.close()
    with RawPcapReader(str(path)) as reader:
        assert reader.nano
        packets = list(reader)
    assert [data for data, _ in packets] == [b"a" * 50, b"b" * 40]
    assert [meta.wirelen for _, meta in packets] == [60, 40]


class Loop:
    """Runs a ControlServer in a thread."""

    def __init__(self, path: Path, handle: Callable[[dict[str, Any], Any], None]) -> None:

        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[int], None]] = {}
        self.server = ControlServer(path, handle, self._watch, self._unwatch, lambda _: None)
        self._ends = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _watch(self, fd: int, callback: Callable[[int], None]) -> None:
        self._callbacks[fd] = callback
        self._epoll.register(fd)

    def _unwatch(self, fd: int) -> None:
        del self._callbacks[fd]
        self._epoll.unregister(fd)

    def _run(self) -> None:
        while not self._ends:
            for fd, events in self._epoll.poll(0.01):
                self._callbacks[fd](events)

    def close(self) -> None:
        """End the thread and the server."""
        self._ends = True
        self._thread.join()
        self.server.close()


def test_management_socket(tmp_path: Path) -> None:
    """Arguments and answers pass; a refusal is a ControlError with its hint; nonsense is answered, not fatal."""

    def handle(request: dict[str, Any], respond: Any) -> None:
        if request["command"] == "refuse":
            respond({"ok": False, "error": "no", "hint": "ask nicely"})
        else:
            respond({"ok": True, "echo": request})

    path = tmp_path / "control.sock"
    with pytest.raises(ControlError, match="no NIC answers"):
        ControlClient(path)
    loop = Loop(path, handle)
    try:
        with ControlClient(path) as client:
            assert client.call("say", words=[1, 2]) == {"echo": {"command": "say", "words": [1, 2]}}
            with pytest.raises(ControlError, match="no") as caught:
                client.call("refuse")
            assert caught.value.hint == "ask nicely"
            client._socket.sendall(b"not json\n[1]\n")
            for expected in (b"not a JSON line", b"a request is an object"):
                while b"\n" not in client._buffer:
                    client._buffer += client._socket.recv(65536)
                line, _, client._buffer = client._buffer.partition(b"\n")
                assert expected in line
            assert client.call("still", there=True)["echo"]["there"] is True
    finally:
        loop.close()
    assert not path.exists()
