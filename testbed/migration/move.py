"""One migration from its first to its last phase.

`testbed.migration.phases` lists them with their undo steps. From freeze to restore the agents work without the testbed,
so that its latency is not part of the blackout. A roll-back runs in reverse order: first the packets find the source
again, then the destination discards what it has, then the source resumes and announces it by a RESUME of its own. There
is no way back once the destination has resumed, because peers may have been answered from there.
"""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from testbed.base import ip6
from testbed.base.errors import MigrationFailed, TestbedError
from testbed.migration import observe
from testbed.migration.timeline import Timeline
from testbed.migration.undo import Step, Undo
from testbed.record import summary
from testbed.topology import ResolvedMigration

if TYPE_CHECKING:
    from testbed.controller.client import ControllerClient
    from testbed.lab.session import Session

CARRY_SECONDS = 900.0
"""Bound on everything from freeze to transfer; a large memory crosses a slow emulated link in minutes."""
UNDO_SECONDS = 180.0
"""Bound on one undo step."""


class Move:
    """One migration. `run` is called once, from one thread."""

    def __init__(self, session: Session, migration: ResolvedMigration) -> None:
        self._session = session
        self._migration = migration
        self._name = f"{migration.index}-{migration.app}"
        self._keep = migration.address == "keep"
        self._source = session.hosts[migration.source]
        self._target = session.hosts[migration.to]
        self._undo = Undo()
        self._resumes_at_source: Step | None = None
        """The undo step without which the program stays frozen."""
        self._timeline = Timeline(self._name, migration.index, session.folder.event)
        self._sent: dict[str, Any] = {}
        self._began = 0.0
        self._thawed = 0.0
        self._notes: list[str] = []
        self._problem: str | None = None
        self._gaps_here: observe.Gaps | None = None
        self._gaps_there: observe.Gaps | None = None
        self._gaps_peers: list[observe.Gaps] = []

    def run(self) -> summary.Migration:
        """Carry the migration out; see `testbed.migration.migrate`."""
        move, folder = self._migration, self._session.folder
        folder.event("migration_started", index=move.index, app=move.app, from_host=move.source, to_host=move.to)
        self._began = time.monotonic()
        for host in (self._source, self._target):
            host.subscribe(self._listen)
        growth = observe.Growth(self._session.hosts)
        failure: TestbedError | None = None
        rolled_back = False
        with self._session.controller() as controller:
            try:
                self._phases(controller)
            except TestbedError as error:
                failure, rolled_back = error, self._fail()
            except BaseException:
                self._fail()
                raise
        if failure is None and self._problem is not None:
            failure = MigrationFailed(self._problem, phase="resume", rolled_back=False, where=move.to)
        record = self._record(failure, rolled_back, growth)
        folder.event(
            "migration_finished",
            index=move.index,
            ok=record.ok,
            rolled_back=record.rolled_back,
            **({"error": record.error} if record.error else {}),
            blackout_ms=record.blackout_ms,
            partner_gap_ms=record.partner_gap_ms,
        )
        return record

    def _listen(self, host: str, event: Mapping[str, Any]) -> None:
        """Take an agent's event, in the thread that reads from its host: an error there would lose later answers."""
        try:
            self._timeline.listen(host, event)
        except OSError as error:
            self._note_lost_event(error)

    def _note_lost_event(self, error: OSError) -> None:
        note = f"events.jsonl is incomplete: {error}"
        if note not in self._notes:
            self._notes.append(note)

    # ---- the phases --------------------------------------------------------------------------------------------------

    def _phases(self, controller: ControllerClient) -> None:
        move, timeline = self._migration, self._timeline
        with timeline.phase("prepare"):
            offer = self._prepare(controller)
        arriving = self._target.begin(
            "migrate_receive",
            migration=self._name,
            addresses_moved=dict(zip(ip6.both(move.ip_before), ip6.both(move.ip_after), strict=True)),
            add_address=move.ip_after if self._keep else None,
            prefix=self._session.topology.hosts[move.to].prefix,
        )
        self._carry(offer, arriving)
        self._target.result(arriving, "migrate_receive", CARRY_SECONDS)
        with timeline.phase("reroute"):
            if self._keep:
                self._report_flows(controller.move(move.ip_before, move.to))
        self._resume()
        self._commit()

    def _prepare(self, controller: ControllerClient) -> dict[str, Any]:
        """Prepare both ends and the switches without touching the program; return the destination's offer."""
        move = self._migration
        about = self._source.call("migrate_begin", app=move.app)
        self._watch_gaps(about["pids"])
        self._undo.add(
            f"clean-up at {move.to}",
            lambda: self._target.call("migrate_abort", migration=self._name, timeout=UNDO_SECONDS),
        )
        offer = self._target.call(
            "migrate_prepare",
            migration=self._name,
            app=move.app,
            argv=about["argv"],
            env=about["env"],
            policy=about["policy"],
            longest_gap=about["longest_gap"],
            listen=self._session.topology.hosts[move.to].node_ip,
        )
        if self._keep:
            # One step for both preparation and move: undoing twice would move the address there again.
            self._undo.add("flows back to the source", lambda: controller.undo_move(move.ip_before))
            self._report_flows(controller.prepare_move(move.ip_before, move.to))
        return offer

    def _carry(self, offer: dict[str, Any], arriving: concurrent.futures.Future[dict[str, Any]]) -> None:
        """Carry out freeze to transfer. If the destination has failed meanwhile, its error is the one to raise."""
        move, hosts = self._migration, self._session.topology.hosts
        self._resumes_at_source = self._undo.add_last(
            f"{move.app} resumes at {move.source}",
            lambda: self._source.call("migrate_rollback", migration=self._name, timeout=UNDO_SECONDS),
        )
        try:
            self._sent = self._source.call(
                "migrate_send",
                migration=self._name,
                app=move.app,
                address=hosts[move.to].node_ip,
                port=offer["port"],
                token=offer["token"],
                source=hosts[move.source].node_ip,
                leaving=move.ip_before if self._keep else None,
                timeout=CARRY_SECONDS,
            )
        except TestbedError:
            if arriving.done():
                self._target.result(arriving, "migrate_receive")
            raise

    def _resume(self) -> None:
        """Resume and thaw at the destination. There is no way back once its NIC has resumed."""
        answer = self._target.call("migrate_resume", migration=self._name, source_ip=self._migration.ip_after)
        self._undo.forget()
        self._thawed = self._timeline.ended.get("thaw", time.monotonic())
        if answer.get("problem"):
            self._problem = str(answer["problem"])

    def _commit(self) -> None:
        """Give the program to the destination, whatever happens now at the source."""
        move = self._migration
        self._undo.forget()
        try:
            self._session.apps.moved(move.app, move.to)
        except OSError as error:  # a full disk must not keep the original alive
            self._note_lost_event(error)
        try:
            answer = self._source.call(
                "migrate_commit",
                migration=self._name,
                remove_address=move.ip_before if self._keep else None,
                timeout=UNDO_SECONDS,
            )
            self._notes += [f"clean-up at {move.source}: {text}" for text in answer["problems"]]
        except TestbedError as error:
            self._notes.append(f"clean-up at {move.source}: {error.message}")

    def _fail(self) -> bool:
        """Undo everything, if that is still possible. Returns whether the program runs at the source again."""
        move = self._migration
        if self._timeline.resumed:
            # The destination has answered peers and failed then: two copies must not run, so the original is killed.
            self._commit()
            return False
        failed = self._undo.run()
        self._notes += map(str, failed)
        frozen = any(failure.step is self._resumes_at_source for failure in failed)
        return not frozen and self._session.apps.running(move.app)

    def _report_flows(self, answer: dict[str, Any]) -> None:
        for flow in answer.get("flows", []):
            self._session.folder.event(
                "flow_change",
                at=flow.get("t"),
                switch=flow["switch"],
                action=flow["action"],
                match=flow["match"],
                out=flow.get("out", ""),
                migration=self._migration.index,
            )

    # ---- the record --------------------------------------------------------------------------------------------------

    def _watch_gaps(self, pids: list[int]) -> None:
        """Start to measure gaps at the program's queue pairs and at those of its peers."""
        moved = observe.queue_pairs(self._source, pids)
        own = {int(qp["qpn"]) for qp in moved}
        peers = {int(qp["remote_qpn"]) for qp in moved if qp.get("remote_qpn")}
        if not own:
            return
        self._gaps_here = observe.Gaps(self._source, own)
        self._gaps_there = observe.Gaps(self._target, own)
        self._gaps_peers = [observe.Gaps(host, peers) for host in self._session.hosts.values()]
        for gaps in (self._gaps_here, *self._gaps_peers):
            gaps.reset()

    def _blackout(self, succeeded: bool, rolled_back: bool) -> observe.Blackout:
        if "freeze" not in self._timeline.began or not (succeeded or rolled_back):
            return observe.Blackout()
        since = self._thawed if self._thawed else time.monotonic()
        until = time.monotonic() + observe.GAP_SECONDS
        here = self._gaps_here if rolled_back else self._gaps_there
        own = here.longest_ms(since, until) if here is not None else None
        seen = [gap for gaps in self._gaps_peers if (gap := gaps.longest_ms(since, until)) is not None]
        peer = max(seen, default=None)
        if own is not None:
            return observe.Blackout(own, "completions", peer)
        frozen = self._timeline.frozen_ms()
        return observe.Blackout(frozen, "phases" if frozen is not None else None, peer)

    def _error(self, failure: TestbedError | None) -> str | None:
        """A failure as the record describes it: the phase, the place and the message."""
        if failure is None:
            return None
        return ": ".join(part for part in (self._timeline.unfinished, failure.where, failure.message) if part)

    def _hint(self, failure: TestbedError | None) -> str | None:
        hint = failure.hint if failure is not None else None
        return "; ".join([*([hint] if hint else []), *self._notes]) or None

    def _record(self, failure: TestbedError | None, rolled_back: bool, growth: observe.Growth) -> summary.Migration:
        move, timeline = self._migration, self._timeline
        blackout = self._blackout(failure is None, rolled_back)
        growth.finish()
        return summary.Migration(
            index=move.index,
            app=move.app,
            from_host=move.source,
            to_host=move.to,
            address="keep" if self._keep else "change",
            at_s=self._session.folder.since_start(self._began),
            ok=failure is None,
            rolled_back=rolled_back,
            error=self._error(failure),
            hint=self._hint(failure),
            phases_ms=timeline.lengths_ms(),
            phases_at_ms=timeline.starts_ms(self._began),
            blackout_ms=blackout.program,
            blackout_from=blackout.measured,
            partner_gap_ms=blackout.peer,
            image_bytes=self._sent.get("image_bytes"),
            nic_image_bytes=self._sent.get("nic_image_bytes"),
            qps=len(self._gaps_here.qpns) if self._gaps_here is not None else 0,
            nak_stopped=growth.of(move.source, "sent_nak_stopped"),
            resumes=growth.of(move.source if rolled_back else move.to, "sent_resume"),
            retransmissions=growth.total("retransmits"),
        )
