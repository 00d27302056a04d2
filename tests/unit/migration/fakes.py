"""A world in which a migration can be tried without CRIU, NICs or a network: it only knows where the program is.

The fake agents obey the operations' contract (`testbed.agent.table`) and keep the truth: which host runs the
program, which one holds a frozen copy, where its packets go. Any operation can fail, before or after its work.
"""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from testbed.base.errors import RunFailed
from testbed.topology import ResolvedMigration

SOURCE_PHASES = ("freeze", "stop", "dump_nic", "dump_process", "transfer")


class World:
    """Where everything is. `log` has every operation in its order."""

    def __init__(self) -> None:
        self.running: set[str] = {"h2"}
        self.frozen: set[str] = set()
        self.flows_to = "h2"
        self.prepared = False
        self.log: list[str] = []
        self.fail: dict[str, str] = {}
        """operation → "before" or "after": when it fails in relation to its work."""
        self.prepared_with: dict[str, Any] = {}
        self.dead: set[str] = set()
        """Hosts whose agents have gone."""
        self.events: list[dict[str, Any]] = []

    def step(self, name: str, work: Callable[[], Any]) -> Any:
        """Do `work` as operation `name`, failing as told."""
        self.log.append(name)
        when = self.fail.get(name)
        if when == "before":
            raise RunFailed(f"{name} failed", where="fake", hint="none")
        result = work()
        if when == "after":
            raise RunFailed(f"{name} failed", where="fake", hint="none")
        return result


class FakeHost:
    """An agent: see `testbed.lab.hosts.Host`."""

    def __init__(self, name: str, world: World) -> None:
        self.name = name
        self.world = world
        self.alive = True
        self._listeners: list[Callable[[str, Mapping[str, Any]], None]] = []

    def subscribe(self, listener: Callable[[str, Mapping[str, Any]], None]) -> None:
        self._listeners.append(listener)

    def _tell(self, event: str, **fields: Any) -> None:
        for listener in self._listeners:
            listener(self.name, {"event": event, "t": time.monotonic(), **fields})

    def _phases(self, migration: str, *phases: str) -> None:
        for phase in phases:
            began = time.monotonic()
            self._tell("migration_phase", migration=migration, phase=phase, began=began)
            self._tell("migration_phase", migration=migration, phase=phase, began=began, ended=time.monotonic())

    def call(self, op: str, *, timeout: float | None = 60.0, **arguments: Any) -> dict[str, Any]:
        if self.name in self.world.dead:
            raise RunFailed("the agent has gone", where=self.name)
        if op == "nic":
            return {"contexts": [], "counters": {"retransmits": len(self.world.log)}}
        return getattr(self, op)(**arguments) or {}

    def begin(self, op: str, **arguments: Any) -> concurrent.futures.Future[dict[str, Any]]:
        self._later = (op, arguments)
        return concurrent.futures.Future()

    def result(self, future: Any, op: str, timeout: float | None = None) -> dict[str, Any]:
        return self.call(op, **self._later[1])

    # -- the source

    def migrate_begin(self, app: str) -> dict[str, Any]:
        return self.world.step(
            "begin", lambda: {"argv": ["x"], "env": {}, "pids": [1], "policy": 0, "longest_gap": 0.3}
        )

    def migrate_send(self, migration: str, **_: Any) -> dict[str, Any]:
        world = self.world

        def work() -> dict[str, Any]:
            world.running.discard(self.name)
            world.frozen.add(self.name)
            self._phases(migration, *SOURCE_PHASES)
            return {"image_bytes": 10, "nic_image_bytes": 2}

        return world.step("send", work)

    def migrate_rollback(self, migration: str) -> None:
        world = self.world

        def work() -> None:
            if self.name in world.frozen:
                world.frozen.discard(self.name)
                world.running.add(self.name)

        world.step("rollback", work)

    def migrate_commit(self, migration: str, remove_address: str | None = None) -> dict[str, Any]:
        def work() -> dict[str, Any]:
            self._phases(migration, "commit")
            self.world.frozen.discard(self.name)
            return {"problems": []}

        return self.world.step("commit", work)

    # -- the destination

    def migrate_prepare(self, migration: str, **arguments: Any) -> dict[str, Any]:
        self.world.prepared_with = arguments
        return self.world.step("prepare", lambda: {"port": 1, "token": "t", "criu": "4.2"})

    def migrate_receive(self, migration: str, **_: Any) -> None:
        def work() -> None:
            self._phases(migration, "restore_nic", "restore_process")
            self.world.frozen.add(self.name)

        self.world.step("receive", work)

    def migrate_resume(self, migration: str, source_ip: str) -> dict[str, Any]:
        world = self.world

        def work() -> dict[str, Any]:
            self._tell("migration_resumed", migration=migration)
            self._phases(migration, "resume", "thaw")
            world.frozen.discard(self.name)
            world.running.add(self.name)
            return {"init": 1, "resume": {}, "problem": world.fail.get("resume problem")}

        return world.step("resume", work)

    def migrate_abort(self, migration: str) -> None:
        world = self.world
        world.step("abort", lambda: (world.frozen.discard(self.name), world.running.discard(self.name)))


class FakeController:
    """See `testbed.controller.client.ControllerClient`."""

    def __init__(self, world: World) -> None:
        self.world = world

    def __enter__(self) -> FakeController:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def prepare_move(self, ip: str, to_host: str) -> dict[str, Any]:
        def work() -> dict[str, Any]:
            self.world.prepared = True
            return {"flows": []}

        return self.world.step("prepare_move", work)

    def move(self, ip: str, to_host: str) -> dict[str, Any]:
        def work() -> dict[str, Any]:
            self.world.flows_to, self.world.prepared = to_host, False
            return {"flows": [{"switch": "s1", "action": "added", "match": "ipv4_dst=" + ip, "t": time.monotonic()}]}

        return self.world.step("move", work)

    def undo_move(self, ip: str) -> dict[str, Any]:
        def work() -> dict[str, Any]:
            self.world.flows_to, self.world.prepared = "h2", False
            return {"flows": []}

        return self.world.step("undo_move", work)


class FakeApps:
    """See `testbed.lab.applications.Applications`."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.host = "h2"

    def moved(self, name: str, to: str) -> None:
        self.host = to

    def running(self, name: str) -> bool:
        return bool(self.world.running)


def session(world: World) -> Any:
    """What `migrate` needs of a testbed.lab.session.Session."""

    def event(name: str, /, *, at: float | None = None, **fields: Any) -> None:
        from testbed.record import events

        events.check(name, fields)
        world.events.append({"event": name, **fields})

    hosts = {name: FakeHost(name, world) for name in ("h1", "h2", "h3")}
    plan = {name: SimpleNamespace(node_ip=f"100.64.0.{n}", prefix=16) for n, name in enumerate(hosts, 1)}
    return SimpleNamespace(
        hosts=hosts,
        apps=FakeApps(world),
        folder=SimpleNamespace(event=event, since_start=lambda at: 0.0),
        topology=SimpleNamespace(hosts=plan),
        controller=lambda: FakeController(world),
    )


def migration(address: str = "keep") -> ResolvedMigration:
    """The server moves from h2 to h3."""
    return ResolvedMigration(
        index=0,
        app="server",
        source="h2",
        to="h3",
        at_seconds=1.0,
        at_bytes=None,
        address=address,
        ip_before="10.0.0.2",
        ip_after="10.0.0.2" if address == "keep" else "10.0.0.3",
    )
