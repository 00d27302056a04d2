"""The summary of a run: the contents of `summary.json` as pydantic models, and the published JSON schema.

These fields are stable across versions: `ok`, `migrations[].blackout_ms`, `.phases_ms`, `.app_exit_code`,
`.partner_gap_ms`, `.rolled_back`. Times are in milliseconds if the name ends in `_ms`, in seconds since the start of
the run (CLOCK_MONOTONIC) if it ends in `_s`; sizes are in bytes. A value that could not be measured is null, never 0.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from testbed.record.stats import Estimate

SUMMARY_VERSION = 1
SCHEMA_FILE = Path(__file__).resolve().parents[1] / "schema" / "summary.schema.json"

Phase = Literal[
    "prepare", "freeze", "stop", "dump_nic", "dump_process", "transfer",
    "restore_nic", "restore_process", "reroute", "resume", "thaw", "commit",
]  # fmt: skip
PHASES: tuple[Phase, ...] = get_args(Phase)
"""The phases of a migration in the order in which they start; dump_nic and dump_process overlap."""

BLACKOUT_PHASES: tuple[Phase, ...] = tuple(phase for phase in PHASES if phase not in ("prepare", "commit"))
"""The phases during which the program does not run."""


class Record(BaseModel):
    """Base of every part of the summary. Unknown fields are rejected, as they would be a defect of the testbed."""

    model_config = ConfigDict(extra="forbid")


class Problem(Record):
    """Something that went wrong, and what caused it."""

    blame: Literal["input", "run", "environment", "interrupt"] = Field(
        "run", description="cause: the topology file, a failed check of the run, this machine, or the user's Ctrl-C"
    )
    where: str = Field(description="host, application or phase, for example `h2` or `migrations[0].restore_process`")
    error: str = Field(description="what happened, one line")
    hint: str | None = Field(None, description="what the user can do about it")


class Limit(Record):
    """Something requested (or usual) that this machine cannot provide, and what was done instead."""

    wanted: str = Field(description="for example `OVS kernel datapath`")
    got: str = Field(description="for example `userspace datapath (netdev)`")
    why: str = Field("", description="for example `module openvswitch is missing`")


class Environment(Record):
    """The machine and the software of the run."""

    kernel: str = ""
    distribution: str = ""
    cpu: str = ""
    cpus: int = 0
    memory_bytes: int = 0
    python: str = ""
    packages: dict[str, str] = Field(default_factory=dict, description="Python packages: name → version")
    binaries: dict[str, str] = Field(default_factory=dict, description="programs: name → version line")
    criu: str | None = Field(None, description="version of the CRIU that was used")
    ovs: str | None = Field(None, description="version of Open vSwitch")
    datapath: str | None = Field(None, description="`kernel` or `userspace`")
    controller: str | None = Field(None, description="`ryu 4.34` or `os-ken …`")
    source: str | None = Field(None, description="git commit of the testbed, followed by `+` if files were modified")


class Capture(Record):
    """A pcap of one NIC's RoCE frames."""

    path: str = Field(description="relative to the run folder")
    frames: int | None = None
    bytes: int | None = Field(None, description="size of the file")


class Host(Record):
    """A virtual host and what its NIC counted during the run."""

    name: str
    ip: str | None = Field(None, description="host address (the GID) at the end of the run; null if it moved away")
    node_ip: str | None = Field(None, description="permanent node address, used for bulk transfer")
    nic: dict[str, int] = Field(default_factory=dict, description="the NIC's counters: name → count")
    captures: list[Capture] = Field(default_factory=list)
    trace: str | None = Field(None, description="trace of its queue pairs (JSON lines), relative to the run folder")


class App(Record):
    """An application and how it ended."""

    name: str
    host: str = Field(description="host that it was started on")
    final_host: str = Field(description="host that it ended on")
    command: list[str]
    exit_code: int | None = Field(None, description="null if it did not exit, or was ended by a signal")
    signal: int | None = None
    ok: bool = Field(description="it exited with the expected code, and its data check, if it has one, passed")
    checked: bool = Field(False, description="whether the program checked the data it received")
    duration_s: float | None = None
    longest_gap_ms: float | None = Field(None, description="longest time between two completions")
    logs: dict[str, str] = Field(default_factory=dict, description="stream → path relative to the run folder")
    measured: list[dict[str, float]] = Field(
        default_factory=list, description="measurements that a known program printed, one entry per row of its table"
    )
    tail: list[str] = Field(
        default_factory=list, description="last lines of its output, as many as the topology's report.tail says"
    )


class FlowChange(Record):
    """A flow entry that the controller added or removed; `t_s` is the time of its switch's barrier reply."""

    t_s: float
    switch: str
    action: Literal["added", "removed", "changed"]
    match: str = Field(description="for example `ipv4_dst=10.0.0.2`")
    out: str = Field("", description="for example `port 3, eth_dst=…`")
    migration: int | None = Field(None, description="index of the migration that caused it")


class Migration(Record):
    """One migration, whether it succeeded, was rolled back or failed."""

    index: int = Field(description="position in the topology's list, from 0")
    app: str
    from_host: str
    to_host: str
    address: Literal["keep", "change"] = "keep"
    at_s: float | None = Field(None, description="start, seconds from the start of the run")
    ok: bool = Field(description="the program runs (or exited) at the destination")
    rolled_back: bool = Field(description="the program continued at the source after a failure")
    error: str | None = None
    hint: str | None = None
    phases_ms: dict[Phase, float] = Field(default_factory=dict, description="length of each phase that ran")
    phases_at_ms: dict[Phase, float] = Field(default_factory=dict, description="start of each phase, relative to at_s")
    blackout_ms: float | None = Field(
        None, description="longest time without a completion at the moved application, by its NIC's clock"
    )
    blackout_from: Literal["completions", "phases"] | None = Field(
        None, description="`phases` if the application has no completions: end of thaw minus start of freeze"
    )
    partner_gap_ms: float | None = Field(None, description="longest time without a completion at a peer")
    app_exit_code: int | None = None
    image_bytes: int | None = Field(None, description="size of the CRIU images")
    nic_image_bytes: int | None = Field(None, description="size of the NIC's image")
    qps: int | None = Field(None, description="queue pairs that moved")
    nak_stopped: int | None = Field(None, description="number of NAK_STOPPED that the source NIC sent")
    resumes: int | None = Field(None, description="number of RESUME messages that the destination NIC sent")
    retransmissions: int | None = Field(None, description="packets that all NICs retransmitted during the migration")


class RunReference(Record):
    """One of the runs of `--repeat`."""

    path: str = Field(description="relative to the outer run folder")
    ok: bool
    seed: int


class Summary(Record):
    """One run, or the N runs of `--repeat N` together (`migrations[]` then has medians)."""

    version: int = SUMMARY_VERSION
    ok: bool = Field(description="every application ended as expected and every migration succeeded")
    topology: str
    run_id: str
    started: str = Field(description="UTC, ISO 8601")
    duration_s: float
    seed: int
    interrupted: bool = False
    problems: list[Problem] = Field(default_factory=list)
    limits: list[Limit] = Field(default_factory=list)
    environment: Environment = Field(default_factory=lambda: Environment.model_validate({}))
    hosts: list[Host] = Field(default_factory=list)
    apps: list[App] = Field(default_factory=list)
    migrations: list[Migration] = Field(default_factory=list)
    flow_changes: list[FlowChange] = Field(default_factory=list)
    folder: str = Field("", description="absolute path of the run folder")
    repeats: list[RunReference] = Field(default_factory=list)
    statistics: dict[str, Estimate] = Field(
        default_factory=dict, description="over the repeats: path of a field → median and 95 % bootstrap interval"
    )

    def to_json(self) -> str:
        """The summary as indented JSON with a final newline."""
        return self.model_dump_json(indent=2) + "\n"


def summary_schema() -> dict[str, Any]:
    """The JSON schema of `summary.json`, as published in `testbed/schema/summary.schema.json`."""
    schema = Summary.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def publish_schema(path: Path = SCHEMA_FILE) -> Path:
    """Write the schema file and return its path; a unit test compares the file with the models."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(summary_schema(), indent=2) + "\n")
    return path


if __name__ == "__main__":
    print(publish_schema())
