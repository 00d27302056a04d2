"""A virtual host of a running network, as the other packages use it."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from testbed.base.errors import RunFailed
from testbed.network import ssh


@dataclass(frozen=True, slots=True)
class VirtualHost:
    """A running virtual host."""

    name: str
    pid: int
    """Process id of the shell that holds the host's network and mount namespaces open."""
    interface: str
    """Name of the data interface inside the host."""
    mac: str
    ip: str
    node_ip: str
    mgmt_ip: str
    """Address that the host's SSH server listens on; reachable from the root namespace only."""
    access: ssh.Access

    def inside(self, argv: Sequence[str]) -> list[str]:
        """`argv` preceded by a command that enters this host's network and mount namespaces."""
        return ["mnexec", "-a", str(self.pid), *argv]

    def run(
        self, argv: Sequence[str], *, timeout: float = 60.0, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a short command in the host. Raises RunFailed if it fails (unless `check` is False) or times out."""
        try:
            done = subprocess.run(self.inside(argv), capture_output=True, text=True, timeout=timeout, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise RunFailed(f"`{' '.join(argv)}`: {error}", where=f"host {self.name}") from error
        if check and done.returncode != 0:
            message = (done.stderr or done.stdout).strip()
            raise RunFailed(
                f"`{' '.join(argv)}` ended with code {done.returncode}: {message}", where=f"host {self.name}"
            )
        return done

    def popen(self, argv: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a command in the host; `options` are those of subprocess.Popen."""
        return subprocess.Popen(self.inside(argv), **options)
