"""The newest rdma-core in Debian, on the same NIC as the machine's own: what Linux's ABI promises holds for both."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system import newest_rdma_core as newest
from tests.system.nic_pair import PORT, Host, finish, nics


@pytest.fixture(scope="module")
def joined() -> Iterator[tuple[Host, Host]]:
    """Two hosts with NICs."""
    with nics() as both:
        yield both


@pytest.fixture(scope="module")
def root() -> Path:
    """The newest rdma-core."""
    return newest.install()


def test_it_is_newer_than_the_machines_own(root: Path) -> None:
    """The test would say nothing if it were the same."""
    own = next(Path("/usr/lib").glob("*/libibverbs.so.1.*")).name.rpartition("libibverbs.so.1.")[2].partition(".")[2]
    assert float(newest.release(root)) > float(own)


def test_devinfo_is_the_same(joined: tuple[Host, Host], root: Path) -> None:
    """Both releases print the same attributes."""
    new = joined[0].run(*newest.command(root, "ibv_devinfo", "-v"), program=True)
    old = joined[0].run("ibv_devinfo", "-v", program=True)
    assert new.returncode == 0, new.stderr
    known = {line.strip() for line in old.stdout.splitlines()}
    assert [line for line in new.stdout.splitlines() if line.strip() not in known] == []


PINGPONGS = [
    "ibv_rc_pingpong -g 1 -n 100 -s 9000 -c",
    "ibv_rc_pingpong -g 2 -n 100 -e -c",
    "ibv_uc_pingpong -g 1 -n 100 -c",
    "ibv_ud_pingpong -g 1 -n 100 -c",
    "ibv_srq_pingpong -g 1 -n 100",
]
PERFTEST = [
    "ib_send_lat -x 1 -F -n 100",
    "ib_write_bw -x 1 -F -n 50",
    "ib_read_bw -x 1 -F -n 50",
    "ib_atomic_lat -x 1 -F -n 50",
    "ib_send_bw -x 1 -F -n 50 -c UD",
]
# perftest's two ends must be of one release.
CASES = [(line, True) for line in PINGPONGS + PERFTEST] + [(line, False) for line in PINGPONGS]


@pytest.mark.parametrize(("line", "both_new"), CASES)
def test_programs(joined: tuple[Host, Host], root: Path, line: str, both_new: bool) -> None:
    """Exit code 0 at both ends; the programs check their data where they can."""
    server, client = joined
    words = line.split()
    wrapped = newest.command(root, *words)
    listening = server.start(*(wrapped if both_new else words))
    server.wait_for_listener(PORT, listening)
    calling = client.start(*wrapped, server.ip)
    try:
        ends = finish(calling), finish(listening, 20)
    finally:
        for process in (calling, listening):
            if process.poll() is None:
                process.kill()
                process.wait()
    for code, output in ends:
        assert code == 0, output
        assert not re.search("invalid data", output)
