"""What a port says of the interface below it.

Invariant: the numbers are those that Linux rxe (kernel 6.1) was seen to give.
"""

from __future__ import annotations

import struct
from types import SimpleNamespace
from typing import Any

import pytest

from softroce_ext.device.adapter import Adapter
from softroce_ext.device.link import Link
from softroce_ext.port.ethtool import link_speed
from softroce_ext.transport.engine import Engine
from softroce_ext.uverbs import abi

SDR, DDR, FDR10, EDR = 1, 2, 8, 32


@pytest.mark.parametrize(
    ("speed", "width", "code", "text"),
    [
        (None, 1, SDR, "2.5 Gb/sec (1X SDR)"), (10, 1, SDR, "2.5 Gb/sec (1X SDR)"),
        (1000, 1, SDR, "2.5 Gb/sec (1X SDR)"), (2500, 1, FDR10, "10 Gb/sec (1X FDR10)"),
        (10000, 1, FDR10, "10 Gb/sec (1X FDR10)"), (20000, 2, DDR, "20 Gb/sec (4X DDR)"),
        (25000, 1, EDR, "25 Gb/sec (1X EDR)"), (40000, 2, FDR10, "40 Gb/sec (4X FDR10)"),
        (50000, 2, EDR, "100 Gb/sec (4X EDR)"), (200000, 2, EDR, "100 Gb/sec (4X EDR)"),
    ],
)  # fmt: skip
def test_rates(speed: int | None, width: int, code: int, text: str) -> None:
    rate = Link(speed=speed).rate
    assert (rate.width, rate.speed, rate.text) == (width, code, text)


@pytest.mark.parametrize(
    ("up", "carrier", "state", "phys_state"), [(True, True, 4, 5), (True, False, 1, 2), (False, False, 1, 3)]
)
def test_states(up: bool, carrier: bool, state: int, phys_state: int) -> None:
    link = Link(up, carrier)
    assert (link.state, link.phys_state) == (state, phys_state)


def test_an_adapter_says_what_its_interface_is_like() -> None:
    """MTU, state and speed in ibv_query_port; the files are told of a change, also of one that only a query finds."""
    told: list[Link] = []
    host: Any = SimpleNamespace(
        resolve=None, group_changed=None, link_speed=lambda: None, link_changed=lambda: told.append(adapter.link)
    )
    adapter = Adapter(Engine(), bytes(6), 9000, 1, host)

    def port() -> tuple[int, ...]:
        """state, active_mtu, active_width, active_speed, phys_state."""
        fields = struct.unpack("<IIIIIHHHBBBBBBBBBBBBBB", abi.port_attributes(adapter))
        return fields[8], fields[10], *fields[16:19]

    assert port() == (4, 5, 1, SDR, 5)
    adapter.set_link(Link(True, False, 1500))
    assert port() == (1, 3, 1, SDR, 2)
    assert adapter.engine.port_mtu == 1024
    assert adapter.engine.counters["link_downed"] == 1
    assert len(told) == 1
    host.link_speed = lambda: 40000
    assert port() == (1, 3, 2, FDR10, 2)
    assert len(told) == 2


def test_a_port_counts_wrong_keys() -> None:
    """As rxe does: P_Keys and Q_Keys that were refused, up to 65535."""
    host: Any = SimpleNamespace(resolve=None, group_changed=None, link_speed=lambda: None)
    adapter = Adapter(Engine(), bytes(6), 9000, 1, host)
    adapter.engine.counters["refused_pkey"] = 3
    adapter.engine.counters["refused_qkey"] = 70000
    assert struct.unpack_from("<IIII", abi.port_attributes(adapter))[2:] == (3, 65535)


def test_the_speed_of_an_interface_that_has_none() -> None:
    assert link_speed("lo") is None
    assert link_speed("no-such-interface") is None
