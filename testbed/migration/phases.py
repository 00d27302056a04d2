"""The phases of a migration as one table: who does what, and how it is undone. docs/migration.md shows it."""

from __future__ import annotations

from typing import Final, NamedTuple

from testbed.record.summary import Phase


class PhaseRow(NamedTuple):
    """One phase."""

    name: Phase
    who: str
    """The ends that do it."""
    what: str
    undo: str
    """What takes it back; empty: nothing to take back, or no way back."""


TABLE: Final = (
    PhaseRow(
        "prepare",
        "both agents, controller",
        "CRIU is checked at both ends; at the destination `criu restore` is started and waits, and a receiver "
        "listens; the flows of the new path are installed below those in force",
        "abort at the destination, withdraw the flows",
    ),
    PhaseRow("freeze", "source", "CRIU seizes the process tree", "CRIU resumes it"),
    PhaseRow(
        "stop",
        "source",
        "the NIC serves what was posted and stops the queue pairs; peers that send get NAK_STOPPED",
        "RESUME from the source",
    ),
    PhaseRow("dump_nic", "source", "objects and queues go to one file, while `dump_process` is in progress", ""),
    PhaseRow("dump_process", "source", "memory, descriptors and TCP sockets go to CRIU's images", ""),
    PhaseRow(
        "transfer",
        "source → destination",
        "images, the NIC's file and the program's folder cross the data network between node addresses",
        "remove the files",
    ),
    PhaseRow(
        "restore_nic",
        "destination",
        "the objects are made with the same handles, QPNs and keys, queue pairs Stopped; the address is added",
        "discard the objects, remove the address",
    ),
    PhaseRow(
        "restore_process",
        "destination",
        "`criu restore` continues until the program is complete and frozen",
        "CRIU kills it",
    ),
    PhaseRow(
        "reroute",
        "controller",
        "the flows lead to the destination, confirmed by barriers and by the datapath",
        "lead the flows back",
    ),
    PhaseRow(
        "resume",
        "destination",
        "the NIC learns the new pids, sends RESUME and waits (3 s at most) for the acknowledgement of every peer",
        "**no way back from here**: peers were answered from the destination",
    ),
    PhaseRow("thaw", "destination", "the program runs", ""),
    PhaseRow(
        "commit",
        "source",
        "CRIU kills the frozen original; its objects, address, firewall lock and images are removed",
        "",
    ),
)
"""In the order in which the phases begin."""
