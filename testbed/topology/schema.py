"""The JSON schema of topology files, as published in `testbed/schema/topology.schema.json`.

It describes the structure of a file, for editors; only `testbed validate` checks names, reachability and addresses.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from testbed.topology.models import LONGEST_NODE_NAME, NAME_PATTERN, Topology

SCHEMA_FILE: Final = Path(__file__).resolve().parent.parent / "schema" / "topology.schema.json"


def topology_schema() -> dict[str, Any]:
    """The schema of the models, plus the short forms that a file may use (`[h1, s1]`, `after: server`, `h3:`)."""
    schema = Topology.model_json_schema()
    definitions = schema["$defs"]
    node_name = {"type": "string", "pattern": NAME_PATTERN, "maxLength": LONGEST_NODE_NAME}
    schema["properties"]["hosts"]["propertyNames"] = node_name
    schema["properties"]["switches"]["items"] = node_name
    definitions["Host"] = {**definitions["Host"], "type": ["object", "null"]}
    pair = definitions["Link"]["properties"]["ends"]
    definitions["Link"] = {"anyOf": [definitions["Link"], pair]}
    after = definitions["App"]["properties"]["after"]
    definitions["App"]["properties"]["after"] = {
        "anyOf": [{key: value for key, value in after.items() if key != "default"}, {"type": "string"}],
        "default": [],
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "MigrOS Testbed topology",
    }


def publish(path: Path = SCHEMA_FILE) -> Path:
    """Write the schema file and return its path; a unit test compares the file with the models."""
    path.write_text(json.dumps(topology_schema(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path
