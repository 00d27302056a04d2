"""The order of the phases and of their undoing, for every operation that may fail, before or after its work.

Invariants: at the end the program runs at exactly one host and is frozen at none; its packets go to that host; the
application belongs to that host; `ok` and `rolled_back` say which. Before the resume that host is the source.
"""

from __future__ import annotations

import pytest

from testbed.migration import migrate, observe
from testbed.record.summary import PHASES, Migration
from tests.unit.migration.fakes import World, migration, session

BEFORE = ["begin", "prepare", "prepare_move", "send", "receive", "move"]
"""Operations up to the point of no return, in their order."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observe, "GAP_SECONDS", 0.0)


def consistent(world: World, host: str) -> None:
    assert world.running == {host}
    assert world.frozen == set()
    assert world.flows_to == host
    assert not world.prepared


def test_the_whole_way() -> None:
    world = World()
    made = session(world)
    record = migrate(made, migration())
    assert record.ok and not record.rolled_back and record.error is None
    assert world.log == [*BEFORE, "resume", "commit"]
    consistent(world, "h3")
    assert made.apps.host == "h3"
    assert list(record.phases_ms) == list(PHASES)
    assert record.blackout_from == "phases" and record.blackout_ms is not None
    assert (record.image_bytes, record.nic_image_bytes) == (10, 2)
    assert world.prepared_with["longest_gap"] == 0.3
    told = [event["event"] for event in world.events]
    assert told[0] == "migration_started" and told[-1] == "migration_finished"
    assert [e["phase"] for e in world.events if e["event"] == "phase_finished"] == list(PHASES)
    assert "flow_change" in told


def test_an_address_that_changes_needs_no_flows() -> None:
    world = World()
    record = migrate(session(world), migration("change"))
    assert record.ok
    assert world.log == ["begin", "prepare", "send", "receive", "resume", "commit"]
    assert world.flows_to == "h2", "the old address stays where it was"


@pytest.mark.parametrize(
    ("step", "when"), [*((step, when) for step in BEFORE for when in ("before", "after")), ("resume", "before")]
)
def test_any_failure_before_the_resume_leaves_the_program_at_the_source(step: str, when: str) -> None:
    world = World()
    world.fail = {step: when}
    made = session(world)
    record = migrate(made, migration())
    assert not record.ok and record.rolled_back
    assert f"{step} failed" in (record.error or "")
    consistent(world, "h2")
    assert made.apps.host == "h2"
    assert "commit" not in world.log
    reverse = [op for op in world.log if op in ("undo_move", "abort", "rollback")]
    assert reverse == [op for op in ("undo_move", "abort", "rollback") if op in reverse], "flows, there, here"
    if "send" in world.log:
        assert "rollback" in world.log


def test_a_destination_that_breaks_off_after_the_resume_keeps_the_program() -> None:
    """Partners have been answered from there: the original must not run again, whatever the destination says."""
    world = World()
    world.fail = {"resume": "after"}
    made = session(world)
    record = migrate(made, migration())
    assert not record.ok and not record.rolled_back
    assert "rollback" not in world.log and world.log[-1] == "commit"
    consistent(world, "h3")
    assert made.apps.host == "h3"


def test_silent_partners_are_told_but_take_nothing_back() -> None:
    world = World()
    world.fail = {"resume problem": "no answer from the partners of QPN 17"}
    record = migrate(session(world), migration())
    assert not record.ok and not record.rolled_back
    assert "no answer from the partners" in (record.error or "")
    consistent(world, "h3")


def test_a_source_that_cannot_clean_up_does_not_fail_the_migration() -> None:
    world = World()
    world.fail = {"commit": "after"}
    record = migrate(session(world), migration())
    assert record.ok
    assert "clean-up at h2: commit failed" in (record.hint or "")
    consistent(world, "h3")


def test_events_that_cannot_be_written_break_nothing_in_the_threads_that_read_from_hosts() -> None:
    world = World()
    made = session(world)
    write = made.folder.event

    def full(name: str, **fields: object) -> None:
        if fields.get("phase") in ("freeze", "thaw"):  # told by an agent
            raise OSError(28, "No space left on device")
        write(name, **fields)

    made.folder.event = full  # type: ignore[method-assign, assignment]
    record = migrate(made, migration())
    assert record.ok and "events.jsonl is incomplete: [Errno 28] No space" in (record.hint or "")
    assert list(record.phases_ms) == list(PHASES), "what was told is known all the same"
    consistent(world, "h3")


def test_a_full_disk_at_the_commit_does_not_keep_the_original() -> None:
    world = World()
    made = session(world)

    def full(name: str, to: str) -> None:
        made.apps.host = to
        raise OSError(28, "No space left on device")

    made.apps.moved = full  # type: ignore[method-assign]
    record = migrate(made, migration())
    assert record.ok and world.log[-1] == "commit"
    assert "events.jsonl is incomplete" in (record.hint or "")
    consistent(world, "h3")


@pytest.mark.parametrize("also", ["abort", "undo_move"])
def test_an_undo_that_fails_does_not_keep_the_others_from_running(also: str) -> None:
    world = World()
    world.fail = {"move": "after", also: "before"}
    record = migrate(session(world), migration())
    assert record.rolled_back
    assert world.log[-3:] == ["undo_move", "abort", "rollback"]
    assert f"{also} failed" in (record.hint or "")
    assert "h2" in world.running


def test_a_source_that_cannot_go_on_is_not_called_rolled_back() -> None:
    world = World()
    world.fail = {"receive": "before", "rollback": "before"}
    record = migrate(session(world), migration())
    assert not record.ok and not record.rolled_back
    assert "server resumes at h2: rollback failed" in (record.hint or "")


def test_an_agent_that_has_gone() -> None:
    world = World()
    world.dead = {"h3"}
    record = migrate(session(world), migration())
    assert record.rolled_back and "the agent has gone" in (record.error or "")
    assert world.running == {"h2"}


@pytest.mark.parametrize("step", ["send", "receive", "move"])
def test_an_interrupt_takes_everything_back_and_goes_on_up(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    made = session(world)
    real = World.step

    def interrupted(self: World, name: str, work: object) -> object:
        result = real(self, name, work)  # type: ignore[arg-type]
        if name == step:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(World, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        migrate(made, migration())
    consistent(world, "h2")


def test_the_record_is_what_the_schema_says() -> None:
    world = World()
    world.fail = {"receive": "before"}
    record = migrate(session(world), migration())
    assert Migration.model_validate_json(record.model_dump_json()) == record
