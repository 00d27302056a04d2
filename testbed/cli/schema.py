"""`testbed schema [topology|summary]`: prints the published JSON schemas, for editors and scripts."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated

import typer


class Which(StrEnum):
    """The files that have a schema."""

    TOPOLOGY = "topology"
    SUMMARY = "summary"


def schema(
    which: Annotated[Which, typer.Argument(help="kind of file that the schema describes")] = Which.TOPOLOGY,
    publish: Annotated[bool, typer.Option("--publish", hidden=True, help="rewrite the file in the package")] = False,
) -> int:
    """Print the JSON schema of topology files or of summary.json."""
    from testbed.record import summary
    from testbed.topology import schema as topology_schema

    if publish:
        typer.echo(summary.publish_schema() if which is Which.SUMMARY else topology_schema.publish())
        return 0
    content = summary.summary_schema() if which is Which.SUMMARY else topology_schema.topology_schema()
    typer.echo(json.dumps(content, indent=2, ensure_ascii=False))
    return 0
