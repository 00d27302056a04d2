"""The report of a run, for a terminal of 80 columns or more: what happened, how long it took, where the files are.

Colour only repeats what the words and shapes already say, so the report reads the same through a pipe (where rich drops
the colours, unless FORCE_COLOR=1 is set) and for a colour-blind reader.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TextIO

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.rule import Rule
from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text

from testbed.record.summary import BLACKOUT_PHASES, PHASES, App, Host, Migration, Summary
from testbed.view import text

GOOD, BAD, NOTE, DIM = "green", "bold red", "yellow", "dim"


class Bar:
    """A bar from `start` to `end` of `whole` (any unit), scaled to its column and at least one cell long.

    It is solid while the program is frozen and shaded otherwise (`#` and `-` on a terminal without block characters).
    """

    def __init__(self, start: float, end: float, whole: float, *, solid: bool) -> None:
        self.start, self.end, self.whole, self.solid = start, end, whole, solid

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        if self.whole <= 0 or width <= 0:
            return
        first = min(int(self.start / self.whole * width), width - 1)
        last = min(max(round(self.end / self.whole * width), first + 1), width)
        solid, shaded = ("#", "-") if options.ascii_only else ("█", "░")
        yield Segment(" " * first)
        yield Segment((solid if self.solid else shaded) * (last - first), Style.parse("blue" if self.solid else DIM))
        yield Segment(" " * (width - last))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(8, options.max_width)


def render(summary: Summary) -> RenderableType:
    """The whole report as a rich renderable."""
    return Group(*_parts(summary))


def print_report(summary: Summary, stream: TextIO | None = None, *, width: int | None = None) -> None:
    """Print the report to `stream` (default: standard output), `width` columns wide (default: the terminal, or 80)."""
    console = Console(file=stream, width=width, highlight=False, markup=False, emoji=False)
    if console.is_terminal:
        console.print(render(summary))
        return
    if width is None and "COLUMNS" not in os.environ:
        console.width = 80
    with console.capture() as capture:
        console.print(render(summary))
    console.file.write("".join(line.rstrip() + "\n" for line in capture.get().splitlines()))


def _parts(summary: Summary) -> Iterator[RenderableType]:
    yield _headline(summary)
    if summary.repeats:
        yield from _section("Repeats", _repeats(summary))
    for migration in summary.migrations:
        yield from _migration(migration, len(summary.migrations), repeated=len(summary.repeats))
    if summary.statistics:
        yield from _section("Medians with 95 % bootstrap intervals", _statistics(summary))
    if summary.apps:
        yield from _section("Applications", _apps(summary.apps))
    if any(app.tail for app in summary.apps):
        yield from _section("Last lines of output", _tails(summary.apps))
    if summary.hosts:
        yield from _section("NICs, whole run", _nics(summary.hosts))
    if summary.flow_changes:
        yield from _section("Flow changes, as confirmed by the switches", _flows(summary))
    if summary.limits:
        yield from _section("Not available on this machine", _limits(summary))
    if summary.problems:
        yield from _section("Problems", _problems(summary))
    yield from _section("Files", _files(summary))


def _section(title: str, body: RenderableType) -> Iterator[RenderableType]:
    yield Text()
    yield Text(title, style="bold")
    yield Padding(body, (0, 0, 0, 2))


def _table(*columns: str, header: bool = True) -> Table:
    """A table without lines. A column whose name ends in `>` is right-aligned; one that ends in `*` may wrap."""
    table = Table(box=None, show_header=header, header_style=DIM, pad_edge=False, expand=False, padding=(0, 2, 0, 0))
    for column in columns:
        right, wide = column.endswith(">"), column.endswith("*")
        table.add_column(
            column.rstrip(">*"), justify="right" if right else "left", no_wrap=not wide, ratio=None, overflow="fold"
        )
    return table


def _verdict(ok: bool, good: str = "ok", bad: str = "FAILED") -> Text:
    return Text(good, style=GOOD) if ok else Text(bad, style=BAD)


def _headline(summary: Summary) -> RenderableType:
    word = "INTERRUPTED" if summary.interrupted else "FAILED"
    title = Text.assemble((summary.topology, "bold"), " · ", _verdict(summary.ok, bad=word))
    machine = summary.environment
    run = f"{summary.started} · {summary.duration_s:.1f} s · seed {summary.seed}"
    facts = [
        machine.kernel and f"Linux {machine.kernel}",
        machine.cpus and _plural(machine.cpus, "CPU"),
        machine.criu and f"CRIU {machine.criu}",
        machine.ovs and f"OVS {machine.ovs}" + (f" ({machine.datapath})" if machine.datapath else ""),
        machine.controller,
    ]
    return Group(
        Rule(title, align="left", characters="─", style=GOOD if summary.ok else BAD),
        Text("\n".join(line for line in (run, " · ".join(fact for fact in facts if fact)) if line), style=DIM),
    )


# ---- migrations ------------------------------------------------------------------------------------------------------


def _migration(migration: Migration, total: int, *, repeated: int) -> Iterator[RenderableType]:
    outcome = _verdict(migration.ok, bad="FAILED, rolled back" if migration.rolled_back else "FAILED")
    number = f"Migration {migration.index + 1}" + (f" of {total}" if total > 1 else "")
    kept = "address kept" if migration.address == "keep" else "address changed"
    head = Text.assemble(
        (f"{number}: {migration.app} {migration.from_host} → {migration.to_host}", "bold"), f", {kept} · ", outcome
    )
    if repeated:
        head.append(f" · medians of {repeated} runs", style=DIM)
    yield Text()
    yield head
    if migration.error:
        hint = f"\nhint: {migration.hint}" if migration.hint else ""
        yield Padding(Text.assemble((migration.error, BAD), hint), (0, 0, 0, 2))
    if migration.phases_ms:
        yield Padding(_timeline(migration), (0, 0, 1, 2))
    yield Padding(_measured(migration), (0, 0, 0, 2))


def _timeline(migration: Migration) -> Table:
    """One row per phase: its start and duration in ms, and a bar on the common time axis."""
    starts = dict(migration.phases_at_ms)
    moment = 0.0
    for phase in PHASES:  # If the run did not record the starts, one follows the other.
        if phase in migration.phases_ms:
            moment = starts.setdefault(phase, moment) + migration.phases_ms[phase]
    whole = max(starts[phase] + length for phase, length in migration.phases_ms.items())
    table = Table(box=None, header_style=DIM, pad_edge=False, expand=True, padding=(0, 2, 0, 0))
    table.add_column("phase", no_wrap=True)
    table.add_column("at ms", justify="right", no_wrap=True)
    table.add_column("took ms", justify="right", no_wrap=True)
    table.add_column(f"0 to {whole:,.0f} ms; solid: program is frozen", ratio=1, no_wrap=True)
    for phase in PHASES:
        if phase not in migration.phases_ms:
            continue
        start, length = starts[phase], migration.phases_ms[phase]
        bar = Bar(start, start + length, whole, solid=phase in BLACKOUT_PHASES)
        table.add_row(phase, f"{start:,.1f}", f"{length:,.1f}", bar)
    return table


def _measured(migration: Migration) -> Table:
    table = _table("", "*", header=False)
    if migration.blackout_ms is not None:
        source = "freeze to thaw" if migration.blackout_from == "phases" else "longest gap between completions"
        table.add_row(
            "blackout",
            Text.assemble((f"{text.ms(migration.blackout_ms)} ms", "bold"), f" at the application ({source})"),
        )
    if migration.partner_gap_ms is not None:
        table.add_row(
            "",
            Text.assemble(
                (f"{text.ms(migration.partner_gap_ms)} ms", "bold"), " at the peer (longest gap between completions)"
            ),
        )
    moved = [
        migration.image_bytes is not None and f"{text.size(migration.image_bytes)} process image",
        migration.nic_image_bytes is not None and f"{text.size(migration.nic_image_bytes)} NIC image",
        migration.qps is not None and _plural(migration.qps, "queue pair"),
    ]
    if any(moved):
        table.add_row("moved", ", ".join(part for part in moved if part))
    wire = [
        migration.nak_stopped is not None and f"{text.count(migration.nak_stopped)} NAK_STOPPED",
        migration.resumes is not None and f"{text.count(migration.resumes)} RESUME",
        migration.retransmissions is not None and f"{text.count(migration.retransmissions)} packets retransmitted",
    ]
    if any(wire):
        table.add_row("on the wire", ", ".join(part for part in wire if part))
    code = "still running, or ended by a signal" if migration.app_exit_code is None else str(migration.app_exit_code)
    table.add_row("exit code", code)
    return table


# ---- the other sections ----------------------------------------------------------------------------------------------


def _apps(apps: Iterable[App]) -> Table:
    table = _table("name", "host", "ended", "data", "ran s>", "longest gap ms>", "")
    for app in apps:
        place = app.host if app.host == app.final_host else f"{app.host} → {app.final_host}"
        if app.signal is not None:
            ended = f"signal {app.signal}"
        else:
            ended = "no" if app.exit_code is None else f"code {app.exit_code}"
        table.add_row(
            app.name, place, ended, "checked" if app.checked else "not checked",
            text.seconds(app.duration_s), text.ms(app.longest_gap_ms), _verdict(app.ok),
        )  # fmt: skip
    return table


def _tails(apps: Iterable[App]) -> Table:
    """The output of programs, shown literally (it is not markup) but with control characters replaced."""
    table = _table("", "*", header=False)
    for app in apps:
        for number, words in enumerate(app.tail):
            printable = "".join(letter if letter.isprintable() else "·" for letter in words.expandtabs())
            table.add_row(Text("" if number else app.name, style=DIM), Text(printable))
    return table


def _nics(hosts: Iterable[Host]) -> Table:
    table = Table(box=None, header_style=DIM, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("host\n", no_wrap=True)
    for heading in (
        "packets\nsent",
        "\nreceived",
        "bytes\nsent",
        "\nreceived",
        "retrans-\nmitted",
        "NAK_ST.\nsent/rcvd",
        "RESUME\nsent/rcvd",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for host in hosts:

        def counted(name: str, nic: dict[str, int] = host.nic) -> int | None:
            # A NIC lists only the counters that it has incremented; the others are 0.
            return nic.get(name, 0) if nic else None

        def pair(name: str, counted: Callable[[str], int | None] = counted) -> str:
            return "/".join(text.count(counted(f"{direction}_{name}")) for direction in ("sent", "rcvd"))

        table.add_row(
            host.name,
            text.count(counted("tx_packets")), text.count(counted("rx_packets")),
            text.size(counted("tx_bytes")), text.size(counted("rx_bytes")),
            text.count(counted("retransmits")), pair("nak_stopped"), pair("resume"),
        )  # fmt: skip
    return table


def _flows(summary: Summary) -> Table:
    table = _table("at s>", "switch", "", "match", "output*")
    for change in summary.flow_changes:
        table.add_row(f"{change.t_s:.3f}", change.switch, change.action, change.match, change.out)
    return table


def _limits(summary: Summary) -> Table:
    table = _table("wanted*", "instead*", "why*")
    for limit in summary.limits:
        table.add_row(limit.wanted, limit.got, limit.why)
    return table


def _problems(summary: Summary) -> Table:
    table = _table("where", "*", header=False)
    for problem in summary.problems:
        hint = f"\nhint: {problem.hint}" if problem.hint else ""
        table.add_row(Text(problem.where, style=BAD), problem.error + hint)
    return table


def _repeats(summary: Summary) -> Table:
    table = _table("run*", "seed>", "")
    for run in summary.repeats:
        table.add_row(run.path, str(run.seed), _verdict(run.ok))
    return table


def _statistics(summary: Summary) -> Table:
    """Medians and intervals by migration; the starts of phases are only in summary.json."""
    table = _table("", "median>", "from>", "to>", "n>")
    migration = ""
    for path, found in summary.statistics.items():
        prefix, _, field = path.partition(".")
        if field.startswith("phases_at_ms"):
            continue
        if prefix != migration and len(summary.migrations) > 1:
            table.add_row(Text(f"{prefix}: {_which(summary, prefix)}", style="bold"))
        migration = prefix
        whole = not field.endswith("_ms") and not field.startswith("phases_ms")
        numbers = [found.median, found.low, found.high]
        shown = ["–" if number is None else f"{number:,.{0 if whole else 1}f}" for number in numbers]
        table.add_row(field, *shown, str(found.n))
    return table


def _which(summary: Summary, prefix: str) -> str:
    """A migration in words, such as `server h2 → h3` for `migrations[0]`."""
    for migration in summary.migrations:
        if prefix == f"migrations[{migration.index}]":
            return f"{migration.app} {migration.from_host} → {migration.to_host}"
    return ""


def _files(summary: Summary) -> RenderableType:
    table = _table("", "*", header=False)
    for host in summary.hosts:
        for capture in host.captures:
            frames = "" if capture.frames is None else f", {_plural(capture.frames, 'frame')}"
            table.add_row(capture.path, f"RoCE frames at {host.name}, {text.size(capture.bytes)}{frames}")
        if host.trace is not None:
            table.add_row(host.trace, f"trace of {host.name}'s queue pairs (testbed diagram draws it)")
    for app in summary.apps:
        for stream, path in app.logs.items():
            table.add_row(path, f"{stream} of {app.name}")
    if summary.folder and (Path(summary.folder) / "timeline.png").exists():
        table.add_row("timeline.png", "phases of the migrations as a picture")
    table.add_row("summary.json", "this report as data")
    table.add_row("events.jsonl", "events with their times")
    table.add_row("topology.yaml", "topology with every default filled in")
    table.add_row("versions.json", "versions of kernel, programs and packages")
    if summary.folder and (Path(summary.folder) / "network").is_dir():
        table.add_row("network/", "logs of the controller and the SSH servers")
    return Group(Text(summary.folder, overflow="fold"), table)


def _plural(number: int, word: str) -> str:
    return f"{text.count(number)} {word}" + ("" if number == 1 else "s")
