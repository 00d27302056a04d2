"""The NICs that are running on this machine: where they are, and what each reports about itself.

A run's state file names the process of each virtual host; that host's NIC listens in the host's own mount namespace,
which is seen from outside through the process's root.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from softroce_ext.control import ControlClient, ControlError
from testbed.base.errors import BadInput, EnvironmentProblem
from testbed.cleanup import state

SOCKET: Final = "run/migros/nic/control.sock"
"""Path of the control socket below the root of a host's processes."""
TIMEOUT: Final = 5.0
"""Seconds in which a NIC must answer."""


@dataclass(frozen=True, slots=True)
class RunningNic:
    """A NIC of a live run."""

    run_id: str
    host: str
    """Name in the topology."""
    socket: Path

    def call(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Send a command to its control socket. Raises EnvironmentProblem without an answer, BadInput if refused."""
        try:
            client = ControlClient(self.socket, TIMEOUT)
        except ControlError as error:
            raise EnvironmentProblem(str(error), where=f"{self.run_id}/{self.host}", hint=error.hint) from error
        with client:
            try:
                return client.call(command, **arguments)
            except ControlError as error:
                raise BadInput(str(error), where=f"{self.run_id}/{self.host}", hint=error.hint or None) from error


def running(base: Path = state.BASE) -> list[RunningNic]:
    """List the NICs of all live runs, in the order of runs and hosts, without hosts whose NIC has not started."""
    found = []
    for run in state.runs(base):
        for entry in run.entries if run.alive else ():
            if entry["kind"] == "host":
                socket = Path(f"/proc/{entry['pid']}/root") / SOCKET
                if _exists(socket):
                    found.append(RunningNic(run.run_id, str(entry["name"]), socket))
    return found


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except PermissionError as error:
        raise EnvironmentProblem(
            "access to a run's hosts needs root", hint="run it with sudo, as the run itself"
        ) from error


def one(host: str, run_id: str | None = None, base: Path = state.BASE) -> RunningNic:
    """Return the NIC of `host`. Raises BadInput if there is none, or several and `run_id` does not choose one."""
    nics = running(base)
    matching = [nic for nic in nics if nic.host == host and run_id in (None, nic.run_id)]
    if len(matching) == 1:
        return matching[0]
    if matching:
        runs = ", ".join(nic.run_id for nic in matching)
        raise BadInput(f"host {host} is in several runs", hint=f"choose one with --run: {runs}")
    known = ", ".join(f"{nic.host} ({nic.run_id})" for nic in nics) or "none"
    raise BadInput(f"no running NIC at host {host}", hint=f"running NICs: {known}")


def program(pid: int | None) -> str | None:
    """The name of the program that a process runs, from its command line; None if the process has ended."""
    if pid is None:
        return None
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return None
    return words[0].decode(errors="replace").rsplit("/", 1)[-1] or None


def report(nic: RunningNic) -> dict[str, Any]:
    """Collect what `testbed status` shows of a NIC: its status, the run, the host, and each context's program."""
    answer = nic.call("status")
    for context in (*answer["contexts"], *answer.get("rdma_cm", ())):
        context["program"] = program(context["pid"])
    counters = answer["counters"]
    answer["refused"] = {
        name.removeprefix("refused_"): value for name, value in counters.items() if name.startswith("refused_")
    }
    return {"run_id": nic.run_id, "host": nic.host, **answer}
