"""The list of verbs, and the translation of typer's errors to our format and exit codes."""

from __future__ import annotations

import sys
from typing import Annotated, Any, Final

import typer

from testbed import __version__
from testbed.base.errors import BadInput, Exit
from testbed.cli import clean, diagram, doctor, run, schema, status, trace, validate

USAGE_ERROR: Final[type[BaseException]] = typer.BadParameter.__mro__[1]
"""UsageError of click, or of the copy of click in newer versions of typer, which exports only a subclass of it."""

_app = typer.Typer(
    name="testbed",
    help="Transparent live migration of running RDMA programs between virtual hosts, on one machine.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"testbed {__version__}")
        raise typer.Exit


@_app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="print the version and exit")
    ] = False,
) -> None:
    """Transparent live migration of running RDMA programs between virtual hosts, on one machine."""


for _verb in (
    run.run,
    validate.validate,
    doctor.doctor,
    status.status,
    trace.trace,
    diagram.diagram,
    clean.clean,
    schema.schema,
):
    _app.command()(_verb)


def app() -> Any:
    """Run the command line and return the exit code. Raises BadInput for wrong options, and what the verbs raise."""
    if len(sys.argv) == 1:
        _app(["--help"], standalone_mode=False)
        return Exit.BAD_INPUT
    try:
        return _app(standalone_mode=False)
    except USAGE_ERROR as error:
        context = getattr(error, "ctx", None)
        command = str(context.command_path).replace("python -m ", "") if context is not None else "testbed"
        message = getattr(error, "format_message", error.__str__)()
        raise BadInput(
            message, where=command.removeprefix("testbed").strip() or None, hint=f"{command} --help"
        ) from error
    except typer.Abort as error:
        raise KeyboardInterrupt from error
