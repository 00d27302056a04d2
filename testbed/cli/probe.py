"""Finding out what this machine can do by trying it. Nothing is left behind, because the trials use `unshare`.

A finding is `ok`, `limited` (the testbed uses a fallback, and says so in its reports), `missing` (the testbed cannot
run) or `unknown` (the trial needs root).
"""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Literal

from testbed.base.errors import EnvironmentProblem
from testbed.checkpoint import criu_binary
from testbed.controller import framework
from testbed.network import machine

Verdict = Literal["ok", "limited", "missing", "unknown"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of `testbed doctor`."""

    name: str
    verdict: Verdict
    detail: str
    """What was found, and its consequence."""
    hint: str | None = None
    """How to improve it."""


BOOTSTRAP: Final = "./bootstrap installs it"
PROGRAMS: Final[dict[str, tuple[tuple[str, ...], bool]]] = {
    "network programs": (("ip", "tc", "ethtool", "mnexec", "ping"), True),
    "SSH server": (("sshd", "ssh-keygen"), True),
    "RDMA programs": (("ibv_devices", "ibv_devinfo", "ibv_rc_pingpong"), True),
    "perftest": (("ib_send_bw", "ib_send_lat", "ib_write_bw", "ib_write_lat", "ib_read_bw", "ib_read_lat"), True),
    "packet decoder": (("tshark",), False),
    "TCP comparison": (("iperf3",), False),
}
"""Purpose → (programs, whether the testbed needs them)."""


def examine() -> list[Finding]:
    """Make all trials and return their findings in a stable order. Takes about a second."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        waiting = [pool.submit(_guarded, trial) for trial in TRIALS]
        findings = [finding for future in waiting for finding in future.result()]
    return findings


def _guarded(trial: Callable[[], Iterator[Finding]]) -> list[Finding]:
    # The docstring of a trial names it in the finding if the trial itself fails.
    try:
        return list(trial())
    except (OSError, subprocess.SubprocessError) as error:
        name = (trial.__doc__ or trial.__name__).rstrip(".")
        return [Finding(name, "unknown", f"the check failed: {error}")]


def _try(*argv: str, timeout: float = 20.0) -> str | None:
    """Run a command; returns None if it succeeds, else the last line of its output."""
    result = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout)
    if result.returncode == 0:
        return None
    lines = (result.stderr or result.stdout).strip().splitlines()
    return lines[-1] if lines else f"exit code {result.returncode}"


def _try_in_namespace(script: str) -> str | None:
    """Like `_try`, for a shell script in new network and mount namespaces."""
    return _try("unshare", "--net", "--mount", "sh", "-ec", script)


def _root() -> bool:
    return os.geteuid() == 0


def _machine() -> Iterator[Finding]:
    """Kernel and user."""
    cpus, memory = os.cpu_count() or 1, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Finding("kernel", "ok", f"Linux {platform.release()} {platform.machine()}")
    yield Finding("processors", "ok" if cpus > 1 else "limited", f"{cpus}, {memory / 2**30:.1f} GiB of memory")
    if _root():
        yield Finding("root", "ok", "yes")
    else:
        yield Finding(
            "root", "missing", "no; checks that need root were skipped", f"sudo {sys.executable} -m testbed doctor"
        )


def _python() -> Iterator[Finding]:
    """Python and its packages."""
    needed = ("mininet", "paramiko", "pydantic", "typer", "rich", "isal", "numpy", "matplotlib", "yaml")
    absent = [name for name in needed if importlib.util.find_spec(name) is None]
    version = f"{platform.python_version()} in {sys.prefix}"
    if absent:
        yield Finding("python", "missing", f"{version}, packages not found: {', '.join(absent)}", BOOTSTRAP)
    else:
        yield Finding("python", "ok", version)
    found = [name for name, package in framework.PACKAGES.items() if importlib.util.find_spec(package) is not None]
    try:
        chosen = framework.choose()
    except EnvironmentProblem as problem:
        yield Finding("controller", "missing", problem.message, problem.hint)
    else:
        others = [framework.version(name) for name in found if name != chosen]
        yield Finding(
            "controller", "ok", framework.version(chosen) + (f" (also {', '.join(others)})" if others else "")
        )


def _programs() -> Iterator[Finding]:
    """Programs of other packages."""
    for purpose, (names, needed) in PROGRAMS.items():
        absent = [name for name in names if machine.program_path(name) is None]
        if not absent:
            yield Finding(purpose, "ok", ", ".join(names))
        else:
            yield Finding(purpose, "missing" if needed else "limited", f"not found: {', '.join(absent)}", BOOTSTRAP)


def _compiler() -> Iterator[Finding]:
    """C compiler."""
    from softroce_ext.native import build

    try:
        yield Finding("C compiler", "ok", build.compiler())
    except build.BuildError as error:
        yield Finding("C compiler", "missing", str(error), BOOTSTRAP)


def _switch() -> Iterator[Finding]:
    """Open vSwitch."""
    if machine.program_path("ovs-vsctl") is None:
        yield Finding("Open vSwitch", "missing", "not installed", BOOTSTRAP)
        return
    if not _root():
        yield Finding("Open vSwitch", "unknown", "the check needs root")
        return
    problem = _try("ovs-vsctl", "--timeout=5", "show")
    if problem is not None:
        yield Finding("Open vSwitch", "missing", f"does not answer: {problem}", "./bootstrap starts it")
        return
    yield Finding("Open vSwitch", "ok", machine.ovs_version())
    kernel, why = machine.kernel_datapath()
    if kernel:
        yield Finding("OVS datapath", "ok", "kernel")
    else:
        yield Finding("OVS datapath", "limited", f"userspace: {why}", "modprobe openvswitch, if the kernel has it")


def _namespaces() -> Iterator[Finding]:
    """Namespaces and traffic control."""
    if not _root():
        yield Finding("namespaces", "unknown", "the check needs root")
        return
    problem = _try("unshare", "--net", "--mount", "--pid", "--fork", "true")
    if problem is not None:
        yield Finding(
            "namespaces", "missing", problem, "run where namespaces can be created (not in an unprivileged container)"
        )
        return
    yield Finding("namespaces", "ok", "network, mount, pid")
    pair = "ip link add va type veth peer name vb; ip link set va mtu 9000 up; "
    problem = _try_in_namespace(pair + "ethtool -K va tx off gso off gro off >/dev/null")
    yield Finding("veth", "missing" if problem else "ok", problem or "MTU 9000, offloads can be switched off")
    problem = _try_in_namespace("mount -t tmpfs none /mnt")
    yield Finding("tmpfs mounts", "missing" if problem else "ok", problem or "inside a mount namespace")
    problem = _try_in_namespace(pair + "tc qdisc add dev va root tbf rate 1gbit burst 100kb limit 1mb")
    detail = "bandwidth limits by the kernel" if problem is None else f"{problem}: links with bw cannot be built"
    hint = None if problem is None else "modprobe sch_tbf, if the kernel has it"
    yield Finding("token bucket", "ok" if problem is None else "limited", detail, hint)
    problem = _try_in_namespace(pair + "tc qdisc add dev va root netem delay 1ms")
    detail = "delay and loss by the kernel" if problem is None else "none: delay and loss come from the NIC's port"
    hint = None if problem is None else "modprobe sch_netem, if the kernel has it"
    yield Finding("netem", "ok" if problem is None else "limited", detail, hint)
    firewall = "iptables -w -L -n || nft list ruleset"
    problem = _try_in_namespace(f"({firewall}) >/dev/null")
    if problem is None:
        yield Finding("packet filter", "ok", "iptables or nftables")
    else:
        detail = f"{problem}: CRIU cannot block TCP connections during a migration"
        yield Finding("packet filter", "limited", detail, "modprobe nf_tables")


def _checkpoint() -> Iterator[Finding]:
    """CRIU and the kernel's help for it."""
    try:
        criu = criu_binary.usable()
    except EnvironmentProblem as error:
        verdict: Verdict = "missing" if _root() else "unknown"
        yield Finding("CRIU", verdict, error.message, error.hint if _root() else "criu check needs root")
        return
    yield Finding("CRIU", "ok", f"{'.'.join(map(str, criu.version))} ({criu.origin}), `criu check` passes")
    if not _root():
        return
    for name, feature, without in (
        ("soft-dirty", "mem_dirty_track", "no iterative pre-copy by CRIU"),
        ("userfaultfd", "uffd", "no post-copy (lazy pages)"),
    ):
        problem = _try(*criu.command, "check", "--feature", feature)
        yield Finding(name, "ok" if problem is None else "limited", "available" if problem is None else without)


def _realtime() -> Iterator[Finding]:
    """Real-time scheduling."""
    code = "import os; os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))"
    problem = _try(sys.executable, "-I", "-S", "-c", code)
    detail = "permitted" if problem is None else "not permitted: latencies vary more under load"
    yield Finding("real-time scheduling", "ok" if problem is None else "limited", detail)


TRIALS: Final[Sequence[Callable[[], Iterator[Finding]]]] = (
    _machine,
    _python,
    _checkpoint,
    _switch,
    _namespaces,
    _realtime,
    _programs,
    _compiler,
)
