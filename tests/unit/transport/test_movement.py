"""The table of MigrOS's states: complete, in agreement with the rules above it, and the one that the code obeys."""

from __future__ import annotations

import pytest

from softroce_ext.transport.rc import movement as rc_movement
from softroce_ext.transport.state.movement import (
    PAUSED_STATES,
    RESUMING_STATES,
    STOPPED_STATES,
    TRANSITIONS,
    Movement,
    MovementAction,
    MovementEvent,
    MovementState,
)

_A, _E = MovementAction, MovementEvent


def test_every_event_in_every_state_has_a_row() -> None:
    assert set(TRANSITIONS) == {(state, event) for state in MovementState for event in MovementEvent}


def test_every_state_is_reached_and_every_action_performed() -> None:
    rows = [row for row in TRANSITIONS.values() if row is not None]
    assert {row.state for row in rows} == set(MovementState)
    assert {action for row in rows for action in row.actions} == set(MovementAction) == set(rc_movement._PERFORM)


@pytest.mark.parametrize("state", MovementState)
def test_a_movement_obeys_the_table(state: MovementState) -> None:
    for event in MovementEvent:
        movement = Movement(state=state)
        row = TRANSITIONS[state, event]
        assert movement.handle(event) == (() if row is None else row.actions)
        assert movement.state == (state if row is None else row.state)


@pytest.mark.parametrize("state", sorted(STOPPED_STATES))
def test_a_stopped_end_learns_nothing(state: int) -> None:
    """Rule 1: no answer changes it, and a RESUME is refused."""
    for event in (_E.RESUME_ACKED, _E.NAK_STOPPED, _E.REFUSED_EXECUTED):
        assert TRANSITIONS[MovementState(state), event] is None
    for event in (_E.PEER_RESUMED, _E.PEER_MOVED):
        row = TRANSITIONS[MovementState(state), event]
        assert row is not None and row.actions == (_A.REFUSE,)


def test_who_leaves_stopped_or_paused_goes_back() -> None:
    """Rules 2 and 4."""
    for (state, event), row in TRANSITIONS.items():
        if row is None or event == _E.FAIL:
            continue
        if state in STOPPED_STATES and row.state not in STOPPED_STATES:
            assert _A.THAW in row.actions
        if state in PAUSED_STATES - STOPPED_STATES and row.state not in PAUSED_STATES:
            assert _A.RESTART in row.actions


@pytest.mark.parametrize("state", MovementState)
def test_a_resume_is_always_taken(state: MovementState) -> None:
    """Rule 6; and a frozen end only is Stopped after STOP, a failed one is neither Paused nor Resuming."""
    assert TRANSITIONS[state, _E.PEER_RESUMED] is not None and TRANSITIONS[state, _E.PEER_MOVED] is not None
    stopped, failed = TRANSITIONS[state, _E.STOP], TRANSITIONS[state, _E.FAIL]
    assert stopped is not None and stopped.state in STOPPED_STATES
    assert failed is not None and failed.state not in PAUSED_STATES | RESUMING_STATES


def test_a_stop_keeps_in_mind_that_a_resume_was_unanswered() -> None:
    for state in RESUMING_STATES:
        row = TRANSITIONS[MovementState(state), _E.STOP]
        assert row is not None and _A.KEEP_ANNOUNCING in row.actions
