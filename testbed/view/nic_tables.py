"""The output of `testbed status` for a running NIC: a headline, its queue pairs by program, its counters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from softroce_ext.transport.verbs import QpState, QpType
from testbed.view import text

_STATE_STYLE = {"RTS": "green", "RTR": "green", "ERR": "bold red", "SQE": "bold red"}
_QP_COLUMNS = ("QPN", "type", "state", "remote", "send PSN>", "acked>", "expected>", "sent>", "received>", "again>", "")


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        right = column.endswith(">")
        table.add_column(column.rstrip(">"), justify="right" if right else "left", no_wrap=True)
    return table


def render(report: Mapping[str, Any]) -> RenderableType:
    """Render the report of one NIC (`testbed.lab.nics.report`) as tables."""
    return Group(*_parts(report))


def _parts(report: Mapping[str, Any]) -> Iterator[RenderableType]:
    facts = (
        report["device"],
        report["interface"],
        ", ".join(report["addresses"]) or "no address",
        f"active MTU {report['active_mtu']}",
        "MigrOS" if report["migros"] else "plain RoCEv2",
    )
    yield Text.assemble((report["host"], "bold"), f" · {' · '.join(facts)}", (f" · run {report['run_id']}", "dim"))
    contexts = report["contexts"]
    if not contexts:
        yield Padding(Text("no program has opened the device", style="dim"), (0, 0, 0, 2))
    for context in contexts:
        yield Padding(_context(context), (0, 0, 0, 2))
    for file in report.get("rdma_cm", ()):
        if file["ids"]:
            yield Padding(_rdma_cm(file), (0, 0, 0, 2))
    yield Padding(_counters(report), (0, 0, 1, 2))


def _head(opened: Mapping[str, Any], what: str) -> Text:
    program = opened["program"] or "(process has ended)"
    process = f"pid {opened['pid']}" if opened["pid"] is not None else "no process yet"
    head = Text.assemble((program, "bold"), f" · {process} · {what}")
    if opened["held"]:
        head.append(" · held for a checkpoint", style="yellow")
    return head


def _rdma_cm(file: Mapping[str, Any]) -> RenderableType:
    """The ids of one opening of rdma_cm."""
    table = _table("id", "state", "source", "destination", "connection")
    for cm_id in file["ids"]:
        name = str(cm_id["handle"])
        table.add_row(
            name, cm_id["state"], cm_id["source"] or "–", cm_id["destination"] or "–", cm_id["connection"] or "–"
        )
    return Group(_head(file, f"rdma_cm {file['id']}"), Padding(table, (0, 0, 0, 2)))


def _context(context: Mapping[str, Any]) -> RenderableType:
    objects = ", ".join(f"{context[kind]} {kind[:-1].upper()}" for kind in ("pds", "mrs", "mws", "cqs", "srqs"))
    head = _head(context, f"context {context['id']} · {objects}")
    if not context["qps"]:
        return head
    table = _table(*_QP_COLUMNS)
    for qp in context["qps"]:
        state = QpState(qp["state"]).name
        remote = f"{qp['remote_ip']} QPN {qp['remote_qpn']}" if qp["remote_ip"] is not None else "–"
        table.add_row(
            str(qp["qpn"]), QpType(qp["type"]).name, Text(state, style=_STATE_STYLE.get(state, "")), remote,
            str(qp["send_psn"]), str(qp["una_psn"]), str(qp["expected_psn"]), text.count(qp["completed_sends"]),
            text.count(qp["completed_receives"]), text.count(qp["retransmits"]), _flags(qp),
        )  # fmt: skip
    return Group(head, Padding(table, (0, 0, 0, 2)))


def _flags(qp: Mapping[str, Any]) -> Text:
    flags = [
        name
        for name, key in (("Stopped", "stopped"), ("Paused", "paused"), ("RESUME unanswered", "resume_pending"))
        if qp[key]
    ]
    return Text(", ".join(flags), style="yellow")


def _counters(report: Mapping[str, Any]) -> Table:
    """Counters other than 0: those of rxe's sysfs files, traffic, refusals by kind, and those of MigrOS."""
    counters, own = report["hw_counters"], report["counters"]
    migros = {
        name: own[name] for name in sorted(own) if ("resume" in name or "stopped" in name) and "refused" not in name
    }
    traffic = {name: own[name] for name in ("tx_bytes", "rx_bytes", "retransmits", "tx_busy") if name in own}
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for title, values in (
        ("hw_counters", counters),
        ("traffic", traffic),
        ("refused", report["refused"]),
        ("MigrOS", migros),
    ):
        shown = ", ".join(f"{name} {text.count(value)}" for name, value in values.items() if value)
        table.add_row(title, shown or "all 0")
    return table
