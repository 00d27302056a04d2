"""The SSH daemons of a run: one inside each virtual host, on the management network, with keys made for this run.

Nothing of the machine's own SSH is used or touched: own host key, own client key, own configuration, both keys in the
run's state folder (readable by root only) and gone with it. The only login is root's, by that one key.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import testbed
from testbed.errors import EnvironmentProblem
from testbed.hosts import Address
from testbed.state import RUN_VARIABLE, RunState

PRIVILEGE_SEPARATION = Path("/run/sshd")
"""sshd refuses to start without this empty folder; Debian makes it when its own service first starts, and so do we."""

PASSED_ON = ("PATH", "LANG", "LC_ALL", "TESTBED_CRIU", "CC")
"""Variables of the harness that its agents need too."""

_CONFIGURATION = """\
Port 22
ListenAddress {address}
HostKey {directory}/host_key
AuthorizedKeysFile {directory}/authorized_keys
PidFile none
UsePAM {pam}
StrictModes no
AllowUsers root
PermitRootLogin prohibit-password
AuthenticationMethods publickey
PasswordAuthentication no
KbdInteractiveAuthentication no
UseDNS no
PermitTTY no
PermitUserRC no
AllowTcpForwarding no
AllowAgentForwarding no
AllowStreamLocalForwarding no
X11Forwarding no
PermitTunnel no
PrintMotd no
PrintLastLog no
MaxStartups 100
LogLevel INFO
"""


class SshDaemons:
    """Keys and daemons of one run. `prepare` once, `start` per host, `stop` at the end."""

    def __init__(self, state: RunState) -> None:
        self.directory = state.directory / "ssh"
        self._state = state
        self._processes: list[subprocess.Popen[bytes]] = []
        self._program = ""
        self._host_key = ""

    def prepare(self) -> None:
        """Make the keys. Raises EnvironmentProblem when OpenSSH is not installed."""
        program = shutil.which("sshd") or shutil.which("/usr/sbin/sshd")
        keygen = shutil.which("ssh-keygen")
        if program is None or keygen is None:
            raise EnvironmentProblem(
                "OpenSSH's sshd or ssh-keygen is missing", hint="apt-get install openssh-server, or run ./bootstrap"
            )
        self._program = program
        self.directory.mkdir(mode=0o700)
        PRIVILEGE_SEPARATION.mkdir(mode=0o755, exist_ok=True)
        for name in ("host_key", "client_key"):
            file = str(self.directory / name)
            command = [keygen, "-q", "-t", "ed25519", "-N", "", "-C", self._state.run_id, "-f", file]
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        shutil.copyfile(self.directory / "client_key.pub", self.directory / "authorized_keys")
        self._host_key = " ".join((self.directory / "host_key.pub").read_text().split()[:2])

    def start(self, name: str, address: str, enter: Sequence[str], log: Path, interface: str, root: str) -> Address:
        """Start the daemon of virtual host `name` and say how to log in.

        `address`: the host's management address; `enter`: the command prefix that runs a program in its namespaces;
        `log`: where the daemon writes; `interface`, `root`: as in Address.
        """
        configuration = self.directory / f"{name}.conf"
        pam = "yes" if _root_is_locked() else "no"
        configuration.write_text(_CONFIGURATION.format(address=address, directory=self.directory, pam=pam))
        with log.open("ab") as errors:
            process = subprocess.Popen(
                [*enter, self._program, "-D", "-e", "-f", str(configuration)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
            )
        self._processes.append(process)
        self._state.record("process", pid=process.pid, what=f"sshd of {name}")
        return Address(
            name=name,
            address=address,
            interface=interface,
            key_file=self.directory / "client_key",
            host_key=self._host_key,
            root=root,
            python=sys.executable,
            source=str(Path(testbed.__file__).resolve().parent.parent),
            environment=_environment(self._state.run_id),
        )

    def stop(self) -> None:
        """End all daemons; sessions that are still open end with their agents. Idempotent."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            try:
                process.wait(2)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()
        shutil.rmtree(self.directory, ignore_errors=True)


def _environment(run_id: str) -> dict[str, str]:
    passed = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    return {**passed, RUN_VARIABLE: run_id, "PYTHONUNBUFFERED": "1"}


def _root_is_locked() -> bool:
    """Without PAM, sshd refuses an account whose password field begins with `!` (Debian's way of locking it)."""
    try:
        with open("/etc/shadow") as file:
            entry = next((line for line in file if line.startswith("root:")), "")
    except OSError:
        return False
    return entry.split(":")[1:2] != [] and entry.split(":")[1].startswith("!")
