"""The kernel, machine, packages and programs of a run, recorded in every run folder."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

from testbed import __version__
from testbed.record.summary import Environment

PACKAGES = (
    "mininet",
    "paramiko",
    "pydantic",
    "PyYAML",
    "rich",
    "typer",
    "numpy",
    "matplotlib",
    "isal",
    "ryu",
    "os-ken",
)

PROGRAMS: dict[str, tuple[str, ...]] = {
    # ibv_devinfo has no option for its version; that of rdma-core comes from the Debian package.
    "ib_write_bw": ("ib_write_bw", "--version"),
    "iperf3": ("iperf3", "--version"),
    "ip": ("ip", "-V"),
    "gcc": ("cc", "--version"),
    "tshark": ("tshark", "--version"),
}

DEBIAN = (
    "rdma-core",
    "libibverbs1",
    "ibverbs-providers",
    "perftest",
    "mininet",
    "openvswitch-switch",
    "openssh-server",
)


def collect(
    *, criu: list[str] | None = None, datapath: str | None = None, controller: str | None = None
) -> Environment:
    """Collect the versions. Never fails: unknown ones are left empty. `criu` is the command prefix in use."""
    binaries = {name: line for name, command in PROGRAMS.items() if (line := _first_line(list(command)))}
    binaries.update(_debian())
    return Environment(
        kernel=platform.release(),
        distribution=_distribution(),
        cpu=_cpu(),
        cpus=os.cpu_count() or 0,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        python=platform.python_version(),
        packages={
            "migros-testbed": __version__,  # An installed copy has no commit that names its source.
            **{name: version for name in PACKAGES if (version := _package(name))},
        },
        binaries=binaries,
        criu=_number(_first_line([*criu, "--version"])) if criu else None,
        ovs=_number(_first_line(["ovs-vsctl", "--version"])),
        datapath=datapath,
        controller=controller,
        source=_source(),
    )


def _first_line(command: list[str]) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = (answer.stdout or answer.stderr).strip().splitlines()
    return lines[0].strip() if lines else None


def _number(line: str | None) -> str | None:
    found = re.search(r"\d+(\.\d+)+", line or "")
    return found.group() if found else None


def _package(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _debian() -> dict[str, str]:
    if shutil.which("dpkg-query") is None:
        return {}
    command = ["dpkg-query", "-W", "-f", "${Package} ${Version} ${db:Status-Status}\n", *DEBIAN]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)  # Status 1: one is not installed.
    rows = (line.split() for line in answer.stdout.splitlines())
    return {row[0]: row[1] for row in rows if len(row) == 3 and row[2] == "installed"}


def _distribution() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        return ""


def _cpu() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return ""
    return found.group(1).strip() if found else platform.machine()


def _source() -> str | None:
    """Commit of the checkout that contains this file, with `+` if files were modified; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    git = ["git", "-c", f"safe.directory={root}", "-C", str(root)]
    commit = _first_line([*git, "rev-parse", "--short=12", "HEAD"])
    changed = _first_line([*git, "status", "--porcelain", "--untracked-files=no"])
    return f"{commit}+" if commit and changed else commit
