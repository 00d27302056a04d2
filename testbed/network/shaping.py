"""The properties of a cable: no offloads, its bandwidth, its delay and loss.

Offloads on a veth pair would make the traffic unrealistic, with packets of 64 KiB and checksums that are never
computed. Bandwidth is limited by a token bucket at both ends, thus in each direction; Mininet's implementation silently
ignores values above 1000 Mbit/s. Delay and loss use netem if the kernel has it; otherwise the caller passes them to the
NIC's port.
"""

from __future__ import annotations

import json
from typing import Final

from testbed.base.errors import EnvironmentProblem
from testbed.network.machine import CommandFailed, command

OFFLOADS: Final = ("tx", "rx", "tso", "gso", "gro")
"""Offloads to switch off, by their names in `ethtool -K`."""
_CHECKED: Final = {
    "tx-checksumming",
    "rx-checksumming",
    "tcp-segmentation-offload",
    "generic-segmentation-offload",
    "generic-receive-offload",
}
"""Offloads that must be off, by their names in `ethtool -k`."""
_QUEUE_SECONDS: Final = 0.01
"""Length of the bottleneck's queue, in seconds at its rate: ten milliseconds, as in a switch with modest buffers."""
_FASTEST: Final = 400_000.0
"""Highest bandwidth in Mbit/s; tc could express more, but no machine sends faster."""


def switch_off_offloads(interface: str, pid: int | None = None) -> None:
    """Switch off every offload that changes what is on the wire. Raises EnvironmentProblem if one stays on."""
    command("ethtool", "-K", interface, *(word for name in OFFLOADS for word in (name, "off")), pid=pid)
    listing = command("ethtool", "-k", interface, pid=pid)
    on = [
        line.split(":")[0]
        for line in listing.splitlines()
        if line.split(":")[0] in _CHECKED and line.split(":")[1].split()[:1] == ["on"]
    ]
    if on:
        raise EnvironmentProblem(f"{', '.join(on)} cannot be switched off", where=f"interface {interface}")


def token_bucket(bw: float, mtu: int) -> list[str]:
    """The arguments of tc for a limit of `bw` Mbit/s. Raises ValueError for a bandwidth out of range.

    The burst is half a millisecond at that rate and at least four frames: short on the timescale of a migration, yet
    long enough that one timer interrupt per millisecond cannot throttle the link below its rate.
    """
    if not 0 < bw <= _FASTEST:
        raise ValueError(f"bandwidth {bw:g} Mbit/s; allowed: above 0, up to {_FASTEST:g}")
    bytes_per_second = bw * 1e6 / 8
    frame = mtu + 18
    burst = max(4 * frame, round(bytes_per_second * 0.0005))
    limit = burst + max(16 * frame, round(bytes_per_second * _QUEUE_SECONDS))
    return ["tbf", "rate", f"{round(bw * 1000)}kbit", "burst", str(burst), "limit", str(limit)]


def netem(delay: float, loss: float) -> list[str]:
    """The arguments of tc for a delay of `delay` seconds and a fraction `loss` of packets lost."""
    words = ["netem", "limit", "100000"]
    words += ["delay", f"{delay * 1e6:.0f}us"] if delay else []
    words += ["loss", f"{loss * 100:.6f}%"] if loss else []
    return words


def shape(interface: str, bw: float | None, mtu: int, delay: float, loss: float, pid: int | None = None) -> bool:
    """Shape what leaves `interface`. Returns False if delay and loss were not applied because the kernel has no netem.

    Raises EnvironmentProblem if the bandwidth cannot be applied; a limit is never ignored.
    """
    at = ["qdisc", "replace", "dev", interface]
    if bw is not None:
        try:
            command("tc", *at, "root", "handle", "1:", *token_bucket(bw, mtu), pid=pid)
        except CommandFailed as error:
            raise EnvironmentProblem(
                f"the kernel cannot limit it to {bw:g} Mbit/s: {error.stderr}",
                where=f"interface {interface}",
                hint="omit bw, or use a kernel with the token bucket filter (CONFIG_NET_SCH_TBF)",
            ) from error
        _verify(interface, bw, pid)
    if not delay and not loss:
        return True
    place = ["parent", "1:1", "handle", "10:"] if bw is not None else ["root", "handle", "10:"]
    try:
        command("tc", *at, *place, *netem(delay, loss), pid=pid)
    except CommandFailed as error:
        if error.absent_in_kernel:
            return False
        raise
    return True


def _verify(interface: str, bw: float, pid: int | None) -> None:
    """Check that the kernel has applied the requested rate. Raises EnvironmentProblem."""
    listing = json.loads(command("tc", "-json", "qdisc", "show", "dev", interface, pid=pid))
    rates = [entry["options"]["rate"] * 8 / 1e6 for entry in listing if entry.get("kind") == "tbf"]
    if not rates or abs(rates[0] - bw) > bw / 100:
        raise EnvironmentProblem(
            f"asked for {bw:g} Mbit/s, but the kernel set {', '.join(f'{rate:g} Mbit/s' for rate in rates) or 'none'}",
            where=f"interface {interface}",
        )


def combined(nic: dict[str, float], delay: float, loss: float) -> dict[str, float]:
    """The impairment that a NIC must apply: its own (`nic`) combined with the delay and loss of its cable."""
    both = dict(nic)
    if delay:
        both["delay"] = nic.get("delay", 0.0) + delay
    if loss:
        before = nic.get("loss", 0.0)
        both["loss"] = before + loss - before * loss
    return both
