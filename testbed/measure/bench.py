"""Running measured commands on the hosts of a topology, one after another, for benchmarks and experiments.

with_hosts(topology, measure)     starts a topology without applications and calls `measure(Bench)`
Bench.alone / Bench.pair          run a program, or a server and its client, and return the output
one_switch(...)                   topology data for hosts on one switch
"""

from __future__ import annotations

import itertools
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import yaml

from testbed.base.errors import BadInput, EnvironmentProblem, Interrupted, RunFailed, TestbedError
from testbed.lab.session import Session
from testbed.record.summary import Summary
from testbed.run import runner
from testbed.topology import parse, resolve

POLL: Final = 0.05
"""Seconds between two checks whether a program has ended."""


class Bench:
    """Runs programs on the hosts of a session. Not thread-safe, as measurements must not overlap."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._numbers = itertools.count(1)

    def alone(self, host: str, argv: Sequence[str], *, rdma: bool = False, timeout: float = 60.0) -> str:
        """Run a program and return its standard output. Raises RunFailed with its last lines unless it exits with 0."""
        name = self._start(host, argv, rdma)
        return self._wait(host, name, argv, timeout)

    def pair(
        self,
        server: tuple[str, Sequence[str]],
        client: tuple[str, Sequence[str]],
        *,
        rdma: bool = True,
        timeout: float = 60.0,
    ) -> str:
        """Start `server`, wait until it listens, run `client`, and return the client's standard output.

        Each is (host, argv). A server that does not end by itself, such as iperf3 -s, is killed after the client ends.
        Raises RunFailed as `alone` does, or if the server does not listen.
        """
        server_host, server_argv = server
        name = self._start(server_host, server_argv, rdma)
        agent = self.session.hosts[server_host]
        try:
            answer = agent.call("wait_app_ready", name=name, patience=15.0, timeout=30.0)
            if not answer["listening"]:
                raise self._failure(server_host, name, server_argv, "did not listen")
            printed = self.alone(client[0], client[1], rdma=rdma, timeout=timeout)
            self._grace(server_host, name)
        finally:
            agent.call("signal_app", name=name, signal="SIGKILL")
        return printed

    def _start(self, host: str, argv: Sequence[str], rdma: bool) -> str:
        name = f"bench{next(self._numbers)}"
        # Programs that poll must yield the CPU to NIC and switch (docs/agent.md); others need not.
        policy = "idle" if rdma else "other"
        self.session.hosts[host].call("start_app", name=name, argv=list(argv), rdma=rdma, policy=policy)
        return name

    def _wait(self, host: str, name: str, argv: Sequence[str], timeout: float) -> str:
        agent = self.session.hosts[host]
        deadline = time.monotonic() + timeout
        while (ended := agent.call("app_status", name=name)["ended"]) is None:
            if time.monotonic() > deadline:
                agent.call("signal_app", name=name, signal="SIGKILL")
                raise self._failure(host, name, argv, f"did not end within {timeout:g} s")
            time.sleep(POLL)
        if ended.get("code") != 0:
            raise self._failure(host, name, argv, f"ended with {ended.get('code', ended.get('signal'))}")
        printed: str = agent.call("read_log", name=name, stream="stdout")["text"]
        return printed

    def _grace(self, host: str, name: str) -> None:
        """Allow a server half a second to end by itself."""
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline and self.session.hosts[host].call("app_status", name=name)["ended"] is None:
            time.sleep(POLL)

    def _failure(self, host: str, name: str, argv: Sequence[str], what: str) -> RunFailed:
        agent = self.session.hosts[host]
        said = "".join(agent.call("read_log", name=name, stream=stream)["text"] for stream in ("stdout", "stderr"))
        last = [line for line in said.splitlines() if line.strip()][-3:]
        return RunFailed(
            f"`{shlex.join(argv)}` {what}", where=host, hint="its last output: " + " / ".join(last) if last else None
        )


def one_switch(name: str, hosts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Topology data with every host on one switch, jumbo frames and no limits."""
    return {
        "name": name,
        "hosts": {host: dict(options) for host, options in hosts.items()},
        "switches": ["s1"],
        "links": [{"ends": [host, "s1"], "mtu": 9000} for host in hosts],
    }


def with_hosts(
    topology: Mapping[str, Any], measure: Callable[[Bench], None], *, results: Path | None = None
) -> Summary:
    """Start `topology`, which should have no applications, call `measure`, remove it, and return the run's summary.

    After the clean-up, raises EnvironmentProblem, BadInput, Interrupted or RunFailed with the run's first problem.
    """
    resolved = resolve(parse(yaml.safe_dump(dict(topology), sort_keys=False)))
    options = runner.Options(root=results, meanwhile=lambda session: measure(Bench(session)))
    summary = runner.run(resolved, options)
    if summary.interrupted:
        raise Interrupted
    if not summary.ok:
        first = summary.problems[0] if summary.problems else None
        if first is None:
            raise RunFailed("the run failed without a recorded problem")
        kind = {"environment": EnvironmentProblem, "input": BadInput}.get(first.blame, RunFailed)
        raise kind(first.error, where=first.where, hint=first.hint)
    return summary


def script(main: Callable[[], int]) -> None:
    """Run the `main` of a benchmark or experiment, with the error messages and exit codes of the testbed's verbs."""
    try:
        code = main()
    except TestbedError as error:
        print(f"error: {error}", file=sys.stderr)
        code = int(error.exit_code)
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)
