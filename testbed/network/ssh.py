"""SSH into the virtual hosts: keys for this run and one server per host, bound to the host's management address.

The user's and the machine's SSH files are neither read nor written: keys, configuration and authorized keys are files
of the run, and clients get the servers' public key directly instead of through `~/.ssh`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from testbed.base.errors import RunFailed
from testbed.cleanup.child import Child
from testbed.cleanup.state import RUN_VARIABLE, RunState
from testbed.network.machine import command, program_path

PORT: Final = 22
"""Port of every server; each is in its host's network namespace, so they do not collide."""
START_TIMEOUT: Final = 30.0
STOP_TIMEOUT: Final = 5.0


@dataclass(frozen=True, slots=True)
class Access:
    """Credentials for logging in to any host of this run."""

    user: str
    key: Path
    """Private key (ed25519, OpenSSH format), readable by root only and removed with the run."""
    host_key: str
    """The servers' public key as one line `ssh-ed25519 AAAA…`, which the client must verify."""
    port: int = PORT


def make_keys(directory: Path) -> Access:
    """Make a key pair for the servers and one for the testbed in `directory`, which is created with mode 0700."""
    directory.mkdir(mode=0o700)
    for name in ("host_key", "user_key"):
        command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "migros-testbed", "-f", str(directory / name))
    (directory / "authorized_keys").write_text((directory / "user_key.pub").read_text())
    public = " ".join((directory / "host_key.pub").read_text().split()[:2])
    return Access("root", directory / "user_key", public)


def configuration(directory: Path, address: str, run_id: str) -> str:
    """The sshd_config of one host."""
    return "\n".join(
        [
            f"ListenAddress {address}:{PORT}",
            f"HostKey {directory}/host_key",
            f"AuthorizedKeysFile {directory}/authorized_keys",
            "AuthenticationMethods publickey",
            "PermitRootLogin prohibit-password",
            "StrictModes yes",
            # PAM's session modules expect the services of a full machine; only a locked account needs PAM.
            f"UsePAM {'yes' if _root_is_locked() else 'no'}",
            "UseDNS no",
            "PrintMotd no",
            "PrintLastLog no",
            "X11Forwarding no",
            "AllowTcpForwarding no",
            "MaxSessions 100",
            "MaxStartups 100",
            "PidFile none",
            "LogLevel INFO",
            # A session starts with an empty environment; the variable tells `testbed clean` which run it belongs to.
            f"SetEnv {RUN_VARIABLE}={run_id}",
            "Subsystem sftp internal-sftp",
            "",
        ]
    )


def _root_is_locked() -> bool:
    """Whether root's password begins with an exclamation mark (as on Ubuntu), which sshd accepts only with PAM."""
    try:
        lines = Path("/etc/shadow").read_text().splitlines()
    except OSError:
        return False
    return any(line.startswith("root:!") for line in lines)


class Server:
    """One sshd in the foreground, in the namespaces of one host."""

    def __init__(self, host: str, pid: int, address: str, directory: Path, state: RunState, log: Path) -> None:
        self.host = host
        self.pid = pid
        self.address = address
        self.directory = directory
        self.state = state
        self.log = log
        self._child: Child | None = None

    def start(self) -> None:
        """Start the server; `wait` then waits until it listens."""
        file = self.directory / f"sshd_config-{self.host}"
        file.write_text(configuration(self.directory, self.address, self.state.run_id))
        # sshd must be started by its full path, because it executes itself again for each connection.
        sshd = program_path("sshd") or "/usr/sbin/sshd"
        with self.log.open("ab") as log:
            command = ["mnexec", "-a", str(self.pid), sshd, "-D", "-e", "-f", str(file)]
            popen = {"stdout": log, "stderr": log}
            self._child = Child(self.state, command, popen=popen, role="sshd", host=self.host)

    def wait(self) -> None:
        """Wait until the server listens. Raises RunFailed if it has ended or does not listen within START_TIMEOUT."""
        assert self._child is not None
        deadline = time.monotonic() + START_TIMEOUT
        while not self._listens():
            if not self._child.alive or time.monotonic() > deadline:
                last = self.log.read_text(errors="replace").strip().splitlines()[-1:] or ["no message"]
                raise RunFailed(f"sshd did not start: {last[0]}", where=f"host {self.host}", hint=f"see {self.log}")
            time.sleep(0.01)

    def _listens(self) -> bool:
        """Whether the host has a listening socket, from the kernel's table: a connection attempt would be logged."""
        port = f":{PORT:04X}"
        for line in Path(f"/proc/{self.pid}/net/tcp").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[1].endswith(port) and fields[3] == "0A":
                return True
        return False

    def stop(self) -> None:
        """End the listener; sessions end with the host. May be called again."""
        if self._child is not None:
            self._child.stop(STOP_TIMEOUT)
            self._child = None
