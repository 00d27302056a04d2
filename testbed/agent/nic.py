"""The operations on the host's NIC process: start and stop it, and pass commands to its control socket."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from testbed.agent.operations import OperationError
from testbed.agent.processes import namespace_members, send_signal
from testbed.agent.records import Nic, log_tail
from testbed.agent.service import Agent


def start_nic(
    agent: Agent,
    *,
    addresses: list[str],
    number_base: int,
    options: list[str] | None = None,
    patience: float = 20.0,
) -> dict[str, Any]:
    """Start the NIC on the data interface and wait for its line `ready`. Returns {"pid", "seconds"}.

    `options` are further arguments of `softroce_ext`, such as `--no-migros` or `--capture FILE`.
    """
    if agent.nic is not None and agent.nic.process.poll() is None:
        raise OperationError("this host has a NIC already", hint="there is one NIC for the one data interface")
    directory = agent.nic_directory
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    log = agent.root / "nic.log"
    argv = [sys.executable, "-m", "softroce_ext", "--interface", agent.interface, "--run-dir", str(directory)]
    for address in addresses:
        argv += ["--address", address]
    argv += ["--number-base", str(number_base), *(options or ())]
    with log.open("ab") as errors:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
        )
    nic = Nic(process, directory, log)
    agent.nic = nic

    def stop() -> None:
        nic.expected_end = True
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(3)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    agent.at_end(stop)
    started = time.monotonic()
    if not _ready(process, started + patience):
        ended = process.poll()
        stop()
        what = f"ended with {ended}" if ended is not None else f"was not ready within {patience:g} s"
        raise OperationError(f"the NIC {what}", blame="environment", hint=nic.why())

    def nic_ended() -> None:
        code = process.wait()
        if not nic.expected_end:
            users = [app.name for app in list(agent.apps.values()) if app.uses_nic and app.ended is None]
            agent.event("nic_ended", code=code, log=log_tail(log), apps=users)

    agent.watch.watch(process.pid, nic_ended)
    return {"pid": process.pid, "seconds": time.monotonic() - started}


def _ready(process: subprocess.Popen[bytes], deadline: float) -> bool:
    """Read standard output up to the line `ready`. Returns False at the end of the output or at the deadline."""
    assert process.stdout is not None
    received = b""
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([process.stdout], [], [], left)[0]:
            return False
        data = os.read(process.stdout.fileno(), 4096)
        if not data:
            process.wait(1)
            return False
        received += data
        if b"ready" in received.split(b"\n")[:-1]:
            return True
    return False


def running_nic(agent: Agent) -> Nic:
    """Return the host's NIC. Raises OperationError if none was started or it has ended."""
    if agent.nic is None:
        raise OperationError("no NIC was started on this host")
    code = agent.nic.process.poll()
    if code is not None:
        raise OperationError(f"the NIC has ended with code {code}", hint=agent.nic.why())
    return agent.nic


def nic_command(agent: Agent, *, command: str, patience: float = 30.0, **arguments: Any) -> dict[str, Any]:
    """Pass one command to the NIC's control socket and return its answer; docs/nic-control.md lists the commands."""
    return running_nic(agent).command(command, arguments, patience)


def stop_nic(agent: Agent, *, kill: bool = False) -> dict[str, Any]:
    """End the NIC in order; with `kill` by SIGKILL, as if it had crashed (the event `nic_ended` follows)."""
    nic = running_nic(agent)
    nic.expected_end = not kill
    send_signal(nic.process.pid, signal.SIGKILL if kill else signal.SIGTERM)
    return {"code": nic.process.wait(10)}


def poll_nic(agent: Agent, *, interval: float) -> None:
    """Send the event `counters` and note each application's longest gap every `interval` seconds, until the NIC ends.

    An application's user context is gone when it ends, so its longest gap is the one that was read last.
    """

    def poll() -> None:
        while True:
            time.sleep(interval)
            try:
                nic = running_nic(agent)
                agent.event("counters", counters=nic.command("counters", {}, 5.0)["counters"])
                note_gaps(agent, nic.command("gaps", {}, 5.0)["contexts"])
            except OperationError:
                if agent.nic is None or agent.nic.process.poll() is not None:
                    return

    threading.Thread(target=poll, name="poll-nic", daemon=True).start()


def note_gaps(agent: Agent, contexts: list[dict[str, Any]]) -> None:
    """Note the longest gap (seconds) of each user context at the application that it belongs to."""
    known = {context["pid"]: context["longest"] or 0.0 for context in contexts}
    for app in list(agent.apps.values()) if known else ():
        if app.ended is None and (gaps := [known[pid] for pid in namespace_members(app.init) if pid in known]):
            app.uses_nic = True
            app.longest_gap = max(*gaps, app.longest_gap or 0.0) or None
