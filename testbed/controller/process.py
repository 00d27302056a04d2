"""The controller's process, as the testbed starts and stops it."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Final

from testbed.base.errors import EnvironmentProblem, Exit, RunFailed
from testbed.cleanup.child import Child
from testbed.cleanup.state import RunState
from testbed.controller.datapath import DATAPATHS, control_socket
from testbed.controller.fabric import Fabric

START_TIMEOUT: Final = 60.0
"""Seconds until the controller must listen. Importing Ryu takes one, but more on a fully loaded machine."""
STOP_TIMEOUT: Final = 5.0


class ControllerProcess:
    """One controller. `start` returns when it listens on `openflow_port` and `socket`."""

    def __init__(
        self, fabric: Fabric, state: RunState, log: Path, framework: str = "auto", datapath: str | None = None
    ) -> None:
        """`datapath`: `kernel` or `userspace` if the controller is to watch Open vSwitch's flow cache, else None."""
        self.fabric = fabric
        self.state = state
        self.log = log
        self.framework = framework
        self.datapath = datapath
        self.socket = state.directory / "controller.sock"
        """Path of the northbound socket, which has mode 0600 and is removed with the run."""
        self.openflow_port = 0
        """TCP port on 127.0.0.1, chosen by the kernel; 0 before the controller listens."""
        self._child: Child | None = None

    def start(self) -> None:
        """Call `launch`, then `wait`."""
        self.launch()
        self.wait()

    def launch(self) -> None:
        """Start the process without waiting: importing its framework takes a second, which the caller can use."""
        file = self.state.directory / "fabric.json"
        file.write_text(json.dumps(self.fabric.to_plain()))
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "testbed.controller", "--fabric", str(file), "--socket", str(self.socket)]
        if self.datapath is not None:
            command += ["--ovs-control", str(control_socket()), "--datapath", DATAPATHS[self.datapath]]
        with self.log.open("ab") as log:
            environment = {**os.environ, "PYTHONPATH": _python_path()}
            popen = {"stdout": subprocess.PIPE, "stderr": log, "text": True, "env": environment}
            command += ["--framework", self.framework]
            self._child = Child(self.state, command, popen=popen, role="controller")

    def wait(self) -> None:
        """Wait until it listens. Raises EnvironmentProblem if no framework is installed, RunFailed if it fails."""
        assert self._child is not None
        output = self._child.process.stdout
        assert output is not None
        ready, _, _ = select.select([output], [], [], START_TIMEOUT)
        line = output.readline() if ready else ""
        if not line.startswith("ready "):
            self._fail(silent=not ready)
        self.openflow_port = int(json.loads(line.removeprefix("ready "))["openflow_port"])

    def _fail(self, silent: bool) -> None:
        assert self._child is not None
        if silent:
            self.stop()
            raise RunFailed(f"did not start within {START_TIMEOUT:g} s", where="controller", hint=f"see {self.log}")
        code = self._child.process.wait()
        last = self.log.read_text(errors="replace").strip().splitlines()[-1:] or ["no message"]
        self.stop()
        if code == Exit.ENVIRONMENT:
            raise EnvironmentProblem(last[0].strip(), where="controller", hint=f"see {self.log}")
        raise RunFailed(f"ended with code {code}: {last[0]}", where="controller", hint=f"see {self.log}")

    @property
    def alive(self) -> bool:
        """Whether the controller's process runs."""
        return self._child is not None and self._child.alive

    def stop(self) -> None:
        """End it. Switches keep their flows. It may be called again, and after a failed start."""
        if self._child is None:
            return
        self._child.stop(STOP_TIMEOUT)
        self.socket.unlink(missing_ok=True)
        self._child = None  # last: after an interrupt before this line, all of it is done again


def _python_path() -> str:
    """PYTHONPATH with which the child finds this package from any folder, whether it is installed or not."""
    here = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
