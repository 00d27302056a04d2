"""The summary of a run: what `summary.json` holds, as pydantic models, and the published JSON schema.

Fields that stay stable from version to version: `ok`, `migrations[].blackout_ms`, `.phases_ms`, `.app_exit_code`,
`.partner_gap_ms`, `.rolled_back`. Times are milliseconds where the name ends in `_ms`, seconds since the run began
(CLOCK_MONOTONIC) where it ends in `_s`; sizes are bytes. A value that could not be measured is null, never 0.
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
"""The phases of a migration in the order they begin; dump_nic and dump_process overlap."""

BLACKOUT_PHASES: tuple[Phase, ...] = tuple(phase for phase in PHASES if phase not in ("prepare", "commit"))
"""The phases during which the program does not run."""


class Record(BaseModel):
    """Base of every part of the summary: unknown fields are a mistake of ours and refused."""

    model_config = ConfigDict(extra="forbid")


class Problem(Record):
    """Something that went wrong, by blame."""

    blame: Literal["input", "run", "environment", "interrupt"] = Field(
        "run", description="whose fault: the topology file, a check of the run, this machine, or the user's Ctrl-C"
    )
    where: str = Field(description="host, application or phase, for example `h2` or `migrations[0].restore_process`")
    error: str = Field(description="what happened, one line")
    hint: str | None = Field(None, description="what the user can do about it")


class Limit(Record):
    """Something asked for (or usual) that this machine cannot give, and what was done instead."""

    wanted: str = Field(description="for example `OVS kernel datapath`")
    got: str = Field(description="for example `userspace datapath (netdev)`")
    why: str = Field("", description="for example `module openvswitch is missing`")


class Environment(Record):
    """Where the run took place."""

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
    source: str | None = Field(None, description="git commit of the testbed, `+` if the checkout was changed")


class Capture(Record):
    """A pcap of one NIC's RoCE frames."""

    path: str = Field(description="relative to the run folder")
    frames: int | None = None
    bytes: int | None = Field(None, description="size of the file")


class Host(Record):
    """A virtual host and what its NIC counted during the run."""

    name: str
    ip: str | None = Field(None, description="host address (the GID) at the end of the run; null when it moved away")
    node_ip: str | None = Field(None, description="permanent node address, used for bulk transfer")
    nic: dict[str, int] = Field(default_factory=dict, description="the NIC's counters: name → count")
    captures: list[Capture] = Field(default_factory=list)
    trace: str | None = Field(None, description="trace of its queue pairs (JSON lines), relative to the run folder")


class App(Record):
    """An application and how it ended."""

    name: str
    host: str = Field(description="where it was started")
    final_host: str = Field(description="where it ended")
    command: list[str]
    exit_code: int | None = Field(None, description="null when it did not end, or ended by a signal")
    signal: int | None = None
    ok: bool = Field(description="ended with 0 and its own data check, if it has one, passed")
    checked: bool = Field(False, description="whether the program checked the data it received")
    duration_s: float | None = None
    longest_gap_ms: float | None = Field(None, description="longest time between two completions")
    logs: dict[str, str] = Field(default_factory=dict, description="stream → path relative to the run folder")
    measured: list[dict[str, float]] = Field(
        default_factory=list, description="numbers that a known program printed, one entry per row of its table"
    )
    tail: list[str] = Field(default_factory=list, description="last lines of its output, as the topology's report.tail")


class FlowChange(Record):
    """A flow entry that the controller added or removed, when its switch confirmed it (barrier reply)."""

    t_s: float
    switch: str
    action: Literal["added", "removed", "changed"]
    match: str = Field(description="for example `ipv4_dst=10.0.0.2`")
    out: str = Field("", description="for example `port 3, eth_dst=…`")
    migration: int | None = Field(None, description="index of the migration that caused it")


class Migration(Record):
    """One migration, whether it succeeded, was rolled back or failed."""

    index: int = Field(description="place in the topology's list, from 0")
    app: str
    from_host: str
    to_host: str
    address: Literal["keep", "change"] = "keep"
    at_s: float | None = Field(None, description="start, seconds from the start of the run")
    ok: bool = Field(description="the program runs (or ended) at the destination")
    rolled_back: bool = Field(description="the program continued at the source after a failure")
    error: str | None = None
    hint: str | None = None
    phases_ms: dict[Phase, float] = Field(default_factory=dict, description="length of each phase that ran")
    phases_at_ms: dict[Phase, float] = Field(default_factory=dict, description="start of each phase after `at_s`")
    blackout_ms: float | None = Field(
        None, description="longest time without a completion at the moved application (its NIC's clock)"
    )
    blackout_from: Literal["completions", "phases"] | None = Field(
        None, description="`phases` when the application sees no completions: end of thaw minus start of freeze"
    )
    partner_gap_ms: float | None = Field(None, description="longest time without a completion at a partner")
    app_exit_code: int | None = None
    image_bytes: int | None = Field(None, description="CRIU images")
    nic_image_bytes: int | None = Field(None, description="the NIC's objects")
    qps: int | None = Field(None, description="queue pairs that moved")
    nak_stopped: int | None = Field(None, description="NAK_STOPPED sent by the source NIC")
    resumes: int | None = Field(None, description="RESUME messages sent by the destination NIC")
    retransmissions: int | None = Field(None, description="packets sent again by all NICs during the migration")


class RunReference(Record):
    """One run of a repeated one."""

    path: str = Field(description="relative to the outer run folder")
    ok: bool
    seed: int


class Summary(Record):
    """One run, or with `--repeat N` the N runs together (then `migrations[]` hold medians)."""

    version: int = SUMMARY_VERSION
    ok: bool = Field(description="every application ended well and every migration succeeded as asked")
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
        """Indented JSON with a newline at the end."""
        return self.model_dump_json(indent=2) + "\n"


def summary_schema() -> dict[str, Any]:
    """The JSON schema of `summary.json`, as published in `testbed/schema/summary.schema.json`."""
    schema = Summary.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def publish_schema(path: Path = SCHEMA_FILE) -> Path:
    """Write the schema file; a unit test compares it with the models."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(summary_schema(), indent=2) + "\n")
    return path


if __name__ == "__main__":
    print(publish_schema())
