"""Which CRIU this machine can use: the first that passes `criu check` on the running kernel and is new enough.

Order: `$TESTBED_CRIU` (a command, split as a shell would), the private prefix that `install_criu` makes, the system's.
A prefix is started through its own dynamic loader and libraries, because restore fails with the system's
(`PR_SET_MM_MAP`) and the system's libc must not change.

CRIU 4.2 is the oldest that can dump a TCP or UDP socket on Linux 6.18; older ones fail there with "Can't get 1:16 opt".
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from testbed.base.errors import EnvironmentProblem
from testbed.checkpoint import criu_log

PREFIX = Path("/var/lib/migros-testbed/criu")
MINIMUM = (4, 2)
"""Oldest CRIU that moves TCP on current kernels."""
_SECONDS = 30.0
"""Bound on `criu check`, since a broken CRIU may hang."""


class Criu(NamedTuple):
    """A usable CRIU."""

    command: tuple[str, ...]
    """The words that start its command line."""
    version: tuple[int, ...]
    origin: str
    """Where it was found, for the report: "$TESTBED_CRIU", the prefix's path, or "system"."""


def prefix_command(prefix: Path) -> list[str] | None:
    """The command line of the CRIU in an unpacked Debian prefix, or None if the prefix has none."""
    criu = next((path for path in (prefix / "usr/sbin/criu", prefix / "sbin/criu") if path.exists()), None)
    loaders = sorted(prefix.glob("usr/lib/*/ld-linux*.so.*")) + sorted(prefix.glob("lib/*/ld-linux*.so.*"))
    if criu is None or not loaders:
        return None
    libraries = ":".join(str(path) for path in dict.fromkeys(loader.parent for loader in loaders))
    return [str(loaders[0]), "--library-path", libraries, str(criu)]


def candidates(prefix: Path = PREFIX) -> Iterator[tuple[str, list[str]]]:
    """Yield every CRIU that may be used, best first, as (origin, command)."""
    chosen = os.environ.get("TESTBED_CRIU")
    if chosen:
        yield "$TESTBED_CRIU", shlex.split(chosen)
    private = prefix_command(prefix)
    if private is not None:
        yield str(prefix), private
    system = shutil.which("criu", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin:/usr/local/sbin")
    if system is not None:
        yield "system", [system]


def version_of(command: list[str]) -> tuple[int, ...]:
    """The version of a CRIU, such as (4, 2, 1). Raises EnvironmentProblem if the command is not a CRIU."""
    try:
        answer = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EnvironmentProblem(f"cannot be started: {error}", where=shlex.join(command)) from error
    found = re.search(r"^Version:\s*(\d+(?:\.\d+)*)", answer.stdout, re.MULTILINE)
    if not found:
        text = (answer.stderr or answer.stdout).strip().splitlines()
        raise EnvironmentProblem(
            f"is not CRIU: {text[-1] if text else 'it prints no version'}", where=shlex.join(command)
        )
    return tuple(int(part) for part in found.group(1).split("."))


def check(command: list[str], minimum: tuple[int, ...] = MINIMUM) -> tuple[int, ...]:
    """The version of a CRIU that works on this kernel. Raises EnvironmentProblem with CRIU's own reason otherwise."""
    version = version_of(command)
    where = shlex.join(command)
    if version < minimum:
        need = ".".join(map(str, minimum))
        raise EnvironmentProblem(f"version {'.'.join(map(str, version))} is older than {need}", where=where)
    try:
        answer = subprocess.run([*command, "check"], capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EnvironmentProblem(f"`criu check` cannot be run: {error}", where=where) from error
    if answer.returncode != 0:
        said = answer.stderr or answer.stdout
        reason = criu_log.summary(criu_log.parse(said), (said.strip().splitlines() or ["no reason given"])[-1])
        raise EnvironmentProblem(f"`criu check` fails on this kernel: {reason}", where=where)
    return version


@lru_cache(maxsize=4)
def _usable(prefix: Path, minimum: tuple[int, ...], chosen: str | None) -> Criu:
    refused = []
    for origin, command in candidates(prefix):
        try:
            return Criu(tuple(command), check(command, minimum), origin)
        except EnvironmentProblem as problem:
            refused.append(f"{origin}: {problem.message}")
            if chosen and origin == "$TESTBED_CRIU":
                break  # the user's choice is never silently replaced
    raise EnvironmentProblem(
        "no CRIU works here: " + ("; ".join(refused) or "none is installed"),
        hint=f"`./bootstrap` installs one into {prefix}",
    )


def usable(prefix: Path = PREFIX, minimum: tuple[int, ...] = MINIMUM) -> Criu:
    """The CRIU to use, checked once per process. Raises EnvironmentProblem with the reason for each one tried."""
    return _usable(prefix, minimum, os.environ.get("TESTBED_CRIU"))


def find() -> list[str]:
    """The words that start the command line of the CRIU to use. Raises EnvironmentProblem."""
    return list(usable().command)
