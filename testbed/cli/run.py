"""`testbed run TOPO`: runs a topology, shows its progress and prints the report; `--repeat` adds statistics."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from testbed.record.summary import Summary
    from testbed.topology import ResolvedTopology


def run(
    topology: Annotated[Path, typer.Argument(metavar="TOPO", help="topology file, or the name of a shipped one")],
    as_json: Annotated[bool, typer.Option("--json", help="print only the summary, as JSON")] = False,
    repeat: Annotated[int, typer.Option(min=1, help="number of runs; reports medians and 95 % intervals")] = 1,
    results: Annotated[Path | None, typer.Option(help="folder for the results (default: ./results)")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="use this seed instead of the topology's")] = None,
    live: Annotated[bool, typer.Option("--live/--no-live", help="show a live view, or one line per event")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the resolved topology and exit")] = False,
) -> int:
    """Run a topology. Builds its network, runs and migrates its programs, checks them and reports. Needs root."""
    from testbed.topology import load, resolve

    resolved = resolve(load(topology))
    if dry_run:
        _show(resolved, as_json)
        return 0
    _require_root()
    summary = _once(resolved, results, seed, live) if repeat == 1 else _often(resolved, results, seed, live, repeat)
    if as_json:
        sys.stdout.write(summary.to_json())
    else:
        from testbed.view.report import print_report

        print_report(summary)
    return _exit_code(summary)


def _show(resolved: ResolvedTopology, as_json: bool) -> None:
    plain = resolved.to_plain()
    if as_json:
        typer.echo(json.dumps(plain, indent=2))
    else:
        import yaml

        typer.echo(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), nl=False)


def _require_root() -> None:
    from testbed.base.errors import EnvironmentProblem

    if os.geteuid() != 0:
        again = " ".join(["sudo", sys.executable, "-m", "testbed", *sys.argv[1:]])
        raise EnvironmentProblem("network namespaces need root", hint=again)


def _once(resolved: ResolvedTopology, root: Path | None, seed: int | None, live: bool) -> Summary:
    from testbed.run import runner
    from testbed.view.live import LiveView

    with LiveView(plain=None if live else True) as view:
        return runner.run(resolved, runner.Options(root=root, seed=seed, listener=view.on_event))


def _often(resolved: ResolvedTopology, root: Path | None, seed: int | None, live: bool, repeat: int) -> Summary:
    """Run the topology `repeat` times, in one folder; each run's seed is one higher than the previous."""
    from testbed.record.folder import RunFolder, summarise_repeats

    first = resolved.seed if seed is None else seed
    with RunFolder.create(resolved.name, seed=first, root=root) as folder:
        folder.write_topology(resolved.to_plain())
        summaries: list[Summary] = []
        for number in range(repeat):
            typer.echo(f"run {number + 1} of {repeat}", err=True)
            summaries.append(_once(resolved, folder.path, first + number, live))
            if summaries[-1].interrupted:
                break
        summary = summarise_repeats(folder, summaries)
        folder.finish(summary)
    return summary


def _exit_code(summary: Summary) -> int:
    from testbed.base.errors import Exit

    if summary.interrupted:
        return Exit.INTERRUPTED
    if summary.ok:
        return Exit.OK
    blames = {problem.blame for problem in summary.problems}
    return Exit.ENVIRONMENT if blames == {"environment"} else Exit.CHECK_FAILED
