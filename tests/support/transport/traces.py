"""Traces of the simulated connection, recorded for tests of what reads and draws them."""

from __future__ import annotations

from pathlib import Path

from softroce_ext.simulation.link import Link
from softroce_ext.trace.queue_pairs import QpTrace
from tests.support.transport.scene import Scene


def record(folder: Path, link: Link) -> tuple[list[Path], Scene]:
    """Traces of both ends of the simulated connection's traffic over `link`."""
    scene = Scene(link)
    world = scene.world
    paths = [folder / f"h{host.number}.jsonl" for host in scene.hosts[:2]]
    traces = [
        QpTrace(host.engine, str(path), clock=lambda: world.now) for host, path in zip(scene.hosts, paths, strict=False)
    ]
    scene.finish()
    for trace in traces:
        trace.close()
    return paths, scene
