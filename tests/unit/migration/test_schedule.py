"""When migrations are due by what a program has sent and received, and where addresses are after them.

Invariants: what counts are the program's bytes since its start, wherever it was, and nobody else's while it is
elsewhere; each migration begins at the first look that finds its bytes. An address is at the
host that it was moved to last.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import testbed.migration
from testbed.base.errors import RunFailed
from testbed.lab.applications import Applications
from testbed.record.folder import RunFolder
from testbed.record.summary import Migration
from testbed.run import schedule as migrations
from testbed.run.schedule import Schedule, addresses_at_end
from testbed.topology import ResolvedMigration, ResolvedTopology, parse, resolve

MIB = 1 << 20
TOPOLOGY = """
name: t
capture: true
hosts: {{h1: {{}}, h2: {{}}, h3: {{}}}}
switches: [s1]
links: [[h1, s1], [h2, s1], [h3, s1]]
apps: {{server: {{host: h2, command: x}}}}
migrations: [{migrations}]
"""


def topology_with(*moves: str) -> ResolvedTopology:
    """A server at h2 that makes `moves`, "host at [address]" each."""
    entries = []
    for move in moves:
        to, at, *address = move.split()
        entries.append(f"{{app: server, to: {to}, at: {at}, address: {(address or ['keep'])[0]}}}")
    return resolve(parse(TOPOLOGY.format(migrations=", ".join(entries)), "t.yaml"))


def record(migration: ResolvedMigration, *, ok: bool = True) -> Migration:
    return Migration(
        index=migration.index, app=migration.app, from_host=migration.source, to_host=migration.to,
        address="keep" if migration.address == "keep" else "change", ok=ok, rolled_back=not ok,
    )  # fmt: skip


class World:
    """A program that sends 1 MiB after each look at its NIC, while other programs send 5 MiB at every other host."""

    def __init__(self, folder: RunFolder, *moves: str) -> None:
        topology = topology_with(*moves)
        hosts: dict[str, Any] = {
            name: SimpleNamespace(name=name, alive=True, call=lambda op, name=name, **_: self.look(name))
            for name in topology.hosts
        }
        self.counts = dict.fromkeys(hosts, 1000 * MIB)
        self.silent = 0
        """So many of the next looks get no answer."""
        self.sent = 0
        self.sent_at: list[int] = []
        """What the program had sent when each migration began."""
        self.fail: set[int] = set()
        """Indices of the migrations that are rolled back."""
        self.apps = Applications(topology, hosts, folder)
        self.server = self.apps.all["server"]
        self.server.started = time.monotonic()
        self.schedule = Schedule(SimpleNamespace(topology=topology, hosts=hosts, folder=folder, apps=self.apps))  # type: ignore[arg-type]

    def look(self, host: str) -> dict[str, Any]:
        if self.silent:
            self.silent -= 1
            raise RunFailed("no answer in time", where=host)
        count = self.counts[host]
        if host == self.server.host:
            self.send(1)
        if self.sent > 100 * MIB:
            self.server.ended = time.monotonic()
        return {"counters": {"tx_bytes": count - MIB, "rx_bytes": MIB}}

    def send(self, size: int) -> None:
        self.sent += size * MIB
        for host in self.counts:
            self.counts[host] += (size if host == self.server.host else 5) * MIB

    def migrate(self, _session: Any, migration: ResolvedMigration) -> Migration:
        self.sent_at.append(self.sent)
        self.counts[self.server.host] += 2 * MIB  # until it is frozen
        self.sent += 2 * MIB
        if migration.index in self.fail:
            return record(migration, ok=False)
        self.apps.moved("server", migration.to)
        self.counts[migration.to] += 3 * MIB  # until its gap has been measured
        self.sent += 3 * MIB
        return record(migration)

    def run(self) -> list[int]:
        """MiB that the program had sent when each migration began."""
        self.schedule.start()
        self.schedule.finish()
        return [sent // MIB for sent in self.sent_at]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(migrations, "POLL", 0.0)
    with RunFolder.create("t", seed=0, root=tmp_path) as folder:

        def make(*moves: str) -> World:
            made = World(folder, *moves)
            monkeypatch.setattr(testbed.migration, "migrate", made.migrate)
            return made

        yield make


def started_in_time(started: list[int], due: list[int]) -> bool:
    """At the first look that found them: the program has sent on after it, once."""
    return started == [size + 1 for size in due]


def test_bytes_count_from_the_programs_start_wherever_it_was(world: Any) -> None:
    w = world("h3 4MiB", "h1 16MiB", "h3 24MiB", "h2 40MiB", "h1 64MiB")
    assert started_in_time(w.run(), [4, 16, 24, 40, 64])
    assert all(record.ok for record in w.schedule.records)


def test_a_migration_by_time_before_does_not_restart_the_count(world: Any) -> None:
    w = world("h3 1s", "h2 30MiB")
    w.server.started = time.monotonic() - 10  # due at once, right after the first look
    started = w.run()
    assert started[0] <= 1
    assert started_in_time(started[1:], [30])


def test_a_roll_back_leaves_the_count_as_it_was(world: Any) -> None:
    w = world("h3 4MiB", "h1 16MiB")
    w.fail = {0}
    assert started_in_time(w.run(), [4, 16])


def test_a_nic_that_does_not_answer_once_takes_nothing_away(world: Any) -> None:
    w = world("h3 4MiB", "h1 16MiB")
    w.silent = 3
    assert started_in_time(w.run(), [4, 16])


@pytest.mark.parametrize(
    ("moves", "failed", "end"),
    [
        ([], [], "h2"),
        (["h3 1s"], [], "h3"),
        (["h3 1s"], [0], "h2"),
        (["h3 1s change"], [], "h2"),
        (["h3 1s", "h2 2s"], [], "h2"),
        (["h3 1s", "h2 2s"], [1], "h3"),
        (["h3 1s", "h2 2s", "h1 3s"], [], "h1"),
    ],
)
def test_an_address_is_where_it_was_moved_to_last(moves: list[str], failed: list[int], end: str) -> None:
    topology = topology_with(*moves)
    records = [record(migration, ok=migration.index not in failed) for migration in topology.migrations]
    at = addresses_at_end(topology, records)
    first = {host.ip: host.name for host in topology.hosts.values()}
    assert at == first | {topology.hosts["h2"].ip: end}
