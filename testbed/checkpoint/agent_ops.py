"""What an agent does for a migration: the operations of the source and of the destination.

    destination                                   source
                                                  migrate_begin    what is known of the program
    migrate_prepare   receiver and `criu restore`
                      started, both waiting
                                                  migrate_send     freeze → stop the NIC → dump the NIC's objects ∥ the
                                                                   process → transfer; the program stays frozen
    migrate_receive   transfer → NIC's objects →
                      address → process; frozen
    migrate_resume    NIC attached, RESUME → thaw
                                                  migrate_commit   the original is killed, objects and address removed
    migrate_abort     whatever there is of it     migrate_rollback the program runs on here, RESUME sent from here

`migrate_abort` and `migrate_rollback` are possible at every moment before `migrate_resume` has sent its RESUME, may be
repeated, and wait for an operation of the same migration that is still under way. An agent that ends does the same.

Every phase is told as it begins and ends, by the event `migration_phase` {migration, phase, began[, ended]} in
time.monotonic() of this machine.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from softroce_ext.native import build
from testbed.agent import addresses, apps
from testbed.agent.nic import running_nic
from testbed.agent.operations import OperationError, operation
from testbed.agent.processes import inner_pid, namespace_members
from testbed.agent.service import Agent
from testbed.checkpoint import criu_binary, inventory, network_lock, transfer
from testbed.checkpoint.dump import Dump
from testbed.checkpoint.hooks import CriuFailed
from testbed.checkpoint.restore import FIRST_IMAGE, Restore
from testbed.checkpoint.transfer import Receiver, Sender, TransferFailed
from testbed.errors import EnvironmentProblem

NIC_IMAGE = "nic/image"
"""Name of the NIC's image in the transfer."""
NIC_SECONDS = 30.0
"""Bound on one command to the NIC."""
ACK_SECONDS = 3.0
"""How long the program waits, frozen, for every partner to acknowledge its RESUME."""


@dataclass
class Outgoing:
    """A migration that leaves this host."""

    migration: str
    app: apps.App
    folder: Path
    lock: threading.Lock = field(default_factory=threading.Lock)
    sender: Sender | None = None
    dump: Dump | None = None
    contexts: list[str] = field(default_factory=list)
    """Contexts that the NIC holds for it."""
    held: bool = False
    done: bool = False
    """Committed or rolled back."""


@dataclass
class Incoming:
    """A migration that comes to this host."""

    migration: str
    app: str
    argv: list[str]
    env: dict[str, str]
    folder: Path
    receiver: Receiver
    lock: threading.Lock = field(default_factory=threading.Lock)
    restore: Restore | None = None
    contexts: list[str] = field(default_factory=list)
    """Contexts that the NIC has restored for it."""
    address: str | None = None
    """Address that was added for it."""
    done: bool = False
    """Taken over or aborted."""


_OUTGOING: dict[str, Outgoing] = {}
_INCOMING: dict[str, Incoming] = {}


@contextlib.contextmanager
def _blame() -> Iterator[None]:
    """Errors of the parts below, as the agent tells them."""
    try:
        yield
    except (CriuFailed, TransferFailed, inventory.BadImage) as error:
        raise OperationError(str(error)) from error
    except build.BuildError as error:
        raise OperationError(str(error), blame="environment") from error
    except EnvironmentProblem as error:
        raise OperationError(error.message, blame="environment", hint=error.hint) from error
    except OSError as error:
        raise OperationError(f"{error.filename or 'system'}: {error.strerror or error}", blame="environment") from error


@contextlib.contextmanager
def _phase(agent: Agent, migration: str, name: str, began: float | None = None) -> Iterator[None]:
    """Tell when a phase begins and, if it succeeds, when it ends."""
    began = time.monotonic() if began is None else began
    agent.event("migration_phase", migration=migration, phase=name, began=began)
    yield
    _ended(agent, migration, name, began, time.monotonic())


def _ended(agent: Agent, migration: str, name: str, began: float, ended: float) -> None:
    agent.event("migration_phase", migration=migration, phase=name, began=began, ended=ended)


def _workspace(agent: Agent, migration: str, side: str) -> Path:
    """An empty folder on the host's tmpfs for one end of a migration, with `images/` and `work/` in it."""
    folder = agent.root / "migrate" / f"{migration}.{side}"
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("images", "work"):
        (folder / name).mkdir(parents=True)
    return folder


# ---- the source ------------------------------------------------------------------------------------------------------


@operation("migrate_begin")
def migrate_begin(agent: Agent, *, app: str) -> dict[str, Any]:
    """What the destination and the harness have to know of an application that is about to leave: {argv, env, pids}.

    Fails where this host could not checkpoint it: it has ended, or no CRIU works here.
    """
    found = apps.find_app(agent, app)
    if found.ended is not None:
        raise OperationError(f"application {app!r} has ended already")
    with _blame():
        criu_binary.find()
    return {"argv": found.argv, "env": found.env, "pids": sorted(namespace_members(found.init))}


@operation("migrate_send")
def migrate_send(
    agent: Agent, *, migration: str, app: str, address: str, port: int, token: str, source: str | None = None
) -> dict[str, Any]:
    """Freeze the application, dump it and its NIC objects, and bring both to the destination. It stays frozen.

    `address`, `port`, `token`: the destination's receiver (`migrate_prepare`); `source`: own node address to send from.
    Returns {contexts, image_bytes, nic_image_bytes, app_bytes, bytes}. After an error the application runs on here.
    """
    found = apps.find_app(agent, app)
    if found.ended is not None:
        raise OperationError(f"application {app!r} has ended already")
    if migration in _OUTGOING:
        raise OperationError(f"migration {migration!r} exists already", blame="input")
    with _blame():
        criu = criu_binary.find()
        move = Outgoing(migration, found, _workspace(agent, migration, "out"))
        _OUTGOING[migration] = move
        with move.lock:
            try:
                return _send(agent, move, criu, lambda: Sender(address, port, token, source))
            except BaseException:
                _roll_back(agent, move)
                raise


def _send(agent: Agent, move: Outgoing, criu: list[str], connect: Callable[[], Sender]) -> dict[str, Any]:
    name = move.migration
    move.sender = connect()
    images = move.folder / "images"
    dump = move.dump = Dump(criu, move.app.init, images, move.folder / "work")
    with _phase(agent, name, "freeze", dump.wait_freezing()):
        dump.wait_frozen()
    with _phase(agent, name, "stop"):
        nic = running_nic(agent) if agent.nic is not None else None
        if nic is not None:
            pids = sorted(namespace_members(move.app.init))
            held = nic.command("hold", {"pids": pids}, NIC_SECONDS)["contexts"]
            move.contexts = [str(context["id"]) for context in held]
            move.held = True
    began = time.monotonic()
    agent.event("migration_phase", migration=name, phase="dump_process", began=began)
    dump.copy()
    nic_image = move.folder / "nic.image"
    if nic is not None and move.contexts:
        with _phase(agent, name, "dump_nic"):
            nic.command("dump", {"contexts": move.contexts, "file": str(nic_image)}, NIC_SECONDS)
    _ended(agent, name, "dump_process", began, dump.wait_copied())
    with _phase(agent, name, "transfer"):
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


@operation("migrate_commit")
def migrate_commit(agent: Agent, *, migration: str, remove_address: str | None = None) -> dict[str, Any]:
    """The application runs at the destination: kill the original, forget its NIC objects, give up its address.

    Returns {"problems": […]}: what could not be cleaned up; the migration has succeeded nevertheless.
    """
    move = _outgoing(migration)
    problems: list[str] = []
    with move.lock, _phase(agent, migration, "commit"):
        if move.done or move.dump is None:
            raise OperationError(f"migration {migration!r} cannot be committed: it was rolled back")
        move.done = True
        released = apps.release(agent, move.app.name)
        with _collect(problems):
            move.dump.commit()
        if released.launcher is not None:
            released.launcher.wait()
        if move.contexts:
            with _collect(problems):
                running_nic(agent).command("discard", {"contexts": move.contexts}, NIC_SECONDS)
        if remove_address is not None:
            with _collect(problems):
                addresses.address_del(agent, ip=remove_address)
        with _collect(problems):
            table = inventory.lock_table((move.folder / "images" / FIRST_IMAGE).read_bytes())
            if table is not None:
                network_lock.remove(table)
        shutil.rmtree(move.folder, ignore_errors=True)
    return {"problems": problems}


@operation("migrate_rollback")
def migrate_rollback(agent: Agent, *, migration: str) -> dict[str, Any]:
    """The application runs on here. Returns {"rolled_back": bool}: False if nothing of it had begun."""
    move = _OUTGOING.get(migration)
    if move is None:
        return {"rolled_back": False}
    with move.lock, _blame():
        _roll_back(agent, move)
    return {"rolled_back": True}


def _roll_back(agent: Agent, move: Outgoing) -> None:
    """CRIU resumes the tree, then the NIC its objects: what a RESUME brings needs somebody to take it."""
    if move.done:
        return
    move.done = True
    if move.sender is not None:
        move.sender.close()
    if move.dump is not None:
        move.dump.roll_back()
    if move.held and move.contexts:
        # Not waited for: the program runs already, and a silent partner is no reason to call the roll-back a failure.
        running_nic(agent).command("unhold", {"contexts": move.contexts, "wait": False}, NIC_SECONDS)
    _keep_logs(agent, move.folder)


def _outgoing(migration: str) -> Outgoing:
    try:
        return _OUTGOING[migration]
    except KeyError:
        raise OperationError(f"no migration {migration!r} leaves this host") from None


@contextlib.contextmanager
def _collect(problems: list[str]) -> Iterator[None]:
    """Note what fails and go on: after the point of no return every further step is a clean-up."""
    try:
        with _blame():
            yield
    except OperationError as error:
        problems.append(error.message)


# ---- the destination -------------------------------------------------------------------------------------------------


@operation("migrate_prepare")
def migrate_prepare(
    agent: Agent, *, migration: str, app: str, argv: list[str], env: dict[str, str], listen: str
) -> dict[str, Any]:
    """Get ready to take an application: a receiver on the own address `listen`, `criu restore` started and waiting.

    Returns {port, token, criu}. `argv` and `env` are kept for `app_status` and a later migration only.
    """
    present = agent.apps.get(app)
    if present is not None and present.ended is None:
        raise OperationError(f"application {app!r} runs on this host already", blame="input")
    if migration in _INCOMING:
        raise OperationError(f"migration {migration!r} exists already", blame="input")
    with _blame():
        criu = criu_binary.usable()
        if agent.nic is not None:
            running_nic(agent).command("status", {}, NIC_SECONDS)
        move = Incoming(migration, app, argv, env, _workspace(agent, migration, "in"), Receiver(listen))
        _INCOMING[migration] = move
        agent.at_end(lambda: _abort(agent, move))
        try:
            directory = apps.app_directory(agent, app)
            shutil.rmtree(directory, ignore_errors=True)  # of an earlier stay; the log comes with the application
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


@operation("migrate_receive")
def migrate_receive(
    agent: Agent,
    *,
    migration: str,
    addresses_moved: dict[str, str],
    add_address: str | None = None,
    prefix: int = 16,
) -> dict[str, Any]:
    """Take what the source sends and restore NIC objects, address and process; the process stands still.

    `addresses_moved`: {address of the queue pairs at the source: address here}; equal for one that moves along.
    `add_address`: address to be added to the data interface. Returns {"contexts": […]}.
    """
    move = _incoming(migration)
    with move.lock, _blame():
        restore = move.restore
        if restore is None or move.done:
            raise OperationError(f"migration {migration!r} was aborted")
        images = move.folder / "images"
        first = f"images/{FIRST_IMAGE}"
        received = move.receiver.receive(
            {"images": images, "app": apps.app_directory(agent, move.app), "nic": move.folder}, keep=(first,)
        )
        if first not in received.kept:
            raise OperationError(f"the source sent no {FIRST_IMAGE}")
        with _phase(agent, migration, "restore_nic"):
            nic_image = move.folder / NIC_IMAGE.partition("/")[2]
            if nic_image.exists():
                answer = running_nic(agent).command(
                    "restore", {"file": str(nic_image), "addresses": addresses_moved}, NIC_SECONDS
                )
                move.contexts = [str(context["id"]) for context in answer["contexts"]]
            if add_address is not None:
                move.address = add_address
                addresses.address_add(agent, ip=add_address, prefix=prefix)
        with _phase(agent, migration, "restore_process"):
            restore.begin(inventory.nothing_locked(received.kept[first]))
            restore.wait_restored()
    return {"contexts": move.contexts}


@operation("migrate_resume")
def migrate_resume(agent: Agent, *, migration: str, source_ip: str) -> dict[str, Any]:
    """Join the restored process with its NIC objects, tell every partner by RESUME from `source_ip`, let it run.

    Once the NIC was told to resume (event `migration_resumed`) there is no way back, so the program then runs here
    whatever else fails. Returns {"init", "resume", "problem"}: its new init, what the NIC said of the RESUMEs, and what
    went wrong after the point of no return, or None.
    """
    move = _incoming(migration)
    with move.lock, _blame():
        restore = move.restore
        if restore is None or move.done:
            raise OperationError(f"migration {migration!r} was aborted")
        init = restore.root_pid
        answer: dict[str, Any] = {}
        problems: list[str] = []
        with _phase(agent, migration, "resume"):
            nic = running_nic(agent) if move.contexts else None
            if nic is not None:
                pids = {str(inner_pid(pid)): pid for pid in namespace_members(init)}
                nic.command("attach", {"contexts": move.contexts, "pids": pids}, NIC_SECONDS)
            agent.event("migration_resumed", migration=migration)
            move.done = True
            apps.adopt(agent, name=move.app, init=init, argv=move.argv, env=move.env)
            if nic is not None:
                # Past `timeout` the RESUMEs go on, but a partner that is silent must not keep the program frozen.
                request = {"contexts": move.contexts, "source_ip": source_ip, "wait": True, "timeout": ACK_SECONDS}
                with _collect(problems):
                    answer = nic.command("resume", request, NIC_SECONDS)
        with _phase(agent, migration, "thaw"), _collect(problems):
            restore.release()
        shutil.rmtree(move.folder, ignore_errors=True)
    return {"init": init, "resume": answer, "problem": "; ".join(problems) or None}


@operation("migrate_abort")
def migrate_abort(agent: Agent, *, migration: str) -> dict[str, Any]:
    """Remove whatever there is of an incoming migration. Returns {"aborted": bool}: False if there was none."""
    move = _INCOMING.get(migration)
    if move is None:
        return {"aborted": False}
    move.receiver.close()  # a receive that waits ends, and gives the lock back
    with move.lock:
        _abort(agent, move)
    return {"aborted": True}


def _abort(agent: Agent, move: Incoming) -> None:
    if move.done:
        return
    move.done = True
    move.receiver.close()
    if move.restore is not None:
        move.restore.abort()
    if move.contexts:
        with contextlib.suppress(OperationError):  # a NIC that has died has forgotten them too
            running_nic(agent).command("discard", {"contexts": move.contexts}, NIC_SECONDS)
    if move.address is not None:
        with contextlib.suppress(OperationError):
            addresses.address_del(agent, ip=move.address)
    _keep_logs(agent, move.folder)


def _incoming(migration: str) -> Incoming:
    try:
        return _INCOMING[migration]
    except KeyError:
        raise OperationError(f"no migration {migration!r} comes to this host") from None


def _keep_logs(agent: Agent, folder: Path) -> None:
    """Give back the memory that images take on the tmpfs; CRIU's logs stay, for the report."""
    logs = agent.root / "migrate" / f"{folder.name}.logs"
    logs.mkdir(parents=True, exist_ok=True)
    for entry in os.scandir(folder / "work"):
        if entry.name.endswith((".log", ".err")) and entry.is_file():
            with contextlib.suppress(OSError):
                shutil.move(entry.path, logs / entry.name)
    shutil.rmtree(folder, ignore_errors=True)
