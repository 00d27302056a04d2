"""The resolved form of a topology: plain frozen dataclasses with every automatic value filled in.

Nodes are numbered from 1 in the order of the file: host k has node address 100.64.0.k, management address 100.65.0.k,
MAC 02:00:00:00:00:kk and number base k (the range of QPNs, keys and context ids that only its NIC allocates, so that
they are free wherever a program migrates to); switch k has datapath id k. The same file always gives the same numbers.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from softroce_ext.wire.headers import HEADER_ALLOWANCE, MTU_BYTES
from testbed.base import ip6
from testbed.topology.models import Host, Link, Report, Topology

NODE_NETWORK: Final = ipaddress.IPv4Network("100.64.0.0/16")
"""Network of the hosts' permanent addresses on the data network, used for bulk transfer; they are never GIDs."""
MANAGEMENT_NETWORK: Final = ipaddress.IPv4Network("100.65.0.0/16")
"""A separate network for SSH; .255.254 is the machine's end of it."""
MANAGEMENT_ROOT: Final = "100.65.255.254"
PLACEHOLDER: Final = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


@dataclass(frozen=True, slots=True)
class ResolvedNic:
    """Options of `python -m softroce_ext` for one host."""

    mtu: int
    """Largest payload of a packet in bytes, 256 to 4096."""
    migros: bool
    impair: dict[str, float]
    """loss, reorder, duplicate, corrupt (fractions) and delay (seconds); values of 0 are left out."""
    capture: bool
    trace: bool

    @property
    def interface_mtu(self) -> int:
        """The interface MTU from which the NIC derives `mtu`."""
        return self.mtu + HEADER_ALLOWANCE


@dataclass(frozen=True, slots=True)
class ResolvedHost:
    """One virtual host with all of its addresses and names."""

    name: str
    index: int
    """Number of the host, from 1 in the order of the file."""
    ip: str
    prefix: int
    """Prefix length of `ip` and of the addresses of apps."""
    node_ip: str
    mgmt_ip: str
    mac: str
    """MAC address of the data interface."""
    number_base: int
    interface: str
    """Name of the data interface inside the host."""
    switch: str
    """The switch that the host is attached to."""
    nic: ResolvedNic


@dataclass(frozen=True, slots=True)
class ResolvedSwitch:
    """One Open vSwitch bridge."""

    name: str
    dpid: int


@dataclass(frozen=True, slots=True)
class ResolvedLink:
    """One cable. If one of its ends is a host, that end is `a`."""

    a: str
    b: str
    bw: float | None
    """Bandwidth in Mbit/s in each direction; None if it is not limited."""
    mtu: int
    delay: float
    """One-way delay in seconds."""
    loss: float
    """Fraction of packets lost, 0 ≤ loss < 1."""


@dataclass(frozen=True, slots=True)
class ResolvedApp:
    """One program with its complete command line."""

    name: str
    host: str
    command: str
    """The command in the file, with its placeholders filled in."""
    argv: tuple[str, ...]
    after: tuple[str, ...]
    env: dict[str, str]
    check: str
    """`exit` or `data`, as in the topology file."""
    expect: int
    timeout: float
    """Timeout in seconds."""
    address: str
    """Address of the program when it starts: the app's, or its host's."""
    own_address: bool
    """Whether the address belongs to this program alone; it is then added to the host before the program starts."""


@dataclass(frozen=True, slots=True)
class ResolvedMigration:
    """One migration. Exactly one of `at_seconds` and `at_bytes` is set."""

    index: int
    """Position in the file's list, from 0."""
    app: str
    source: str
    """Host that the program is on by then (its first host, or the destination of its previous migration)."""
    to: str
    at_seconds: float | None
    at_bytes: int | None
    address: str
    """`keep` or `change`, as in the topology file."""
    ip_before: str
    ip_after: str


@dataclass(frozen=True, slots=True)
class ResolvedTopology:
    """A complete topology with every value resolved, which the rest of the testbed works with."""

    name: str
    description: str
    seed: int
    controller: str
    """`auto`, `ryu` or `os-ken`, as in the topology file."""
    subnet: str
    capture: bool
    trace: bool
    hosts: dict[str, ResolvedHost]
    switches: dict[str, ResolvedSwitch]
    links: tuple[ResolvedLink, ...]
    apps: dict[str, ResolvedApp]
    migrations: tuple[ResolvedMigration, ...]
    report: Report

    def to_plain(self) -> dict[str, Any]:
        """The topology as dicts, lists, strings and numbers, for JSON and YAML."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "report"}
        for key in ("hosts", "switches", "apps"):
            plain[key] = {name: dataclasses.asdict(value) for name, value in plain[key].items()}
        for key in ("links", "migrations"):
            plain[key] = [dataclasses.asdict(value) for value in plain[key]]
        return {**plain, "report": self.report.model_dump()}


def addresses(topology: Topology) -> dict[str, str]:
    """Host name → address: the one in the file, else the next free address of the subnet."""
    taken = {host.ip for host in topology.hosts.values()} | {app.address for app in topology.apps.values()}
    free = (str(ip) for ip in ipaddress.IPv4Network(topology.subnet).hosts() if str(ip) not in taken)
    return {name: host.ip or next(free, "") for name, host in topology.hosts.items()}


def app_addresses(topology: Topology, hosts: dict[str, str]) -> dict[str, str]:
    """App name → address of the app when it starts."""
    return {name: app.address or hosts.get(app.host, "") for name, app in topology.apps.items()}


def placeholders(command: str) -> Iterator[tuple[str, str | None]]:
    """(text, inner) of every `{inner}` in a command; inner is None for an unmatched brace. Skips `{{` and `}}`."""
    for match in PLACEHOLDER.finditer(command):
        if match[0] not in ("{{", "}}"):
            yield match[0], match[1]


def fill(command: str, known: dict[str, str]) -> str:
    """Fill in the placeholders: `ping {server.ip}` → `ping 10.0.0.2`. `known` maps names to addresses.

    `{server.ip6}` is the companion IPv6 address. Raises KeyError for an unknown name.
    """

    def replace(match: re.Match[str]) -> str:
        if match[0] in ("{{", "}}"):
            return match[0][0]
        name, _, family = match[1].rpartition(".")
        return ip6.companion(known[name]) if family == "ip6" else known[name]

    return PLACEHOLDER.sub(replace, command)


def fitting_mtu(topology: Topology) -> int:
    """The largest RDMA payload in bytes that every link can carry; 0 if not even the smallest fits."""
    room = min(link.mtu for link in topology.links) - HEADER_ALLOWANCE
    return max((mtu for mtu in MTU_BYTES.values() if mtu <= room), default=0)


def checks_data(argv: list[str]) -> bool:
    """Whether the command line is known to verify its data: ibv_*_pingpong with -c or --chk."""
    program = argv[0].rsplit("/", 1)[-1]
    if not re.fullmatch(r"ibv_\w+_pingpong", program):
        return False
    return any(word == "--chk" or re.fullmatch(r"-[a-z]*c", word) is not None for word in argv[1:])


def _host(topology: Topology, name: str, host: Host, index: int, ip: str) -> ResolvedHost:
    impair = {key: value for key, value in host.nic.impair.model_dump().items() if value}
    capture = topology.capture if host.nic.capture is None else host.nic.capture
    trace = topology.trace if host.nic.trace is None else host.nic.trace
    return ResolvedHost(
        name=name,
        index=index,
        ip=ip,
        prefix=ipaddress.IPv4Network(topology.subnet).prefixlen,
        node_ip=str(NODE_NETWORK[index]),
        mgmt_ip=str(MANAGEMENT_NETWORK[index]),
        mac=f"02:00:00:00:00:{index:02x}",
        number_base=index,
        interface=f"{name}-eth0",
        switch=next(end for link in topology.links if name in link.ends for end in link.ends if end != name),
        nic=ResolvedNic(host.nic.mtu or fitting_mtu(topology), host.nic.migros, impair, capture, trace),
    )


def _apps(topology: Topology, app_ips: dict[str, str], known: dict[str, str]) -> dict[str, ResolvedApp]:
    apps = {}
    for name, app in topology.apps.items():
        command = fill(app.command, known)
        argv = shlex.split(command)
        apps[name] = ResolvedApp(
            name=name,
            host=app.host,
            command=command,
            argv=tuple(argv),
            after=tuple(app.after),
            env=dict(app.env),
            check=app.check or ("data" if checks_data(argv) else "exit"),
            expect=app.expect,
            timeout=app.timeout,
            address=app_ips[name],
            own_address=app.address is not None,
        )
    return apps


def _migrations(topology: Topology, host_ips: dict[str, str], app_ips: dict[str, str]) -> Iterator[ResolvedMigration]:
    """Each migration starts at the host, and with the address, where the app's previous one has left it."""
    place = {name: app.host for name, app in topology.apps.items()}
    current = dict(app_ips)
    for index, migration in enumerate(topology.migrations):
        before = current[migration.app]
        after = before if migration.address == "keep" else host_ips[migration.to]
        yield ResolvedMigration(
            index=index,
            app=migration.app,
            source=place[migration.app],
            to=migration.to,
            at_seconds=migration.at if isinstance(migration.at, float) else None,
            at_bytes=migration.at if isinstance(migration.at, int) else None,
            address=migration.address,
            ip_before=before,
            ip_after=after,
        )
        place[migration.app], current[migration.app] = migration.to, after


def _link(topology: Topology, link: Link) -> ResolvedLink:
    a, b = sorted(link.ends, key=lambda end: end not in topology.hosts)
    return ResolvedLink(a, b, link.bw, link.mtu, link.delay, link.loss)


def resolve(topology: Topology) -> ResolvedTopology:
    """Return the topology with every automatic value filled in.

    `topology` must have passed `checks`, as one from `load` has: lookups are not guarded here.
    """
    host_ips = addresses(topology)
    app_ips = app_addresses(topology, host_ips)
    return ResolvedTopology(
        name=topology.name,
        description=topology.description,
        seed=topology.seed,
        controller=topology.controller,
        subnet=topology.subnet,
        capture=topology.capture,
        trace=topology.trace,
        hosts={
            name: _host(topology, name, host, index, host_ips[name])
            for index, (name, host) in enumerate(topology.hosts.items(), start=1)
        },
        switches={name: ResolvedSwitch(name, dpid) for dpid, name in enumerate(topology.switches, start=1)},
        links=tuple(_link(topology, link) for link in topology.links),
        apps=_apps(topology, app_ips, host_ips | app_ips),
        migrations=tuple(_migrations(topology, host_ips, app_ips)),
        report=topology.report,
    )
