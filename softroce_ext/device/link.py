"""The state of the network interface below a port, and the port attributes that follow from it (as in Linux rxe)."""

from __future__ import annotations

from typing import Final, NamedTuple

PORT_DOWN, PORT_ACTIVE = 1, 4
"""enum ib_port_state."""
PHYS_POLLING, PHYS_DISABLED, PHYS_LINK_UP = 2, 3, 5
"""enum ib_port_phys_state."""
STATE_TEXT: Final = {PORT_DOWN: "1: DOWN", PORT_ACTIVE: "4: ACTIVE"}
PHYS_TEXT: Final = {PHYS_POLLING: "2: Polling", PHYS_DISABLED: "3: Disabled", PHYS_LINK_UP: "5: LinkUp"}
"""As sysfs shows them."""


class Rate(NamedTuple):
    """One row of the table of rates."""

    above: int
    """The row is for interfaces faster than this (Mbit/s)."""
    width: int
    """enum ib_port_width: 1 is 1X, 2 is 4X."""
    speed: int
    """enum ib_port_speed."""
    text: str
    """The file `rate` of sysfs."""


RATES: Final = (
    Rate(40000, 2, 32, "100 Gb/sec (4X EDR)"),
    Rate(25000, 2, 8, "40 Gb/sec (4X FDR10)"),
    Rate(20000, 1, 32, "25 Gb/sec (1X EDR)"),
    Rate(10000, 2, 2, "20 Gb/sec (4X DDR)"),
    Rate(1000, 1, 8, "10 Gb/sec (1X FDR10)"),
    Rate(0, 1, 1, "2.5 Gb/sec (1X SDR)"),
)
"""Ethernet's speeds in InfiniBand's terms, fastest first; measured on rxe (kernel 6.1), which rounds 50 Gb/s up too."""


class Link(NamedTuple):
    """The interface's state."""

    up: bool = True
    """It is up (IFF_UP)."""
    carrier: bool = True
    """It has a carrier (IFF_LOWER_UP)."""
    mtu: int = 1500
    """Bytes."""
    speed: int | None = None
    """Mbit/s as ethtool reports it; None: unknown."""

    @property
    def active(self) -> bool:
        """Frames can pass."""
        return self.up and self.carrier

    @property
    def state(self) -> int:
        """enum ib_port_state."""
        return PORT_ACTIVE if self.active else PORT_DOWN

    @property
    def phys_state(self) -> int:
        """enum ib_port_phys_state."""
        if self.active:
            return PHYS_LINK_UP
        return PHYS_POLLING if self.up else PHYS_DISABLED

    @property
    def rate(self) -> Rate:
        """Width and speed; an unknown speed counts as 1 Gb/s."""
        speed = self.speed or 0
        return next(rate for rate in RATES if speed > rate.above or not rate.above)
