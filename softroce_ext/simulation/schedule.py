"""One random schedule from a seed, and the invariants that it must keep.

A schedule is one or more connections over a link that loses, delays, reorders, duplicates and corrupts frames;
requests and receives that are posted at random times; and, for RC, the migration of one end, which may be rolled back.
Invariants:

1. RC: each request takes effect exactly once and in order; a receive gets the next message, complete and intact.
2. No completion precedes its data: when a receive, READ or atomic completes, its bytes are in local memory; when a
   WRITE or SEND completes, they are in the peer's memory.
3. Atomics are executed exactly once: each returns the value that its predecessor left.
4. No byte outside the ranges that the requests name is ever written, at either end.
5. UC and UD: a message is delivered complete and intact or not at all. UC keeps the order if the link does; a link that
   duplicates or reorders frames may cause it to deliver a message twice or late, as the specification allows.
6. An error completion occurs only where the retry count can be exhausted, and nothing succeeds after it.
7. The schedule terminates within a bound of virtual time.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from softroce_ext.simulation.ends import CELL, CELLS, SLOT, SOURCE, Message, Side, new_side
from softroce_ext.simulation.hosts import Host, ip, mac, path_between, to_rts
from softroce_ext.simulation.link import Link
from softroce_ext.simulation.world import Stuck, World
from softroce_ext.transport.engine import EngineConfig
from softroce_ext.transport.interfaces import RecvWqe, Sge
from softroce_ext.transport.services import make_queue_pair
from softroce_ext.transport.state.queue_pair import QueuePairState
from softroce_ext.transport.verbs import QpState, QpType, SendFlag, WrOpcode
from softroce_ext.wire.path import Path

MTU = 256
TIME_LIMIT = 200.0
"""Seconds of virtual time after which a schedule counts as stuck."""
SERVICES = {"rc": QpType.RC, "uc": QpType.UC, "ud": QpType.UD}
QKEY = 0x1234
GRH = 40


class Violation(AssertionError):
    """An invariant was violated."""


@dataclass(frozen=True)
class Plan:
    """The constraints that a schedule is drawn under; a field that is None is drawn as well."""

    service: str = "mixed"
    qps: int = 1
    messages: int = 5
    """Largest number of messages of each end."""
    loss: float | None = None
    migrate: bool | None = None
    short_turns: bool = True
    """Whether a turn to send, and the room for built frames, may be as small as one frame."""


@dataclass
class Outcome:
    """The result of one schedule."""

    seed: int
    service: str = ""
    packets: int = 0
    completions: int = 0
    migrations: int = 0
    virtual_seconds: float = 0.0
    faults: dict[str, int] = field(default_factory=dict)
    log: list[tuple[float, str, bytes]] = field(default_factory=list)


class Schedule:
    """One schedule, built from its seed; call `run` once."""

    def __init__(self, seed: int, plan: Plan | None = None, trace: bool = False) -> None:
        self.seed = seed
        self.plan = plan or Plan()
        self.random = random.Random(seed)
        draw = self.random
        mixed = ("rc", "rc", "rc", "rc", "uc", "ud")
        self.service = draw.choice(mixed) if self.plan.service == "mixed" else self.plan.service
        self.kind = SERVICES[self.service]
        levels = (0.0, 0.0, 0.02, 0.1, 0.25)
        loss = draw.choice(levels) if self.plan.loss is None else self.plan.loss
        self.link = Link(
            seed=draw.randrange(1 << 30),
            loss=loss,
            reorder=draw.choice(levels),
            duplicate=draw.choice(levels),
            corrupt=draw.choice((0.0, 0.0, 0.02, 0.1)),
            spacing=draw.choice((0.0, 2e-6)),
            rate=draw.choice((0.0, 1e9, 1e10)),
            jitter=draw.choice((0.0, 0.0, 20e-6)),
            log=[] if trace else None,
        )
        self.orderly = self.link.keeps_order
        self.finite = self.kind == QpType.RC and draw.random() < 0.1
        """Whether retry counts are finite, so that error completions are allowed."""
        migrate = draw.random() < 0.3 if self.plan.migrate is None else self.plan.migrate
        self.migrate = migrate and self.kind == QpType.RC
        self.ipv6 = draw.random() < 0.2
        config = EngineConfig(window=draw.choice((8, 128)))
        self.hosts = [Host(1, config), Host(2, config)]
        if self.plan.short_turns:
            turns = random.Random(f"turns {seed}")  # A separate generator keeps all other draws of a seed the same.
            config.quantum = turns.choice((1, 3, 32))
            for host in self.hosts:
                host.room = turns.choice((1, 4, 64))
        self.world = World(*self.hosts, link=self.link)
        self.pairs = [self._connect(number) for number in range(self.plan.qps)]
        self.migrations = 0

    # -- setup -----------------------------------------------------------------------------------------------------

    def _connect(self, number: int) -> tuple[Side, Side]:
        draw = self.random
        sides = tuple(new_side(host, 16 + number, self.kind) for host in self.hosts)
        a, b = sides
        psns = [draw.choice((0, 7, 0xFFFFFE, draw.randrange(1 << 24))) for _ in sides]
        for k, (here, there) in enumerate(((a, b), (b, a))):
            here.end.host.engine.port_mtu = MTU
            path = path_between(here.end, there.end, self.ipv6)
            self._to_rts(here, there, path, psns[k], psns[1 - k])
            here.end.pd.paths[1] = path
            here.peer = there
        for here in sides:
            here.messages = [self._message(here, index) for index in range(draw.randint(1, self.plan.messages))]
            here.messages[-1].signalled = True
            here.watch(self.kind, self.orderly)
            self._post(here)
        return a, b

    def _to_rts(self, here: Side, there: Side, path: Path, psn: int, rq_psn: int) -> None:
        modify, remote = here.end.qp.modify, there.end.attributes.qpn
        if self.kind == QpType.RC:
            retry = self.random.randint(0, 3) if self.finite else 7
            to_rts(
                here.end, path, remote, path_mtu=MTU, sq_psn=psn, rq_psn=rq_psn, timeout=10, retry_cnt=retry,
                rnr_retry=7, min_rnr_timer=1, max_rd_atomic=self.random.choice((1, 4)), max_dest_rd_atomic=4,
            )  # fmt: skip
        elif self.kind == QpType.UC:
            modify({"qp_state": 1, "pkey_index": 0, "port_num": 1, "qp_access_flags": 0xF})
            modify({"qp_state": 2, "path": path, "path_mtu": MTU, "destination_qpn": remote, "rq_psn": rq_psn})
            modify({"qp_state": 3, "sq_psn": psn})
        else:
            modify({"qp_state": 1, "pkey_index": 0, "port_num": 1, "qkey": QKEY})
            modify({"qp_state": 2})
            modify({"qp_state": 3, "sq_psn": psn})

    def _message(self, here: Side, index: int) -> Message:
        draw = self.random
        kinds = [WrOpcode.SEND, WrOpcode.SEND_WITH_IMM]
        if self.kind != QpType.UD:
            kinds += [WrOpcode.RDMA_WRITE, WrOpcode.RDMA_WRITE_WITH_IMM]
        if self.kind == QpType.RC:
            kinds += [WrOpcode.RDMA_READ, WrOpcode.ATOMIC_FETCH_AND_ADD, WrOpcode.ATOMIC_CMP_AND_SWP]
        kind = draw.choice(kinds)
        longest = MTU - GRH if self.kind == QpType.UD else SLOT - GRH
        size = draw.choice((0, 1, 8, MTU - 1, MTU, MTU + 1, draw.randint(0, SLOT)))
        size = 8 if kind in (WrOpcode.ATOMIC_FETCH_AND_ADD, WrOpcode.ATOMIC_CMP_AND_SWP) else min(size, longest)
        signalled = draw.random() < 0.7
        return Message(index, kind, size, draw.randbytes(size), draw.randrange(1, 1 << 32), signalled)

    def _post(self, here: Side) -> None:
        """Schedule the requests and receives of `here` in the world; receives may come late and cause RNR NAKs."""
        draw, at = self.random, self.world.now
        there = here.peer
        assert there is not None
        for message in here.messages:
            here.prepare(message)
            at += draw.choice((0.0, 0.0, 5e-6, 300e-6))
            self.world.at(at, lambda message=message: self._request(here, message))  # type: ignore[misc]
        late = self.world.now
        for slot in range(sum(message.receives for message in here.messages)):
            if self.kind == QpType.RC:
                late += draw.choice((0.0, 0.0, 0.0, 2e-3))
            self.world.at(late, lambda slot=slot: self._receive(there, slot))  # type: ignore[misc]

    def _receive(self, side: Side, slot: int) -> None:
        at = side.receive_at(slot)
        cut = self.random.choice((0, 0, 100))
        sges = (Sge(at, cut, 2), Sge(at + cut, SLOT - cut, 2)) if cut else (Sge(at, SLOT, 2),)
        side.end.rq.posted.append(RecvWqe(slot, SLOT, sges))

    def _request(self, side: Side, message: Message) -> None:
        flags = int(SendFlag.SIGNALED) if message.signalled else 0
        if self.random.random() < 0.1:
            flags |= SendFlag.FENCE
        more = side.request(message)
        if self.kind == QpType.UD:
            assert side.peer is not None
            more["destination"] = (1, side.peer.end.attributes.qpn, QKEY)
        side.end.post(message.kind, message.index, flags=flags, **more)

    # -- migration -------------------------------------------------------------------------------------------------

    def _plan_move(self) -> None:
        draw = self.random
        side = draw.choice(draw.choice(self.pairs))
        begin = self.world.now + draw.random() * draw.choice((50e-6, 2e-3))
        duration = draw.choice((20e-6, 1e-3, 0.2))
        rolled_back, keep = draw.random() < 0.25, draw.random() < 0.5
        self.world.at(begin, side.end.qp.stop)
        self.world.at(begin + duration, lambda: self._arrive(side, rolled_back, keep))

    def _arrive(self, side: Side, rolled_back: bool, keep: bool) -> None:
        end = side.end
        self.migrations += 1
        if end.attributes.state == QpState.ERR:
            return
        if rolled_back:
            end.qp.resume(None)
            return
        old = end.host
        new = Host(3, old.engine.config)
        new.engine.port_mtu = MTU
        new.room = old.room
        self.world.hosts.append(new)
        state = QueuePairState.from_plain(end.state.to_plain())
        old.engine.remove_qp(state.attributes.qpn)
        path = state.attributes.path
        assert path is not None
        if keep or self.ipv6:
            self.world.location[path.source_ip] = new
            path = path.replace(source_mac=mac(3))
        else:
            self.world.location[ip(3)] = new
            path = path.replace(source_mac=mac(3), source_ip=ip(3))
        end.qp = make_queue_pair(state, end.sq, end.rq, end.scq, end.rcq, end.pd, end.events)
        end.host = new
        new.engine.add_qp(end.qp)
        end.qp.resume(path)

    # -- run -------------------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Run the schedule until every side is done and check its invariants. Raises Violation."""
        if self.migrate and self.plan.qps == 1:
            self._plan_move()
        start = self.world.now
        sides = [side for pair in self.pairs for side in pair]
        try:
            self.world.run(lambda: all(side.done for side in sides), TIME_LIMIT)
        except Stuck as stuck:
            raise Violation(f"it does not end: {stuck}") from None
        if self.kind != QpType.RC:
            self.world.settle(0.01)
        for side in sides:
            self._check_end(side)
        return Outcome(
            self.seed,
            self.service,
            len(self.world.trace),
            sum(len(side.end.scq.entries) + len(side.end.rcq.entries) for side in sides),
            self.migrations,
            self.world.now - start,
            dict(self.link.faults),
            self.link.log or [],
        )

    def _check_end(self, side: Side) -> None:
        """Check invariants 4 and 6 when the schedule has ended."""
        if side.failed and not self.finite:
            raise Violation(f"an error without a reason: {side.failed}")
        side.check_memory(exact=self.kind == QpType.RC and not self.finite)


__all__ = ["CELL", "CELLS", "SOURCE", "Outcome", "Plan", "Schedule", "Violation"]
