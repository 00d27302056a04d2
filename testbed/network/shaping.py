"""What a cable is like: no offloads, its bandwidth, its delay and loss.

Offloads on a veth pair make fiction of the wire: packets of 64 KiB, checksums never computed. Bandwidth is a token
bucket at both ends, so each way is limited; Mininet's own silently ignores more than 1000 Mbit/s. Delay and loss are
netem's where the kernel has it, otherwise the caller hands them to the NIC's port.
"""

from __future__ import annotations

import json
from typing import Final

from testbed.base.errors import EnvironmentProblem
from testbed.network.machine import CommandFailed, command

OFFLOADS: Final = ("tx", "rx", "tso", "gso", "gro")
"""As `ethtool -K` names them."""
_CHECKED: Final = {
    "tx-checksumming",
    "rx-checksumming",
    "tcp-segmentation-offload",
    "generic-segmentation-offload",
    "generic-receive-offload",
}
"""As `ethtool -k` names them."""
_QUEUE_SECONDS: Final = 0.01
"""What may wait at the bottleneck, in time at its rate: ten milliseconds, as in a switch with modest buffers."""
_FASTEST: Final = 400_000.0
"""Mbit/s; tc counts bytes in 64 bits, but no machine sends faster."""


def switch_off_offloads(interface: str, pid: int | None = None) -> None:
    """Every offload that changes what is on the wire. Raises EnvironmentProblem if one stays on."""
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
    """tc's words for a limit of `bw` Mbit/s.

    The burst is half a millisecond at that rate and at least four frames: small enough for a migration's timeline,
    large enough that one timer interrupt a millisecond cannot throttle the link below its rate.
    """
    if not 0 < bw <= _FASTEST:
        raise ValueError(f"bandwidth {bw:g} Mbit/s; allowed: above 0, up to {_FASTEST:g}")
    bytes_per_second = bw * 1e6 / 8
    frame = mtu + 18
    burst = max(4 * frame, round(bytes_per_second * 0.0005))
    limit = burst + max(16 * frame, round(bytes_per_second * _QUEUE_SECONDS))
    return ["tbf", "rate", f"{round(bw * 1000)}kbit", "burst", str(burst), "limit", str(limit)]


def netem(delay: float, loss: float) -> list[str]:
    """tc's words for `delay` seconds and a share `loss` of packets lost."""
    words = ["netem", "limit", "100000"]
    words += ["delay", f"{delay * 1e6:.0f}us"] if delay else []
    words += ["loss", f"{loss * 100:.6f}%"] if loss else []
    return words


def shape(interface: str, bw: float | None, mtu: int, delay: float, loss: float, pid: int | None = None) -> bool:
    """Shape what leaves `interface`. False: this kernel has no netem, delay and loss were not applied (bandwidth was).

    Raises EnvironmentProblem if the bandwidth cannot be had: it is refused, never dropped.
    """
    at = ["qdisc", "replace", "dev", interface]
    if bw is not None:
        try:
            command("tc", *at, "root", "handle", "1:", *token_bucket(bw, mtu), pid=pid)
        except CommandFailed as error:
            raise EnvironmentProblem(
                f"the kernel cannot limit it to {bw:g} Mbit/s: {error.stderr}",
                where=f"interface {interface}",
                hint="leave bw out, or use a kernel with the token bucket filter (CONFIG_NET_SCH_TBF)",
            ) from error
        _verify(interface, bw, pid)
    if not delay and not loss:
        return True
    place = ["parent", "1:1", "handle", "10:"] if bw is not None else ["root", "handle", "10:"]
    try:
        command("tc", *at, *place, *netem(delay, loss), pid=pid)
    except CommandFailed as error:
        if "unknown" in error.stderr or "No such file" in error.stderr:
            return False
        raise
    return True


def _verify(interface: str, bw: float, pid: int | None) -> None:
    """The kernel has the rate that was asked for."""
    listing = json.loads(command("tc", "-json", "qdisc", "show", "dev", interface, pid=pid))
    rates = [entry["options"]["rate"] * 8 / 1e6 for entry in listing if entry.get("kind") == "tbf"]
    if not rates or abs(rates[0] - bw) > bw / 100:
        raise EnvironmentProblem(f"asked for {bw:g} Mbit/s, the kernel has {rates}", where=f"interface {interface}")


def combined(nic: dict[str, float], delay: float, loss: float) -> dict[str, float]:
    """The NIC's own impairments together with those of its cable."""
    both = dict(nic)
    if delay:
        both["delay"] = nic.get("delay", 0.0) + delay
    if loss:
        before = nic.get("loss", 0.0)
        both["loss"] = before + loss - before * loss
    return both
