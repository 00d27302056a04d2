"""Write docs/qp-states.md from the tables that the NIC itself obeys.

They are softroce_ext.transport.states (what a program sees) and softroce_ext.transport.state.movement (MigrOS). Run
`PYTHONPATH=. python docs/make_state_diagrams.py` after a table changed; a unit test compares the file with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from softroce_ext.transport.state.movement import TRANSITIONS, MovementEvent, MovementState
from softroce_ext.transport.states import BY_TYPE, Transition
from softroce_ext.transport.verbs import QpState

TARGET = Path(__file__).parent / "qp-states.md"
Table = Mapping[tuple[QpState, QpState], Transition]

FROM_ANYWHERE = (QpState.RESET, QpState.ERR)
"""Allowed from every state but RESET to ERR: one note in place of an arrow from each."""

HEAD = """# States of a queue pair

Generated from `softroce_ext/transport/states.py` and `softroce_ext/transport/state/movement.py` by
`docs/make_state_diagrams.py`; do not edit.

RC, UC and UD have the states that a program sees (`ibv_modify_qp`, `ibv_query_qp`; IBA 10.3.1). The
states of a [migration](#migration) exist beside them, and no program sees them.
"""

MIGRATION = """## Migration

The states of MigrOS, of an RC queue pair and as it sees its peer: what they mean is in
[wire-protocol.md](wire-protocol.md#states). Transitions that lead back to the same state are in the
table only.
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


def movement_diagram() -> str:
    """A Mermaid diagram of MigrOS's states: one arrow for each pair of states."""
    lines = ["```mermaid", "stateDiagram-v2", "    [*] --> RUNNING"]
    for state in MovementState:
        arrows: dict[MovementState, list[str]] = {}
        for event in MovementEvent:
            row = TRANSITIONS[state, event]
            if row is not None and row.state != state:
                arrows.setdefault(row.state, []).append(event.name)
        lines += [f"    {state.name} --> {target.name}: {', '.join(events)}" for target, events in arrows.items()]
    return "\n".join([*lines, "```"])


def movement_table() -> str:
    """Every event: where it leads from each state, and what is done."""
    rows = ["| event | in state | leads to | actions |", "| --- | --- | --- | --- |"]
    for event in MovementEvent:
        alike: dict[tuple[str, str], list[str]] = {}
        for state in MovementState:
            row = TRANSITIONS[state, event]
            if row is None:
                key = "–", "ignored"
            else:
                key = row.state.name, ", ".join(action.value for action in row.actions)
            alike.setdefault(key, []).append(state.name)
        for (target, actions), states in alike.items():
            rows.append(f"| {event.name}: {event.value} | {', '.join(states)} | {target} | {actions} |")
    return "\n".join(rows)


def document() -> str:
    """The whole file."""
    parts = [HEAD]
    for kind, transitions in BY_TYPE.items():
        said = {(state, to) for state in QpState for to in FROM_ANYWHERE} - {(QpState.RESET, QpState.ERR)}
        if wrong := said ^ {pair for pair in transitions if pair[1] in FROM_ANYWHERE}:
            raise SystemExit(f"the diagram says 'any state but RESET', but {kind.name}'s table differs in {wrong}")
        parts.append(f"## {kind.name}\n\n{diagram(transitions)}\n\n{table(transitions)}\n")
    parts.append(f"{MIGRATION}\n{movement_diagram()}\n\n{movement_table()}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    TARGET.write_text(document())
    print(TARGET)
