"""What all runs on one machine share: a lock, the choice of tag and slot, two mount points, two settings.

`/run/migros` (where each host mounts its own tmpfs) and `/run/sshd` (which sshd requires) are empty folders of the
machine. A run must not remove them while another run's hosts have them mounted, so they belong to no run's state. The
last run to end removes those that the testbed created (`release`), as does `testbed clean`.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from testbed.base.errors import EnvironmentProblem
from testbed.cleanup import state as run_state
from testbed.cleanup.state import RunState
from testbed.network import machine, plan, scheduling

PRIVATE: Final = "/run/migros"
"""Mount point of each host's private tmpfs."""
MOUNT_POINTS: Final = (PRIVATE, "/run/sshd")
SOCKET_MEMORY: Final = 16 << 20
"""Receive buffer in bytes of a port of the userspace datapath; see `wide_receive_buffers`."""
_CHOICE: Final = "network.json"
_MADE: Final = "mount-points"
_RMEM: Final = "net.core.rmem_default"
_RMEM_SAVED: Final = "rmem_default"


@contextlib.contextmanager
def machine_lock(base: Path = run_state.BASE) -> Iterator[None]:
    """Hold the lock that protects all shared resources. The kernel releases it if its holder dies."""
    base.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(base / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def claim(state: RunState) -> tuple[str, int]:
    """Choose a tag and a slot that no other run uses, and create the mount points. Call with the lock held.

    Raises EnvironmentProblem if every slot is taken.
    """
    base = state.directory.parent
    taken = [_choice(directory) for directory in base.iterdir() if directory.is_dir()]
    tags = {tag for tag, _ in taken}
    slots = {slot for _, slot in taken}
    tag = next(t for t in iter(lambda: f"m{secrets.token_hex(2)}", None) if t not in tags and not _tag_in_use(t))
    in_use = _addresses()
    for slot in range(plan.SLOTS):
        if slot not in slots and not any(address in plan.slot_network(slot) for address in in_use):
            break
    else:
        raise EnvironmentProblem(
            f"no management addresses left; allowed: {plan.SLOTS} runs at a time",
            where="network",
            hint="testbed clean removes what killed runs left",
        )
    (state.directory / _CHOICE).write_text(json.dumps({"tag": tag, "slot": slot}))
    made = base / _MADE
    for path in map(Path, MOUNT_POINTS):
        if not path.exists():
            with made.open("a") as file:
                file.write(f"{path}\n")
            path.mkdir(mode=0o755)
    return tag, slot


def release(base: Path = run_state.BASE) -> None:
    """If no run is left, restore the switch's scheduling and remove our mount points. Call with the lock held."""
    made = base / _MADE
    if any(path.is_dir() for path in base.iterdir()):
        return
    scheduling.restore_priority(base)
    if not made.exists():
        return
    for line in made.read_text().splitlines():
        if line in MOUNT_POINTS:
            with contextlib.suppress(OSError):  # It stays if something else uses it by now.
                os.rmdir(line)
    made.unlink()


@contextlib.contextmanager
def wide_receive_buffers(base: Path = run_state.BASE) -> Iterator[int]:
    """Give sockets opened inside a large receive buffer; yields its size in bytes. Call with the lock held.

    The userspace datapath reads each port through an AF_PACKET socket and leaves its receive buffer at the system's
    default of 208 KiB. The kernel charges about 8 KiB or more for a 4200-byte frame, so a burst of some twenty frames
    overflows the buffer and the rest is lost, which a real wire would not do. Open vSwitch has no option for it. The
    old value is kept in a file until it is restored, in case the run is killed in between (`restore_buffers`).
    """
    restore_buffers(base)
    old = machine.read_sysctl(_RMEM)
    if int(old) >= SOCKET_MEMORY:
        yield int(old)
        return
    (base / _RMEM_SAVED).write_text(old)
    try:
        machine.write_sysctl(_RMEM, str(SOCKET_MEMORY))
    except EnvironmentProblem:
        # Read-only outside the initial network namespace, as in a container: bursts are slower, results stay correct.
        (base / _RMEM_SAVED).unlink()
        yield int(old)
        return
    try:
        yield SOCKET_MEMORY
    finally:
        restore_buffers(base)


def restore_buffers(base: Path = run_state.BASE) -> None:
    """Restore the kernel's default if a killed run left it changed. Call with the lock held."""
    saved = base / _RMEM_SAVED
    if saved.exists():
        machine.write_sysctl(_RMEM, saved.read_text().strip())
        saved.unlink()


def clean(base: Path = run_state.BASE) -> None:
    """Remove the shared resources that killed runs left; `testbed clean` calls it after removing those runs."""
    if base.exists():
        with machine_lock(base):
            restore_buffers(base)
            release(base)


def _choice(directory: Path) -> tuple[str, int]:
    try:
        choice = json.loads((directory / _CHOICE).read_text())
        return str(choice["tag"]), int(choice["slot"])
    except (OSError, ValueError, KeyError):
        return "", -1


def _tag_in_use(tag: str) -> bool:
    return any(name.startswith(f"{tag}-") for name in os.listdir("/sys/class/net"))


def _addresses() -> list[ipaddress.IPv4Address]:
    """Every IPv4 address of the machine's interfaces and of their point-to-point peers."""
    found = []
    for link in json.loads(machine.command("ip", "-json", "-4", "address", "show") or "[]"):
        for info in link.get("addr_info", []):
            found += [ipaddress.IPv4Address(info[key]) for key in ("local", "address") if key in info]
    return found
