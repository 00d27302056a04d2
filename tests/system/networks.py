"""Two topologies, and a network that is there for as long as a test needs it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from testbed.cleanup.state import RunState
from testbed.network import Network
from testbed.topology import parse, resolve

RING = """
name: ring
hosts: {h1: {}, h2: {}, h3: {}, h4: {}}
switches: [s1, s2, s3, s4]
links:
  - [h1, s1]
  - [h2, s2]
  - [h3, s3]
  - [h4, s4]
  - [s1, s2]
  - [s2, s3]
  - [s3, s4]
  - [s4, s1]
"""
PAIR = """
name: pair
hosts: {h1: {}, h2: {}}
switches: [s1]
links: [[h1, s1], {ends: [h2, s1], bw: BW}]
"""


@contextmanager
def running(text: str, folder: Path) -> Iterator[Network]:
    """A started network; afterwards nothing is left, whatever happened."""
    mark = os.environ.get("MIGROS_TESTBED_RUN")
    state = RunState.create(f"test-{secrets.token_hex(4)}")
    network = Network(resolve(parse(text)), folder, state)
    try:
        network.start()
        yield network
    finally:
        network.stop()
        state.close()
        os.environ.pop("MIGROS_TESTBED_RUN")
        if mark is not None:
            os.environ["MIGROS_TESTBED_RUN"] = mark
