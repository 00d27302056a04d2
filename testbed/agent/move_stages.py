"""What both ends of a migration share: errors by blame, the events of a phase, and the folder of the images."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from softroce_ext.native import build
from testbed.agent.operations import OperationError
from testbed.agent.service import Agent
from testbed.agent.transfer import TransferFailed
from testbed.base.errors import EnvironmentProblem
from testbed.checkpoint.hooks import CriuFailed
from testbed.checkpoint.inventory import BadImage

NIC_IMAGE = "nic/image"
"""The name of the NIC's image in the transfer."""
NIC_SECONDS = 30.0
"""Bound on one command to the NIC."""


@contextlib.contextmanager
def blame() -> Iterator[None]:
    """Raise errors of CRIU, the transfer and the system as OperationError, by blame."""
    try:
        yield
    except (CriuFailed, TransferFailed, BadImage) as error:
        raise OperationError(str(error)) from error
    except build.BuildError as error:
        raise OperationError(str(error), blame="environment") from error
    except EnvironmentProblem as error:
        raise OperationError(error.message, blame="environment", hint=error.hint) from error
    except OSError as error:
        raise OperationError(f"{error.filename or 'system'}: {error.strerror or error}", blame="environment") from error


@contextlib.contextmanager
def phase(agent: Agent, migration: str, name: str, began: float | None = None) -> Iterator[None]:
    """Report when a phase begins and, if it succeeds, when it ends."""
    began = time.monotonic() if began is None else began
    agent.event("migration_phase", migration=migration, phase=name, began=began)
    yield
    phase_ended(agent, migration, name, began, time.monotonic())


def phase_ended(agent: Agent, migration: str, name: str, began: float, ended: float) -> None:
    """Report the end of a phase; both times are in time.monotonic()."""
    agent.event("migration_phase", migration=migration, phase=name, began=began, ended=ended)


def workspace(agent: Agent, migration: str, side: str) -> Path:
    """Create the folder of one end of a migration on the host's tmpfs, with `images/` and `work/` in it."""
    folder = agent.root / "migrate" / f"{migration}.{side}"
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("images", "work"):
        (folder / name).mkdir(parents=True)
    return folder


@contextlib.contextmanager
def collect(problems: list[str]) -> Iterator[None]:
    """Note an error instead of raising it, so that the remaining steps of a roll-back or clean-up are tried."""
    try:
        with blame():
            yield
    except OperationError as error:
        problems.append(error.message)


def keep_logs(agent: Agent, folder: Path) -> None:
    """Remove the folder, because images on a tmpfs take memory; keep CRIU's logs for the report."""
    logs = agent.root / "migrate" / f"{folder.name}.logs"
    logs.mkdir(parents=True, exist_ok=True)
    for entry in os.scandir(folder / "work"):
        if entry.name.endswith((".log", ".err")) and entry.is_file():
            with contextlib.suppress(OSError):
                shutil.move(entry.path, logs / entry.name)
    shutil.rmtree(folder, ignore_errors=True)
