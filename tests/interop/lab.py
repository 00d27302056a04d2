"""Two ends joined by the relay: our NIC and either the guest with Linux rxe or a second NIC of ours.

end A (namespace, our NIC) eth0 ─ left, relay (namespace), right ─ eth0 end B (namespace, our NIC; or the guest)
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from testbed.base.errors import EnvironmentProblem
from tests.interop.ends import End, OwnEnd, Space
from tests.interop.guest.boot import Guest
from tests.interop.guest.image import Image

ROOT = Path(__file__).parents[2]
MTUS = {1024: 1500, 4096: 9000}
"""Path MTU -> MTU of the interface that gives it."""
_MEET_SECONDS = 30.0


class Cable:
    """The relay process."""

    def __init__(self, space: Space) -> None:
        self._process = subprocess.Popen(
            space.enter(sys.executable, "-m", "tests.interop.relay", "left", "right"), cwd=ROOT,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            raise EnvironmentProblem("the relay did not start")

    def _ask(self, **message: object) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def impair(self, **link: float) -> None:
        """Set both directions: loss, reorder, duplicate (probabilities) and seed; nothing: clean. Counts restart."""
        self._ask(link=link)

    def counts(self) -> list[dict[str, int]]:
        """What has passed from A to B, and from B to A."""
        answer: list[dict[str, int]] = self._ask(counts=True)["counts"]
        return answer

    def capture(self, path: Path | None) -> None:
        """Begin a pcap of the RoCE frames as they enter the relay, or end it."""
        self._ask(capture=None if path is None else str(path))

    def close(self) -> None:
        """End the relay."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()


class Lab:
    """`a` is always ours; `b` is ours or rxe."""

    def __init__(self, a: OwnEnd, b: OwnEnd | Guest, cable: Cable) -> None:
        self.a, self.b, self.cable = a, b, cable

    def prepare(self, mtu: int, *options: str) -> None:
        """Fresh NICs for a path MTU of `mtu`; `options` are those of our NIC."""
        for end in (self.a, self.b):
            if isinstance(end, OwnEnd):
                end.start_nic(MTUS[mtu], *options)
            else:
                end.set_mtu(MTUS[mtu])

    def meet(self) -> None:
        """Both know each other's MAC, as after any traffic: a first datagram must not be lost to that.

        Raises EnvironmentProblem if they cannot.
        """
        for end, other in ((self.a, self.b), (self.b, self.a)):
            for address in (other.ip4, other.ip6):
                deadline = time.monotonic() + _MEET_SECONDS
                while (said := end.run("ping", "-c", "1", "-W", "2", address, timeout=5))[0] != 0:
                    if time.monotonic() > deadline:
                        raise EnvironmentProblem(f"{end.name} does not reach {address}: {said[1].strip()}")

    def ends(self, direction: str) -> tuple[End, End]:
        """(server, client) for a direction `client>server`: ours>rxe, rxe>ours, ours>ours."""
        return (self.a, self.b) if direction.startswith("rxe") else (self.b, self.a)


@contextmanager
def lab(image: Image | None) -> Iterator[Lab]:
    """A lab with the guest, or, without an image, with two hosts of ours."""
    with ExitStack() as stack:
        middle = Space()
        stack.callback(middle.close)
        a = OwnEnd(1)
        stack.callback(a.close)
        middle.do(
            "ip", "link", "add", "name", "left", "type", "veth", "peer", "name", "eth0", "netns", str(a.space.pid)
        )
        b: OwnEnd | Guest
        if image is None:
            b = OwnEnd(2)
            stack.callback(b.close)
            middle.do(
                "ip", "link", "add", "name", "right", "type", "veth", "peer", "name", "eth0", "netns", str(b.space.pid)
            )
            b.configure()
        else:
            b = Guest(image, middle, "right", "10.9.0.2", "fd09::2")
            stack.callback(b.close)
        a.configure()
        for port in ("left", "right"):
            middle.do("sysctl", "-qw", f"net.ipv6.conf.{port}.disable_ipv6=1")
            # QEMU reads frames one by one: a UC message, which is never retransmitted, must fit into the queue at once.
            middle.do("ip", "link", "set", port, "mtu", "9000", "txqueuelen", "10000", "up")
        cable = Cable(middle)
        stack.callback(cable.close)
        yield Lab(a, b, cable)
