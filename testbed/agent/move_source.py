"""The operations of the host that an application leaves. `testbed.agent.table` shows the order of all."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable
from typing import Any

from testbed.agent import addresses, apps, transfer
from testbed.agent.move_stages import NIC_IMAGE, NIC_SECONDS, blame, collect, keep_logs, phase, phase_ended, workspace
from testbed.agent.nic import note_gaps, running_nic
from testbed.agent.operations import OperationError
from testbed.agent.processes import send_signal, wait_ended
from testbed.agent.records import Outgoing
from testbed.agent.service import Agent
from testbed.agent.transfer import Sender
from testbed.base import ip6
from testbed.checkpoint import criu_binary, inventory, network_lock, tree
from testbed.checkpoint.dump import END_SECONDS, Dump
from testbed.checkpoint.hooks import CriuFailed
from testbed.checkpoint.inventory import BadImage
from testbed.checkpoint.restore import FIRST_IMAGE


def migrate_begin(agent: Agent, *, app: str) -> dict[str, Any]:
    """Return what the other ends need to know about an application: {argv, env, pids, policy, longest_gap}.

    Raises OperationError if this host cannot checkpoint it, because it has ended or no CRIU works here.
    """
    found = apps.find_app(agent, app)
    if found.ended is not None:
        raise OperationError(f"application {app!r} has ended already")
    with blame():
        criu_binary.find()
    if agent.nic is not None:
        with contextlib.suppress(OperationError):  # the NIC will soon be asked to reset its gaps
            note_gaps(agent, running_nic(agent).command("gaps", {}, NIC_SECONDS)["contexts"])
    return {
        "argv": found.argv,
        "env": found.env,
        "pids": sorted(tree.members(found.init)),
        "policy": os.sched_getscheduler(found.init),
        "longest_gap": found.longest_gap,
    }


def migrate_send(
    agent: Agent,
    *,
    migration: str,
    app: str,
    address: str,
    port: int,
    token: str,
    source: str | None = None,
    leaving: str | None = None,
) -> dict[str, Any]:
    """Freeze the application, dump it with its NIC objects, and send both to the destination. It remains frozen.

    `address`, `port`, `token`: the destination's receiver (`migrate_prepare`); `source`: this host's node address to
    send from; `leaving`: the address that moves along. The NIC gives it up as soon as everything is sent, so that a
    peer on the same host looks for it on the wire from then on; the interface keeps it until the commit, for TCP after
    a roll-back.

    Returns {contexts, image_bytes, nic_image_bytes, app_bytes, bytes}. After an error the application continues here.
    """
    found = apps.find_app(agent, app)
    if found.ended is not None:
        raise OperationError(f"application {app!r} has ended already")
    if migration in agent.outgoing:
        raise OperationError(f"migration {migration!r} already exists", blame="input")
    with blame():
        criu = criu_binary.find()
        move = Outgoing(migration, found, workspace(agent, migration, "out"))
        agent.outgoing[migration] = move
        with move.lock:
            try:
                sent = _send(agent, move, criu, lambda: Sender(address, port, token, source))
                if leaving is not None and agent.nic is not None:
                    with contextlib.suppress(OperationError):  # it may not be in the GID table
                        running_nic(agent).command("address_remove", {"ip": leaving}, NIC_SECONDS)
                        move.gid = leaving
                        running_nic(agent).command("address_remove", {"ip": ip6.companion(leaving)}, NIC_SECONDS)
                return sent
            except BaseException:
                with contextlib.suppress(OperationError):  # migrate_rollback tries again what has failed
                    _roll_back(agent, move)
                raise


def _send(agent: Agent, move: Outgoing, criu: list[str], connect: Callable[[], Sender]) -> dict[str, Any]:
    name = move.migration
    move.sender = connect()
    images = move.folder / "images"
    dump = move.dump = Dump(criu, move.app.init, images, move.folder / "work")
    with phase(agent, name, "freeze", dump.wait_freezing()):
        # The program needs processor time to be frozen, too.
        move.policy = os.sched_getscheduler(move.app.init)
        tree.change_policy(move.app.init, move.policy, os.SCHED_OTHER)
        dump.wait_frozen()
    with phase(agent, name, "stop"):
        nic = running_nic(agent) if agent.nic is not None else None
        if nic is not None:
            pids = tree.members(move.app.init)
            held = nic.command("hold", {"pids": pids}, NIC_SECONDS)["contexts"]
            move.contexts = [str(context["id"]) for context in held]
            move.held = True
    began = time.monotonic()
    agent.event("migration_phase", migration=name, phase="dump_process", began=began)
    dump.copy()
    nic_image = move.folder / "nic.image"
    if nic is not None and move.contexts:
        with phase(agent, name, "dump_nic"):
            nic.command("dump", {"contexts": move.contexts, "file": str(nic_image)}, NIC_SECONDS)
    phase_ended(agent, name, "dump_process", began, dump.wait_copied())
    with phase(agent, name, "transfer"):
        entries = [transfer.Entry(NIC_IMAGE, nic_image)] if move.contexts else []
        app_files = transfer.below(move.app.directory, "app")
        sent = move.sender.send([*entries, *transfer.below(images, "images"), *app_files])
    image_bytes = dump.image_bytes
    nic_bytes = nic_image.stat().st_size if move.contexts else 0
    return {
        "contexts": move.contexts,
        "image_bytes": image_bytes,
        "nic_image_bytes": nic_bytes,
        "app_bytes": sent - image_bytes - nic_bytes,
        "bytes": sent,
    }


def migrate_commit(agent: Agent, *, migration: str, remove_address: str | None = None) -> dict[str, Any]:
    """Kill the original, because the application runs at the destination; remove its NIC objects and its address.

    Returns {"problems": […]}: what could not be cleaned up. The migration has succeeded nevertheless.
    """
    move = _outgoing(agent, migration)
    problems: list[str] = []
    with move.lock, phase(agent, migration, "commit"):
        if move.done or move.dump is None:
            raise OperationError(f"migration {migration!r} cannot be committed: it was rolled back")
        move.done = True
        original = apps.forget(agent, move.app.name)
        with collect(problems):
            try:
                move.dump.commit()
            except CriuFailed:
                # A CRIU that died has let the program continue, but two copies must not run.
                send_signal(original.init, signal.SIGKILL)
                raise
        with collect(problems):
            if not wait_ended(original.init, END_SECONDS):
                raise OperationError(f"the original did not end within {END_SECONDS:g} s after it was killed")
            if original.launcher is not None:
                original.launcher.wait()
        if move.contexts:
            with collect(problems):
                running_nic(agent).command("discard", {"contexts": move.contexts}, NIC_SECONDS)
        if remove_address is not None:
            with collect(problems):
                addresses.address_del(agent, ip=remove_address)
        with collect(problems):
            _remove_lock(move)
        shutil.rmtree(move.folder, ignore_errors=True)
        agent.outgoing.pop(migration, None)
    return {"problems": problems}


def migrate_rollback(agent: Agent, *, migration: str) -> dict[str, Any]:
    """Let the application continue here. Returns {"rolled_back": bool}: False if there is nothing to roll back."""
    move = agent.outgoing.get(migration)
    if move is None:
        return {"rolled_back": False}
    with move.lock, blame():
        _roll_back(agent, move)
    return {"rolled_back": True}


def _roll_back(agent: Agent, move: Outgoing) -> None:
    """Let CRIU resume the process tree, then the NIC its queue pairs: what a RESUME brings needs a running program.

    Every step is tried, also after one that fails. Raises OperationError; what failed can then be tried again.
    """
    if move.done:
        return
    problems: list[str] = []
    with collect(problems):
        if move.sender is not None:
            move.sender.close()
    with collect(problems):
        if move.dump is not None:
            move.dump.roll_back()
            with contextlib.suppress(OSError, BadImage):  # there is none before the images are complete
                _remove_lock(move)
    with collect(problems):
        if move.policy is not None:
            tree.change_policy(move.app.init, os.SCHED_OTHER, move.policy)
            move.policy = None
    with collect(problems):
        if move.gid is not None:
            for address in ip6.both(move.gid):
                running_nic(agent).command("address_add", {"ip": address}, NIC_SECONDS)
            move.gid = None
    with collect(problems):
        if move.held and move.contexts:
            # Not waited for: the program runs already, and a silent peer does not make the roll-back a failure.
            running_nic(agent).command("unhold", {"contexts": move.contexts, "wait": False}, NIC_SECONDS)
        move.held = False
    if problems:
        raise OperationError("; ".join(problems))
    move.done = True
    agent.outgoing.pop(move.migration, None)
    keep_logs(agent, move.folder)


def _remove_lock(move: Outgoing) -> None:
    """Remove CRIU's netfilter table, if it still exists. Raises OSError, BadImage."""
    table = inventory.lock_table((move.folder / "images" / FIRST_IMAGE).read_bytes())
    if table is not None:
        network_lock.remove(table)


def _outgoing(agent: Agent, migration: str) -> Outgoing:
    try:
        return agent.outgoing[migration]
    except KeyError:
        raise OperationError(f"no migration {migration!r} from this host") from None
