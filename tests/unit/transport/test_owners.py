"""Invariant: each field of a queue pair's state is written by its record and by at most one other file.

What a file may write is listed here; a new writer must be a decision. A write is an assignment to the field, or a call
that changes a container which the field holds, through a name or attribute that is called like the record
(`sender.una_psn = …`, `qp.receiver.answers.append(…)`).
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from softroce_ext.transport.state.queue_pair import RECORDS

PACKAGE = Path(__file__).parents[3] / "softroce_ext"
STATE = PACKAGE / "transport" / "state"
CHANGES = {"append", "appendleft", "clear", "extend", "pop", "popleft", "remove", "insert", "update"}

WRITERS: dict[str, dict[str, set[str]]] = {
    "attributes": {"transport/completion.py": {"state"}},
    "sender": {
        "transport/segmentation.py": {"noack_packets"},
        "transport/rc/requester.py": {"noack_packets", "reads_out"},
        "transport/rc/completer.py": {"una_psn", "retry_left", "retry_started", "ack_deadline"},
    },
    "receiver": {
        "transport/reassembly.py": {
            "message", "msn", "write_address", "write_rkey", "write_left", "write_length", "recv_wqe", "recv_offset",
        },
        "transport/rc/responder.py": {"expected_psn", "nak_sent"},
        "transport/rc/answers.py": {"answers"},
    },
    "movement": {
        "transport/rc/movement.py": {
            "announce", "peer_resumed_at", "pause_psn", "pause_deadline", "resume_deadline", "resume_wait",
            "resume_since", "resume_acked_at",
        },
    },
    "statistics": {},
}  # fmt: skip
"""Record → file → the fields that it writes, besides the record's own file."""


def written(path: Path, myself: str = "", record: str = "") -> Iterator[tuple[str, str]]:
    """(record, field) of every write in a file; the name `myself` stands for `record`."""

    def target(node: ast.expr) -> Iterator[tuple[str, str]]:
        if isinstance(node, ast.Tuple | ast.List):
            for part in node.elts:
                yield from target(part)
        elif isinstance(node, ast.Starred | ast.Subscript):
            yield from target(node.value)
        elif isinstance(node, ast.Attribute):
            holder = node.value
            name = holder.id if isinstance(holder, ast.Name) else getattr(holder, "attr", "")
            name = record if name == myself else name
            if name in RECORDS and node.attr in {item.name for item in fields(RECORDS[name])}:
                yield name, node.attr

    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Assign):
            for one in node.targets:
                yield from target(one)
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            yield from target(node.target)
        elif isinstance(node, ast.Delete):
            for one in node.targets:
                yield from target(one)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGES:
            yield from target(node.func.value)


def aliased(path: Path) -> Iterator[str]:
    """Containers of a record under a local name, whose changes `written` would not see as the record's."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGES:
            if isinstance(node.func.value, ast.Name) and node.func.value.id in {"answers", "inflight", "resources"}:
                yield node.func.value.id


def found() -> dict[str, dict[str, set[str]]]:
    table: dict[str, dict[str, set[str]]] = {record: defaultdict(set) for record in RECORDS}
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.is_relative_to(STATE) or path.is_relative_to(PACKAGE / "simulation"):
            continue
        name = str(path.relative_to(PACKAGE))
        for record, field_name in written(path):
            table[record][name].add(field_name)
        for field_name in aliased(path):
            table["sender" if field_name == "inflight" else "receiver"][name].add(field_name)
    return {record: dict(files) for record, files in table.items()}


def test_only_the_listed_files_write_a_record() -> None:
    assert found() == WRITERS


def test_no_field_has_more_than_two_writers() -> None:
    """The record itself counts. (`QueuePairState.reset` replaces all of them at once.)"""
    for record, kind in RECORDS.items():
        own = {name for holder, name in written(STATE / f"{record}.py", "self", record) if holder == record}
        for item in fields(kind):
            files = {file for file, names in WRITERS[record].items() if item.name in names}
            assert len(files) + (item.name in own) <= 2, f"{record}.{item.name} is written by {files} and its record"
