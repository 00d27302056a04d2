"""A connection with checked traffic, hosts to go to, and the move itself: shared by the tests of migration."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from softroce_ext.simulation.hosts import ALL_ACCESS, End, Host, connect, end, ip, mac, path_between, to_rts
from softroce_ext.simulation.link import Link
from softroce_ext.simulation.world import World
from softroce_ext.transport.engine import EngineConfig
from softroce_ext.transport.services import make_queue_pair
from softroce_ext.transport.state.queue_pair import QueuePairState
from softroce_ext.transport.verbs import WrOpcode
from softroce_ext.wire import opcodes as op
from softroce_ext.wire.headers import NAK_STOPPED
from tests.support.transport.traffic import MEMORY, Direction, Op

FORTH = [
    Op(WrOpcode.SEND, 700),
    Op(WrOpcode.RDMA_WRITE, 2000),
    Op(WrOpcode.RDMA_READ, 1500),
    Op(WrOpcode.ATOMIC_FETCH_AND_ADD, 8),
    Op(WrOpcode.RDMA_WRITE_WITH_IMM, 300),
    Op(WrOpcode.SEND, 0),
    Op(WrOpcode.RDMA_READ, 40),
    Op(WrOpcode.ATOMIC_FETCH_AND_ADD, 8),
    Op(WrOpcode.SEND_WITH_IMM, 1000),
]
BACK = [Op(WrOpcode.SEND, 900), Op(WrOpcode.RDMA_READ, 1200), Op(WrOpcode.RDMA_WRITE, 600), Op(WrOpcode.SEND, 10)]


def migrate(world: World, old: End, host: Host, *, keep_address: bool = True, restore_delay: float = 0.01) -> End:
    """The whole move of a stopped queue pair: dump through JSON, forget at the source, restore and resume elsewhere.

    `old` is changed in place: it is the same application, with its queue pair at another host.
    """
    assert old.movement.stopped
    plain = json.loads(json.dumps(old.state.to_plain()))
    old.host.engine.remove_qp(old.attributes.qpn)
    world.settle(restore_delay)
    return restore(world, old, plain, host, keep_address=keep_address)


def restore(world: World, old: End, plain: dict[str, Any], host: Host, *, keep_address: bool = True) -> End:
    """Restore a dumped queue pair on `host` with the application's memory and queues, reroute, and resume it."""
    state = QueuePairState.from_plain(plain)
    path = state.attributes.path
    assert path is not None
    # A new address belongs to no host: the host's own may still be in use by another queue pair that took it along.
    address = path.source_ip if keep_address else ip(100 + len(world.location))
    path = path.replace(source_mac=mac(host.number), source_ip=address)
    # The application's memory and queues move with its process: the same objects serve.
    qp = make_queue_pair(state, old.sq, old.rq, old.scq, old.rcq, old.pd, old.events)
    host.engine.add_qp(qp)
    world.location[address] = host
    qp.resume(path)
    old.qp, old.host = qp, host
    return old


class Scene:
    """Hosts 1 and 2 with a connection and its traffic; hosts 3 and 4 to go to."""

    def __init__(self, link: Link | None = None, configs: tuple[EngineConfig, EngineConfig] | None = None) -> None:
        first, second = configs or (EngineConfig(), EngineConfig())
        self.hosts = [Host(1, first), Host(2, second), Host(3, first), Host(4, second)]
        self.a, self.b = end(self.hosts[0], 17, MEMORY), end(self.hosts[1], 65553, MEMORY)
        connect(self.a, self.b, psn_a=0xFFFFFA, path_mtu=256)
        self.link = link or Link(spacing=1e-6)
        self.world = World(*self.hosts, link=self.link)
        self.forth = Direction(self.a, self.b, FORTH, 1)
        self.back = Direction(self.b, self.a, BACK, 2)

    def ends(self) -> bool:
        return self.forth.done() and self.back.done()

    def finish(self, limit: float = 300.0) -> None:
        self.world.run(self.ends, limit)
        self.world.settle(3)
        self.forth.check_end()
        self.back.check_end()
        for here, there in ((self.a, self.b), (self.b, self.a)):
            attributes = here.attributes
            movement = here.movement
            assert not (movement.stopped or movement.paused or movement.resume_pending)
            assert not here.events.seen
            assert attributes.path is not None and there.attributes.path is not None
            assert attributes.path.destination_ip == there.attributes.path.source_ip

    def step(self, number: int) -> None:
        for _ in range(number):
            self.world.step()

    def total(self, counter: str) -> int:
        return sum(host.engine.counters[counter] for host in self.hosts)


def undisturbed_steps() -> int:
    scene = Scene()
    steps = 0
    while not scene.ends():
        scene.world.step()
        steps += 1
    return steps


STEPS = undisturbed_steps()


def frames_of(world: World, wanted: Callable[[bytes], bool]) -> list[bytes]:
    return [frame for _, frame in world.trace if wanted(frame)]


def is_resume(frame: bytes) -> bool:
    return frame[42] == op.RESUME


def is_resume_ack(frame: bytes) -> bool:
    return frame[42] == op.ACKNOWLEDGE and bool(frame[50] & 0x20)


def is_nak_stopped(frame: bytes) -> bool:
    return frame[42] == op.ACKNOWLEDGE and frame[54] == NAK_STOPPED


def one_sided(scene_link: Link | None = None) -> tuple[World, End, End, Host]:
    """As perftest's servers do: `b` stays in RTR and only answers. Host 3 is free."""
    hosts = [Host(1), Host(2), Host(3)]
    a, b = end(hosts[0], 17, MEMORY), end(hosts[1], 65553, MEMORY)
    to_rts(a, path_between(a, b), 65553, sq_psn=0xFFFFF0, path_mtu=256)
    b.qp.modify({"qp_state": 1, "pkey_index": 0, "port_num": 1, "qp_access_flags": ALL_ACCESS})
    b.qp.modify(
        {
            "qp_state": 2, "path": path_between(b, a), "path_mtu": 256, "destination_qpn": 17, "rq_psn": 0xFFFFF0,
            "max_dest_rd_atomic": 16, "min_rnr_timer": 12,
        }
    )  # fmt: skip
    return World(*hosts, link=scene_link or Link(spacing=1e-6)), a, b, hosts[2]


def idle(config: EngineConfig | None = None) -> tuple[World, End, End, Host]:
    """A connection on which nothing was ever sent; `config` is that of the end `a`. Host 3 is free."""
    hosts = [Host(1, config), Host(2), Host(3)]
    a, b = end(hosts[0], 17, MEMORY), end(hosts[1], 65553, MEMORY)
    connect(a, b, path_mtu=256)
    return World(*hosts), a, b, hosts[2]
