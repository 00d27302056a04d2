"""Size. Invariant: 10,000 queue pairs and a region of 1 GiB work as few and small ones do; nothing of them stays."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from tests.system import programs
from tests.system.nic_pair import Host, nics


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    """One host with a NIC."""
    with nics() as (first, _):
        yield first


@pytest.mark.slow
@pytest.mark.parametrize("words", [["many", "10000"], ["gigabyte"]], ids=lambda words: words[0])
def test_size(host: Host, words: list[str]) -> None:
    """The program's own checks hold, and the NIC is empty again."""
    run = host.run(*programs.module("verbs_scale", *words), timeout=240, program=True)
    assert (run.returncode, run.stdout) == (0, "ok\n"), run.stdout + run.stderr
    with host.control() as control:
        assert control.call("status")["contexts"] == []


@pytest.mark.slow
def test_a_thousand_queue_pairs_of_a_killed_program_are_freed(host: Host) -> None:
    """kill -9 in the middle: the queue pairs go, and the next program finds room."""
    program = host.start(*programs.module("verbs_scale", "many", "10000"))
    with host.control() as control:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            contexts = control.call("status")["contexts"]
            if contexts and len(contexts[0]["qps"]) >= 1000:
                break
            time.sleep(0.05)
        else:
            pytest.fail("the program made no queue pairs")
        pids = [context["pid"] for context in contexts]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        program.wait(timeout=30)
        deadline = time.monotonic() + 30
        while control.call("status")["contexts"] and time.monotonic() < deadline:
            time.sleep(0.05)
        assert control.call("status")["contexts"] == []
    run = host.run(*programs.module("verbs_scale", "many", "100"), timeout=60, program=True)
    assert (run.returncode, run.stdout) == (0, "ok\n"), run.stdout + run.stderr
