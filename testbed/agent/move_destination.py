"""The operations of the host that an application arrives at. `testbed.agent.table` shows the order of all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
from typing import Any

from testbed.agent import addresses, apps
from testbed.agent.move_stages import NIC_IMAGE, NIC_SECONDS, blame, collect, keep_logs, phase, workspace
from testbed.agent.nic import running_nic
from testbed.agent.operations import OperationError
from testbed.agent.processes import inner_pid
from testbed.agent.records import Incoming
from testbed.agent.service import Agent
from testbed.agent.transfer import Receiver
from testbed.base import ip6
from testbed.checkpoint import criu_binary, inventory, tree
from testbed.checkpoint.hooks import CriuFailed
from testbed.checkpoint.restore import FIRST_IMAGE, Restore

ADDRESS_STAYED = "the program has a TCP connection or listener on its address; use address: keep"
"""The hint when CRIU misses an address that did not move along."""
ACK_SECONDS = 3.0
"""Longest time that the program remains frozen until every peer has acknowledged its RESUME."""


def migrate_prepare(
    agent: Agent,
    *,
    migration: str,
    app: str,
    argv: list[str],
    env: dict[str, str],
    listen: str,
    policy: int,
    longest_gap: float | None = None,
) -> dict[str, Any]:
    """Prepare to take an application: a receiver on this host's address `listen`, and `criu restore`, both waiting.

    Returns {port, token, criu}. `argv` and `env` are kept for a later migration only, `longest_gap` (seconds, before it
    left) for the report of its end; `policy` is the scheduling policy (sched(7)) that the program gets back before it
    runs.
    """
    present = agent.apps.get(app)
    if present is not None and present.ended is None:
        raise OperationError(f"application {app!r} is already running on this host", blame="input")
    if migration in agent.incoming:
        raise OperationError(f"migration {migration!r} already exists", blame="input")
    with blame():
        criu = criu_binary.usable()
        if agent.nic is not None:
            running_nic(agent).command("status", {}, NIC_SECONDS)
        folder = workspace(agent, migration, "in")
        move = Incoming(migration, app, argv, env, policy, folder, Receiver(listen), longest_gap)
        agent.incoming[migration] = move
        move.withdraw_end = agent.at_end(lambda: _abort(agent, move))
        try:
            directory = apps.app_directory(agent, app)
            shutil.rmtree(directory, ignore_errors=True)  # from an earlier stay; the application brings its log
            directory.mkdir(parents=True)
            move.restore = Restore(list(criu.command), move.folder / "images", move.folder / "work")
        except BaseException:
            _abort(agent, move)
            raise
    return {
        "port": move.receiver.port,
        "token": move.receiver.token,
        "criu": ".".join(map(str, criu.version)),
    }


def migrate_receive(
    agent: Agent,
    *,
    migration: str,
    addresses_moved: dict[str, str],
    add_address: str | None = None,
    prefix: int = 16,
) -> dict[str, Any]:
    """Receive what the source sends, and restore NIC objects, address and process; the process remains frozen.

    `addresses_moved`: {address of the queue pairs at the source: address here}; equal for an address that moves along.
    `add_address`: address to be added to the data interface. Returns {"contexts": […]}.
    """
    move = _incoming(agent, migration)
    with move.lock, blame():
        restore = move.restore
        if restore is None or move.done:
            raise OperationError(f"migration {migration!r} was aborted")
        images = move.folder / "images"
        first = f"images/{FIRST_IMAGE}"
        failed: list[OperationError] = []
        adding = threading.Thread(target=_add_address, args=(agent, move, add_address, prefix, failed))
        try:
            received = move.receiver.receive(
                {"images": images, "app": apps.app_directory(agent, move.app), "nic": move.folder},
                keep=(first,),
                on_start=adding.start,
            )
        finally:
            if adding.ident is not None:
                adding.join()
        if failed:
            raise failed[0]
        if first not in received.kept:
            raise OperationError(f"the source sent no {FIRST_IMAGE}")
        with phase(agent, migration, "restore_nic"):
            if add_address is not None and agent.nic is not None:
                running_nic(agent).command("address_add", {"ip": add_address}, NIC_SECONDS)
                move.gid = add_address
                running_nic(agent).command("address_add", {"ip": ip6.companion(add_address)}, NIC_SECONDS)
            nic_image = move.folder / NIC_IMAGE.partition("/")[2]
            if nic_image.exists():
                answer = running_nic(agent).command(
                    "restore", {"file": str(nic_image), "addresses": addresses_moved}, NIC_SECONDS
                )
                move.contexts = [str(context["id"]) for context in answer["contexts"]]
        with phase(agent, migration, "restore_process"):
            try:
                restore.begin(inventory.nothing_locked(received.kept[first]))
                restore.wait_restored()
            except CriuFailed as error:
                if add_address is None and error.has(errno.EADDRNOTAVAIL):
                    raise OperationError(str(error), hint=ADDRESS_STAYED) from error
                raise
    return {"contexts": move.contexts}


def _add_address(agent: Agent, move: Incoming, address: str | None, prefix: int, failed: list[OperationError]) -> None:
    """Add the moving address while the images arrive: the program is frozen by now, so its address is not in use."""
    if address is None:
        return
    move.address = address
    try:
        addresses.address_add(agent, ip=address, prefix=prefix)
    except OperationError as error:
        failed.append(error)


def migrate_resume(agent: Agent, *, migration: str, source_ip: str) -> dict[str, Any]:
    """Attach the restored process to its NIC objects, send RESUME from `source_ip` to every peer, and let it run.

    There is no way back once the NIC was asked to resume (event `migration_resumed`), so the program then runs on this
    host whatever else fails. Returns {"init", "resume", "problem"}: its new init, the NIC's answer about the RESUMEs,
    and what failed after the point of no return, or None.
    """
    move = _incoming(agent, migration)
    with move.lock, blame():
        restore = move.restore
        if restore is None or move.done:
            raise OperationError(f"migration {migration!r} was aborted")
        init = restore.root_pid
        answer: dict[str, Any] = {}
        problems: list[str] = []
        with phase(agent, migration, "resume"):
            nic = running_nic(agent) if move.contexts else None
            if nic is not None:
                pids = {str(inner_pid(pid)): pid for pid in tree.members(init)}
                nic.command("attach", {"contexts": move.contexts, "pids": pids}, NIC_SECONDS)
            agent.event("migration_resumed", migration=migration)
            move.done = True
            apps.adopt(
                agent, name=move.app, init=init, argv=move.argv, env=move.env,
                uses_nic=bool(move.contexts), longest_gap=move.longest_gap,
            )  # fmt: skip
            if nic is not None:
                # RESUMEs are still repeated after `timeout`, but a silent peer must not keep the program frozen.
                request = {"contexts": move.contexts, "source_ip": source_ip, "wait": True, "timeout": ACK_SECONDS}
                with collect(problems):
                    answer = nic.command("resume", request, NIC_SECONDS)
        with phase(agent, migration, "thaw"), collect(problems):
            restore.thaw()
            tree.change_policy(init, os.SCHED_OTHER, move.policy)
        shutil.rmtree(move.folder, ignore_errors=True)
        _forget(agent, move)
    return {"init": init, "resume": answer, "problem": "; ".join(problems) or None}


def migrate_abort(agent: Agent, *, migration: str) -> dict[str, Any]:
    """Remove whatever exists of an incoming migration. Returns {"aborted": bool}: False if there was none."""
    move = agent.incoming.get(migration)
    if move is None:
        return {"aborted": False}
    move.receiver.close()  # an operation that waits in `receive` ends and releases the lock
    with move.lock:
        _abort(agent, move)
    return {"aborted": True}


def _abort(agent: Agent, move: Incoming) -> None:
    if move.done:
        return
    move.done = True
    _forget(agent, move)
    move.receiver.close()
    if move.restore is not None:
        move.restore.abort()
    if move.contexts:
        with contextlib.suppress(OperationError):  # a NIC that has ended has no objects any more
            running_nic(agent).command("discard", {"contexts": move.contexts}, NIC_SECONDS)
    if move.gid is not None:
        for address in ip6.both(move.gid):
            with contextlib.suppress(OperationError):
                running_nic(agent).command("address_remove", {"ip": address}, NIC_SECONDS)
    if move.address is not None:
        with contextlib.suppress(OperationError):
            addresses.address_del(agent, ip=move.address)
    keep_logs(agent, move.folder)


def _forget(agent: Agent, move: Incoming) -> None:
    """The migration is over: drop it from the agent's state and from what the agent does at its own end."""
    agent.incoming.pop(move.migration, None)
    move.withdraw_end()


def _incoming(agent: Agent, migration: str) -> Incoming:
    try:
        return agent.incoming[migration]
    except KeyError:
        raise OperationError(f"no migration {migration!r} to this host") from None
