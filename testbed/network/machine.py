"""Running commands on this machine with errors that a user can read, and finding out what this machine can do."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from testbed.base.errors import EnvironmentProblem

NEEDED: Final = {
    "ip": "iproute2",
    "tc": "iproute2",
    "ethtool": "ethtool",
    "ovs-vsctl": "openvswitch-switch",
    "mnexec": "mininet",
    "sshd": "openssh-server",
    "ssh-keygen": "openssh-client",
}
"""Required program → its Debian package."""
TIMEOUT: Final = 60.0
"""Seconds that a single command may take."""


_ABSENT: Final = ("kind is unknown", "Unknown qdisc", "No such file", "does not exist")


class CommandFailed(EnvironmentProblem):
    """A command of the operating system failed; `stderr` is its error output."""

    def __init__(self, argv: Sequence[str], stderr: str, hint: str | None = None) -> None:
        self.argv = list(argv)
        self.stderr = stderr.strip()
        super().__init__(f"`{' '.join(argv)}` failed: {self.stderr or 'no message'}", where="network", hint=hint)

    @property
    def absent_in_kernel(self) -> bool:
        """Whether the kernel lacks the part that the command needs.

        tc and ovs-dpctl share one exit code between this and other failures, so their words have to be read: only here.
        """
        return any(words in self.stderr for words in _ABSENT)


def command(*argv: str, stdin: str | None = None, pid: int | None = None, timeout: float = TIMEOUT) -> str:
    """Run a command and return its standard output; with `pid`, in that process's network and mount namespaces.

    The command gets a new session, so that Ctrl-C on the terminal cannot end a command of the clean-up. Where an
    interrupt is allowed, it is raised in this process, and subprocess.run then ends the command.

    Raises CommandFailed with the command's standard error.
    """
    full = [*(["mnexec", "-a", str(pid)] if pid is not None else []), *argv]
    try:
        done = subprocess.run(
            full, input=stdin, capture_output=True, text=True, timeout=timeout, check=False, start_new_session=True
        )
    except FileNotFoundError as error:
        package = NEEDED.get(full[0])
        raise CommandFailed(full, "not found", f"apt install {package}" if package else None) from error
    except subprocess.TimeoutExpired as error:
        raise CommandFailed(full, f"no answer within {timeout:g} s") from error
    if done.returncode != 0:
        raise CommandFailed(full, done.stderr or done.stdout)
    return done.stdout


def ip_batch(lines: Sequence[str], pid: int | None = None) -> None:
    """Run several `ip` commands in one process. Raises CommandFailed, which names the line."""
    if lines:
        command("ip", "-batch", "-", stdin="\n".join(lines) + "\n", pid=pid)


def check() -> None:
    """Check that this machine has everything a network needs. Raises EnvironmentProblem with all that is missing."""
    if os.geteuid() != 0:
        raise EnvironmentProblem("network namespaces need root", where="network", hint="run it with sudo")
    missing = {program: package for program, package in NEEDED.items() if program_path(program) is None}
    if missing:
        packages = " ".join(sorted(set(missing.values())))
        raise EnvironmentProblem(
            f"programs not found: {', '.join(missing)}",
            where="network",
            hint=f"./bootstrap installs them; by hand: apt install {packages}",
        )
    try:
        command("ovs-vsctl", "--timeout=15", "show")
    except CommandFailed as error:
        raise EnvironmentProblem(
            f"Open vSwitch does not answer: {error.stderr}",
            where="network",
            hint="./bootstrap starts it; by hand: systemctl start openvswitch-switch, or "
            "/usr/share/openvswitch/scripts/ovs-ctl start --system-id=random",
        ) from error


def program_path(name: str) -> str | None:
    """Path of a program; the superuser's folders are searched even if PATH lacks them."""
    return shutil.which(name) or shutil.which(name, path="/usr/local/sbin:/usr/sbin:/sbin")


def kernel_datapath() -> tuple[bool, str]:
    """Whether Open vSwitch can forward in the kernel on this machine, and the reason if it cannot."""
    try:
        command("ovs-dpctl", "dump-dps", timeout=10)
    except CommandFailed as error:
        if error.absent_in_kernel:
            return False, "the kernel has no openvswitch module loaded"
        return False, error.stderr.splitlines()[-1]
    return True, ""


def ovs_version() -> str:
    """The version of Open vSwitch, such as `3.1.0`."""
    return command("ovs-vsctl", "--version").split("\n", 1)[0].rsplit(" ", 1)[-1]


def end_namespace(pid: int, patience: float = 5.0) -> None:
    """Kill every process in the network namespace of `pid` except `pid`; never in the machine's own namespace."""
    space = _network_namespace(pid)
    if not space or space in (_network_namespace(1), _network_namespace(os.getpid())):
        return
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        others = [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != pid]
        inside = [other for other in others if _network_namespace(other) == space]
        if not inside:
            return
        for other in inside:
            with contextlib.suppress(ProcessLookupError):
                os.kill(other, signal.SIGKILL)
        time.sleep(0.01)


def _network_namespace(pid: int) -> str:
    """Identity of a process's network namespace; empty for a process that has ended, or a zombie."""
    try:
        return os.readlink(f"/proc/{pid}/ns/net")
    except OSError:
        return ""


def read_sysctl(name: str) -> str:
    """Value of a kernel setting, such as `net.core.rmem_default`."""
    return _sysctl(name).read_text().strip()


def write_sysctl(name: str, value: str) -> None:
    """Change a kernel setting. Raises EnvironmentProblem if the kernel refuses."""
    try:
        _sysctl(name).write_text(value)
    except OSError as error:
        raise EnvironmentProblem(f"cannot set {name} to {value}: {error}", where="network") from error


def _sysctl(name: str) -> Path:
    return Path("/proc/sys") / name.replace(".", "/")
