"""What a user may write in a topology file: one pydantic model per section, which rejects unknown keys.

The models check each value by itself; what depends on other values (does this host exist?) is in `checks`.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from testbed.topology.units import Duration, Fraction, Moment

NAME_PATTERN: Final = r"^[A-Za-z][A-Za-z0-9_]*$"
LONGEST_NODE_NAME: Final = 9
"""Most characters in a node's name: its interfaces are named `<node>-eth<n>`, Linux allows 15 characters (IFNAMSIZ −
1), and ports go up to 99."""
LONGEST_NAME: Final = 40


def _name(value: str, longest: int, why: str) -> str:
    if not re.match(NAME_PATTERN, value):
        raise PydanticCustomError("name", "invalid name; allowed: a letter followed by letters, digits or _", {})
    if len(value) > longest:
        raise PydanticCustomError("name", f"too long ({len(value)} characters); allowed: up to {longest}{why}", {})
    return value


def _node_name(value: str) -> str:
    return _name(
        value, LONGEST_NODE_NAME, ", because interfaces are named after it (h1-eth0) and Linux limits them to 15"
    )


def _ipv4(value: Any) -> str:
    try:
        return str(ipaddress.IPv4Address(value if isinstance(value, str) else ""))
    except ValueError:
        raise PydanticCustomError("ipv4", "invalid IPv4 address; allowed: four numbers such as 10.0.0.1", {}) from None


def _subnet(value: Any) -> str:
    try:
        network = ipaddress.IPv4Network(value if isinstance(value, str) else "")
    except ValueError as error:
        raise PydanticCustomError("subnet", "invalid IPv4 network: {why}", {"why": str(error)}) from None
    if not 8 <= network.prefixlen <= 29:
        raise PydanticCustomError("subnet", "prefix length out of range; allowed: /8 to /29", {})
    return str(network)


NodeName = Annotated[str, AfterValidator(_node_name)]
Name = Annotated[str, AfterValidator(lambda value: _name(value, LONGEST_NAME, ""))]
IPv4 = Annotated[str, BeforeValidator(_ipv4), WithJsonSchema({"type": "string", "format": "ipv4"})]
Subnet = Annotated[str, BeforeValidator(_subnet), WithJsonSchema({"type": "string", "examples": ["10.0.0.0/16"]})]


class Section(BaseModel):
    """Base of all sections: strict types, no unknown keys, read-only once parsed."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _empty(cls, value: Any) -> Any:
        # `h3:` with nothing after it is the same as `h3: {}`.
        return {} if value is None else value


class Impair(Section):
    """Seeded impairment of the frames that a NIC's port sends."""

    loss: Fraction = 0.0
    reorder: Fraction = 0.0
    duplicate: Fraction = 0.0
    corrupt: Fraction = 0.0
    delay: Duration = 0.0


class Nic(Section):
    """Options of a host's emulated RDMA NIC."""

    mtu: Literal[256, 512, 1024, 2048, 4096] | None = None
    """Active path MTU in bytes of payload. Default: the largest that every link of the topology can carry."""
    migros: bool = True
    """If false, a stock RoCEv2 NIC that sends exactly what the Linux driver sends; its programs cannot be migrated."""
    impair: Impair = Impair()
    capture: bool | None = None
    """Write a pcap of this NIC's frames. Default: the topology's `capture`."""
    trace: bool | None = None
    """Trace this NIC's queue pairs (docs/trace.md). Default: the topology's `trace`."""


class Host(Section):
    """A virtual host with one emulated RDMA NIC."""

    ip: IPv4 | None = None
    """The host's RoCE address (GID). Default: the next free address of `subnet`."""
    nic: Nic = Nic()


class Link(Section):
    """A cable between a host and a switch, or between two switches. May be written as a plain pair: `[h1, s1]`."""

    ends: Annotated[list[str], Field(min_length=2, max_length=2)]
    bw: Annotated[float, Field(gt=0, le=400_000)] | None = None
    """Bandwidth in Mbit/s in each direction. Default: not limited."""
    mtu: Annotated[int, Field(ge=576, le=9600)] = 9000
    """Largest IP packet in bytes."""
    delay: Duration = 0.0
    """One-way delay of every packet."""
    loss: Fraction = 0.0

    @model_validator(mode="before")
    @classmethod
    def _pair(cls, value: Any) -> Any:
        return {"ends": value} if isinstance(value, list) else value


class App(Section):
    """One unmodified program on one host."""

    host: str
    command: Annotated[str, Field(min_length=1)]
    """Command line, split into words as by a shell but run without one. `{server.ip}` is the address of the app or host
    `server`, `{server.ip6}` its IPv6 address."""
    after: list[str] = []
    """Apps that must be running (and listening, if they are servers) before this one starts."""
    env: dict[str, str] = {}
    check: Literal["exit", "data"] | None = None
    """`data`: the program verifies the data it receives, and the result counts. `exit`: only its exit code counts.
    Default: `data` if the command line is known to request verification (ibv_rc_pingpong -c), else `exit`."""
    expect: Annotated[int, Field(ge=0, le=255)] = 0
    """Exit code that means success."""
    timeout: Duration = 120.0
    """Time after which the program is killed and counts as failed."""
    address: IPv4 | None = None
    """An address for this app alone, which moves with it without affecting other programs on its host."""

    @model_validator(mode="before")
    @classmethod
    def _lists(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("after"), str):
            return {**value, "after": [value["after"]]}
        return value


class Migration(Section):
    """One move of a running program."""

    app: str
    to: str
    """Host that the app moves to."""
    at: Moment
    """When to migrate: a time after the program's start (`2s`), or an amount of data sent and received (`64MiB`)."""
    address: Literal["keep", "change"] = "keep"
    """keep: the address moves with the app. change: the app takes the destination's, and peers learn it from RESUME."""


class Report(Section):
    """Optional parts of the report."""

    plots: bool = True
    """Draw the timeline of the run's migrations as a picture next to the summary."""
    tail: Annotated[int, Field(ge=0, le=200)] = 3
    """Number of lines to show from the end of each program's output."""


class Topology(Section):
    """A complete topology file."""

    name: Name
    description: str = ""
    subnet: Subnet = "10.0.0.0/16"
    """Data network; automatic addresses are taken from it."""
    controller: Literal["auto", "ryu", "os-ken"] = "auto"
    """OpenFlow controller framework. `auto`: Ryu if it is installed, else os-ken."""
    hosts: Annotated[dict[NodeName, Host], Field(min_length=1)]
    switches: Annotated[list[NodeName], Field(min_length=1)]
    links: Annotated[list[Link], Field(min_length=1)]
    apps: dict[Name, App] = {}
    migrations: list[Migration] = []
    report: Report = Report()
    capture: bool = False
    """Write a pcap per NIC for the whole run (migrations are always captured)."""
    trace: bool = False
    """Trace every queue pair for the whole run, one JSON lines file per NIC (docs/trace.md). Slows the NICs down."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of every random choice of the run, such as impairments and initial PSNs."""
