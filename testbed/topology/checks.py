"""Checks that a schema cannot express: names must exist, the graph must be connected, addresses must be unique.

Every check takes a `View`, the valid part of the file, and yields all problems that it finds.
"""

from __future__ import annotations

import difflib
import ipaddress
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator

from softroce_ext.wire.headers import HEADER_ALLOWANCE, MTU_BYTES
from testbed.base.errors import Problem
from testbed.topology.models import App, Migration
from testbed.topology.resolved import MANAGEMENT_NETWORK, NODE_NETWORK, checks_data, placeholders
from testbed.topology.view import View

MOST_HOSTS = 255
"""Largest number of hosts: a memory region's index holds the host's number in 8 bits."""
SLOWEST_BW = 1.0
"""Lowest bandwidth in Mbit/s; below it, connection setup alone would exceed every timeout."""


def check(view: View) -> list[Problem]:
    """The problems that all checks find."""
    problems: list[Problem] = []
    for one in (_names, _link_ends, _reachability, _mtus, _addresses, _apps, _order, _commands, _migrations, _shared):
        problems += one(view)
    return problems


def _suggestion(name: str, known: Iterable[str]) -> str | None:
    known = list(known)
    near = difflib.get_close_matches(name, known, 1)
    if near:
        return f"did you mean {near[0]}?"
    return f"available: {', '.join(known)}" if known else None


def _unknown(path: str, kind: str, name: str, known: Iterable[str]) -> Problem:
    return Problem(path, f"no such {kind}", name, _suggestion(name, known))


def _names(view: View) -> Iterator[Problem]:
    """Names are unique: hosts, switches and apps share a namespace, because `{x.ip}` must be unambiguous."""
    for index, name in enumerate(view.switches):
        if name in view.hosts:
            yield Problem(f"switches[{index}]", "name is already used by a host", name)
        if name in view.switches[:index]:
            yield Problem(f"switches[{index}]", "switch is listed twice", name)
    for name in view.apps:
        if name in view.hosts or name in view.switches:
            kind = "host" if name in view.hosts else "switch"
            hint = f"rename the app or the {kind}: {{{name}.ip}} would be ambiguous"
            yield Problem(f"apps.{name}", f"name is already used by a {kind}", name, hint)
    if len(view.hosts) > MOST_HOSTS:
        yield Problem("hosts", f"too many hosts; allowed: up to {MOST_HOSTS}", str(len(view.hosts)))


def _link_ends(view: View) -> Iterator[Problem]:
    """Both ends of a link exist and differ, and a host is attached to at most one switch."""
    nodes = [*view.hosts, *view.switches]
    attached: dict[str, int] = {}
    pairs: dict[frozenset[str], int] = {}
    for index, link in view.links:
        known = True
        for position, end in enumerate(link.ends):
            if end not in nodes:
                known = False
                yield _unknown(f"links[{index}].ends[{position}]", "host or switch", end, nodes)
        a, b = link.ends
        if a == b:
            yield Problem(f"links[{index}]", "both ends are the same node", a)
            continue
        if known and a in view.hosts and b in view.hosts:
            yield Problem(f"links[{index}]", "connects two hosts directly", f"{a}, {b}", "put a switch between them")
            continue
        first = pairs.setdefault(frozenset(link.ends), index)
        if first != index:
            yield Problem(f"links[{index}]", f"duplicates links[{first}]", f"{a}, {b}")
            continue
        for end in link.ends:
            if end in view.hosts and attached.setdefault(end, index) != index:
                yield Problem(
                    f"links[{index}]",
                    f"host {end} already has a link (links[{attached[end]}]); allowed: one link per host",
                )
        if link.bw is not None and link.bw < SLOWEST_BW:
            yield Problem(
                f"links[{index}].bw",
                f"too slow; allowed: {SLOWEST_BW:g} Mbit/s or more",
                f"{link.bw:g}",
                "bw is in Mbit/s: 10000 is 10 Gbit/s",
            )


def _reachability(view: View) -> Iterator[Problem]:
    """Every host and switch can reach every other."""
    if not view.whole or not view.hosts:
        return
    neighbours: dict[str, set[str]] = {name: set() for name in (*view.hosts, *view.switches)}
    for _, link in view.links:
        a, b = link.ends
        if a not in neighbours or b not in neighbours:
            return
        neighbours[a].add(b)
        neighbours[b].add(a)
    start = max(view.switches or neighbours, key=lambda name: len(neighbours[name]))
    seen, todo = {start}, [start]
    while todo:
        for name in neighbours[todo.pop()] - seen:
            seen.add(name)
            todo.append(name)
    for name in neighbours:
        if name not in seen:
            path = f"hosts.{name}" if name in view.hosts else f"switches[{view.switches.index(name)}]"
            message = "has no link" if not neighbours[name] else "is not connected to the rest of the network"
            yield Problem(path, message, hint=f"add a link, for example [{name}, {start}]")


def _mtus(view: View) -> Iterator[Problem]:
    """Payload plus headers fit every link, since a rerouted path may use any of them."""
    if not view.links:
        return
    index, tightest = min(view.links, key=lambda item: item[1].mtu)
    room = tightest.mtu - HEADER_ALLOWANCE
    for name, host in view.hosts.items():
        if host.nic.mtu is not None and host.nic.mtu > room:
            fitting = [mtu for mtu in MTU_BYTES.values() if mtu <= room]
            yield Problem(
                f"hosts.{name}.nic.mtu",
                f"payload and {HEADER_ALLOWANCE} bytes of headers exceed the mtu of links[{index}] ({tightest.mtu})",
                str(host.nic.mtu),
                f"set the mtu of all links to {host.nic.mtu + HEADER_ALLOWANCE} or more, or that of the NIC to one of: "
                f"{', '.join(map(str, fitting))}",
            )


def _addresses(view: View) -> Iterator[Problem]:
    """Addresses are inside the subnet, not reserved and unique, and the subnet has enough of them."""
    owners: dict[str, str] = {}
    given = [(f"hosts.{name}.ip", host.ip) for name, host in view.hosts.items()]
    given += [(f"apps.{name}.address", app.address) for name, app in view.apps.items()]
    for network in (NODE_NETWORK, MANAGEMENT_NETWORK):
        if view.subnet.overlaps(network):
            yield Problem("subnet", f"overlaps {network}, which is reserved for the testbed", str(view.subnet))
    for path, text in given:
        if text is None:
            continue
        ip = ipaddress.IPv4Address(text)
        if ip not in view.subnet:
            wider = ipaddress.IPv4Network(f"{text}/24", strict=False)
            yield Problem(path, f"is outside the data network {view.subnet}", text, f"change subnet, e.g. to {wider}")
        elif ip in (view.subnet.network_address, view.subnet.broadcast_address):
            yield Problem(path, f"is the network or broadcast address of {view.subnet}", text)
        if owners.setdefault(text, path) != path:
            yield Problem(path, f"is already used by {owners[text]}; addresses must be unique", text)
    wanted = len(view.hosts) + sum(app.address is not None for app in view.apps.values())
    if wanted > view.subnet.num_addresses - 2:
        yield Problem("subnet", f"too small for {wanted} addresses", str(view.subnet))


def _apps(view: View) -> Iterator[Problem]:
    """An app's host and predecessors exist, and it leaves the testbed's environment variables alone."""
    apps = [*view.apps, *view.unreadable]
    for name, app in view.apps.items():
        if app.host not in view.hosts:
            yield _unknown(f"apps.{name}.host", "host", app.host, view.hosts)
        for position, other in enumerate(app.after):
            path = f"apps.{name}.after" + (f"[{position}]" if len(app.after) > 1 else "")
            if other == name:
                yield Problem(path, "an app cannot wait for itself", other)
            elif other not in apps:
                yield _unknown(path, "app", other, [other for other in apps if other != name])
        for key in app.env:
            if key in ("LD_PRELOAD", "SYSFS_PATH", "SOFTROCE_RUN"):
                yield Problem(f"apps.{name}.env.{key}", "is reserved: the testbed sets it to point the app to its NIC")


def _order(view: View) -> Iterator[Problem]:
    """The `after` entries have no cycle. Each cycle is reported once, at its first app in the file."""
    done: set[str] = set()
    for first in view.apps:
        trail: list[str] = []

        def visit(name: str, trail: list[str] = trail) -> list[str] | None:
            if name in trail:
                return [*trail[trail.index(name) :], name]
            if name in done or name not in view.apps:
                return None
            trail.append(name)
            for other in view.apps[name].after:
                if other != name and (cycle := visit(other)):
                    return cycle
            trail.pop()
            done.add(name)
            return None

        cycle = visit(first)
        if cycle:
            done.update(cycle)
            yield Problem(
                f"apps.{cycle[0]}.after",
                "circular dependency: " + " → ".join(cycle),
                hint="each app waits for the next one; remove one of these entries",
            )


def _commands(view: View) -> Iterator[Problem]:
    """Commands can be split into words, need no shell, and refer to existing names in their placeholders."""
    known = [*view.apps, *view.hosts, *view.unreadable]
    for name, app in view.apps.items():
        path = f"apps.{name}.command"
        try:
            words = shlex.split(app.command)
        except ValueError as error:
            yield Problem(path, f"cannot be split into words: {error}", repr(app.command))
            continue
        if not words:
            yield Problem(path, "must not be empty", repr(app.command))
            continue
        for text, inner in placeholders(app.command):
            target, _, attribute = (inner or "").partition(".")
            if inner is None:
                hint = "write {{ or }} for a literal brace, {server.ip} for an address"
                yield Problem(path, "unmatched brace", text, hint)
            elif attribute not in ("ip", "ip6"):
                near = _suggestion(target, known) if target not in known else f"write {{{target}.ip}}"
                yield Problem(path, "unknown placeholder; allowed: {<app or host>.ip}, {<app or host>.ip6}", text, near)
            elif target not in known:
                yield Problem(path, "placeholder refers to no app or host", text, _suggestion(target, known))
        shell = next((word for word in words if word in ("|", "&&", "||", ";", ">", "<", "&", ">>")), None)
        if shell is not None:
            hint = "wrap the command in sh -c '…', or split it into two apps with `after`"
            yield Problem(path, "not supported: commands run without a shell", shell, hint)
        if app.check == "data" and words[0].startswith("ibv_") and not checks_data(words):
            message = "the command does not turn on the program's data check"
            yield Problem(f"apps.{name}.check", message, "data", "add -c to the command")


def _migrations(view: View) -> Iterator[Problem]:
    """A migration's app and host exist, it goes to another host, and NICs, times and addresses allow it."""
    place = {name: app.host for name, app in view.apps.items()}
    latest: dict[tuple[str, type], tuple[int, float]] = {}
    for index, migration in view.migrations:
        path = f"migrations[{index}]"
        app = view.apps.get(migration.app)
        if app is None and migration.app not in view.unreadable:
            yield _unknown(f"{path}.app", "app", migration.app, view.apps)
        if migration.to not in view.hosts:
            yield _unknown(f"{path}.to", "host", migration.to, view.hosts)
        elif app is not None and app.host in view.hosts:
            order = (migration.app, type(migration.at))
            yield from _destination(view, path, migration, place[migration.app])
            yield from _moment(path, migration, app, latest.get(order))
            yield from _follows(path, migration, app)
            latest[order] = (index, migration.at)
            place[migration.app] = migration.to


def _destination(view: View, path: str, migration: Migration, source: str) -> Iterator[Problem]:
    """The migration leads from `source` to another host, and both hosts' NICs support MigrOS."""
    if migration.to == source:
        others = [name for name in view.hosts if name != source]
        hint = f"choose another host: {', '.join(others)}" if others else "add a host to the topology"
        yield Problem(f"{path}.to", f"{migration.app} is already on this host", source, hint)
    for host in dict.fromkeys((source, migration.to)):
        if not view.hosts[host].nic.migros:
            message = f"the NIC of {host} does not support MigrOS (hosts.{host}.nic.migros is false)"
            yield Problem(path, message, migration.app)


def _moment(path: str, migration: Migration, app: App, before: tuple[int, float] | None) -> Iterator[Problem]:
    """The migration is due while the app runs and after `before`, the (index, `at`) of the app's last migration."""
    at = migration.at
    if isinstance(at, float) and at >= app.timeout:
        yield Problem(f"{path}.at", f"must be before the app's timeout ({app.timeout:g} s)", f"{at:g} s")
    if before is not None and at <= before[1]:
        value = f"{at} B" if isinstance(at, int) else f"{at:g} s"
        yield Problem(f"{path}.at", f"must be after migrations[{before[0]}] of the same app", value)


def _follows(path: str, migration: Migration, app: App) -> Iterator[Problem]:
    """The app's connections survive a change of its address."""
    if migration.address == "change" and _keeps_tcp(app.command):
        yield Problem(
            f"{path}.address",
            "perftest keeps a TCP connection open, which cannot survive a change of address",
            "change",
            f"use address: keep; if other apps share its host, also set apps.{migration.app}.address",
        )


def _keeps_tcp(command: str) -> bool:
    """Whether the command is of perftest, which exchanges parameters over TCP and keeps that connection open."""
    try:
        words = shlex.split(command)
    except ValueError:
        return False
    return bool(words) and words[0].rsplit("/", 1)[-1].startswith("ib_")


def _shared(view: View) -> Iterator[Problem]:
    """An address that moves belongs to the moving app alone, since other apps' connections would lose it."""
    users = Counter(app.host for app in view.apps.values() if app.address is None)
    for index, migration in view.migrations:
        app = view.apps.get(migration.app)
        if app is None or app.address is not None or migration.address != "keep" or users[app.host] < 2:
            continue
        others = [
            name
            for name, other in view.apps.items()
            if other.host == app.host and other.address is None and name != migration.app
        ]
        yield Problem(
            f"migrations[{index}].address",
            f"would take the address of {app.host} away from {', '.join(others)}",
            "keep",
            f"set apps.{migration.app}.address, or use address: change",
        )
