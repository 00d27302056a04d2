"""A connected pair of RC queue pairs on two hosts, and the delivery of single batches of frames to either end."""

from __future__ import annotations

from typing import Any, NamedTuple

from softroce_ext.simulation.hosts import End, Host, connect, end
from softroce_ext.simulation.world import World
from softroce_ext.transport.verbs import WrOpcode

SEND, WRITE, READ = WrOpcode.SEND, WrOpcode.RDMA_WRITE, WrOpcode.RDMA_READ


class Pair(NamedTuple):
    world: World
    here: End
    there: End


def pair(**attributes: Any) -> Pair:
    a, b = Host(1), Host(2)
    here, there = end(a, 17), end(b, 18)
    connect(here, there, **attributes)
    here.ram.data[:1024] = bytes(range(256)) * 4
    return Pair(World(a, b), here, there)


def deliver(scene: Pair, frames: list[bytes], here: bool = False) -> None:
    """One batch arrives."""
    engine = (scene.here if here else scene.there).host.engine
    for frame in frames:
        engine.receive(memoryview(bytearray(frame)), 0.0)
    engine.end_of_batch(0.0)
