"""Write docs/qp-states.md from the transition table that the NIC itself obeys (softroce_ext.transport.states).

Run `PYTHONPATH=. python docs/make_state_diagrams.py` after the table changed; a unit test compares the file with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from softroce_ext.transport.states import BY_TYPE, Transition
from softroce_ext.transport.verbs import QpState

TARGET = Path(__file__).parent / "qp-states.md"
Table = Mapping[tuple[QpState, QpState], Transition]

FROM_ANYWHERE = (QpState.RESET, QpState.ERR)
"""Allowed from every state but RESET to ERR: one note in place of an arrow from each."""

HEAD = """# States of a queue pair

Generated from `softroce_ext/transport/states.py` by `docs/make_state_diagrams.py`; do not edit.

These are the states that a program sees (`ibv_modify_qp`, `ibv_query_qp`; IBA 10.3.1). MigrOS's Stopped and Paused are
flags beside them: [wire-protocol.md](wire-protocol.md#states).
"""


def diagram(transitions: Table) -> str:
    """A Mermaid state diagram: every transition but those that are allowed from anywhere."""
    lines = ["```mermaid", "stateDiagram-v2", "    [*] --> RESET"]
    for current, target in transitions:
        if target not in FROM_ANYWHERE:
            lines.append(f"    {current.name} --> {target.name}")
    if (QpState.RTS, QpState.ERR) in transitions:
        lines.append("    RTS --> ERR: any state but RESET, also by a fatal error")
    lines += ["    ERR --> RESET: any state", "```"]
    return "\n".join(lines)


def table(transitions: Table) -> str:
    """What each transition needs and takes."""
    rows = ["| from | to | must be given | may be given |", "| --- | --- | --- | --- |"]
    for (current, target), row in transitions.items():
        if target in FROM_ANYWHERE:
            continue
        rows.append(f"| {current.name} | {target.name} | {_names(row, True)} | {_names(row, False)} |")
    rows.append("| any | RESET | – | – |")
    rows.append("| any but RESET | ERR | – | – |")
    return "\n".join(rows)


def _names(row: Transition, required: bool) -> str:
    names = sorted(row.required if required else row.optional)
    return ", ".join(f"`{name}`" for name in names) or "–"


def document() -> str:
    """The whole file."""
    parts = [HEAD]
    for kind, transitions in BY_TYPE.items():
        said = {(state, to) for state in QpState for to in FROM_ANYWHERE} - {(QpState.RESET, QpState.ERR)}
        if wrong := said ^ {pair for pair in transitions if pair[1] in FROM_ANYWHERE}:
            raise SystemExit(f"the diagram says 'any state but RESET', but {kind.name}'s table differs in {wrong}")
        parts.append(f"## {kind.name}\n\n{diagram(transitions)}\n\n{table(transitions)}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    TARGET.write_text(document())
    print(TARGET)
