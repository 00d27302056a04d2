"""Numbers never clash, keys open exactly what they should (IBA 10.6.3).

Invariants: two NICs with different bases never give the same number; a key opens its own region, to its own protection
domain, within its bounds, for its access, and nothing else.
"""

from __future__ import annotations

import errno

import pytest

from softroce_ext.device import limits
from softroce_ext.device.errors import VerbsError
from softroce_ext.device.memory import ProcessMemory
from softroce_ext.device.numbers import FIRST_QPN, MAX_BASE, Handles, Range
from softroce_ext.device.regions import Keys, MemoryRegion, MemoryWindow, ProtectionDomain, check_access
from softroce_ext.transport.interfaces import ProtectionError, SendWqe
from softroce_ext.transport.verbs import WrOpcode

MEMORY = ProcessMemory(0)


def test_ranges_of_all_bases_are_disjoint_and_fit_24_bits() -> None:
    """Every number of every base, at the edges."""
    previous = -1
    for base in range(MAX_BASE + 1):
        numbers = Range(base, FIRST_QPN)
        first = numbers.take(())
        last = max(numbers.take(()) for _ in range(65536 - FIRST_QPN - 1))
        assert previous < first <= last < 1 << 24
        previous = last


def test_a_range_skips_what_is_taken_and_says_when_it_is_empty() -> None:
    """No number twice; none before the range has been gone round."""
    numbers = Range(0, 1, 4)
    assert [numbers.take({2}) for _ in range(4)] == [1, 3, 4, 1]
    with pytest.raises(VerbsError) as caught:
        numbers.take({1, 2, 3, 4})
    assert caught.value.number == errno.ENOMEM


def test_handles_reuse_the_smallest_and_can_be_claimed() -> None:
    """As the kernel's; after a restore, exactly the dumped ones are taken."""
    handles = Handles(4)
    assert [handles.take() for _ in range(4)] == [1, 2, 3, 4]
    with pytest.raises(VerbsError):
        handles.take()
    handles.give_back(3)
    handles.give_back(2)
    assert [handles.take(), handles.take()] == [2, 3]
    handles.claim([2, 4])
    assert [handles.take(), handles.take()] == [1, 3]


@pytest.fixture
def pd() -> ProtectionDomain:
    """A domain with region 0x101 (0x1000..0x2000 seen at 0x9000, write and remote write) and region 0x202 (read)."""
    keys: Keys = {}
    domain = ProtectionDomain(keys)
    keys[1] = MemoryRegion(domain, MEMORY, 0x101, 0x1000, 0x1000, 0x9000, 3)
    keys[2] = MemoryRegion(domain, MEMORY, 0x202, 0x5000, 0x100, 0x5000, 4)
    keys[3] = MemoryRegion(ProtectionDomain(keys), MEMORY, 0x303, 0x1000, 0x1000, 0x1000, 3)
    return domain


@pytest.mark.parametrize(
    ("key", "address", "length", "access", "opens"),
    [
        (0x101, 0x9000, 0x1000, 1, True),
        (0x101, 0x9000, 0x1000, 2, True),
        (0x101, 0x9FFF, 1, 0, True),
        (0x101, 0x9FFF, 2, 0, False),
        (0x101, 0x8FFF, 2, 0, False),
        (0x101, 0x1000, 8, 0, False),
        (0x101, 0x9000, 8, 4, False),
        (0x102, 0x9000, 8, 0, False),
        (0x202, 0x5000, 8, 4, True),
        (0x202, 0x5000, 8, 1, False),
        (0x303, 0x1000, 8, 0, False),
        (0x999, 0x1000, 8, 0, False),
        (0, 0, 0, 0, False),
    ],
)
def test_keys(pd: ProtectionDomain, key: int, address: int, length: int, access: int, opens: bool) -> None:
    """Bounds, key byte, access bits, domain; the address comes out in the program's own terms."""
    for look_up, *more in ((pd.local,), (pd.remote, 77)):
        if opens:
            assert look_up(key, address, length, access, *more)[1] == (address - 0x8000 if key == 0x101 else address)
        else:
            with pytest.raises(ProtectionError):
                look_up(key, address, length, access, *more)


def bind(window: int, address: int, length: int, lkey: int, access: int, new_key: int) -> SendWqe:
    """A BIND_MW request as the rings give it."""
    return SendWqe(0, WrOpcode.BIND_MW, 0, 0, length, (), None, address, new_key, lkey, window << 32 | access, None)


def test_a_window_opens_its_part_until_it_is_invalidated(pd: ProtectionDomain) -> None:
    """Type 2: bind changes the key byte, only the binding queue pair uses it and invalidates, then it binds again."""
    region = pd.keys[1]
    region.access |= 16
    pd.keys[4] = window = MemoryWindow(pd, 0x400, 2)
    with pytest.raises(ProtectionError):
        pd.remote(0x400, 0x9000, 1, 2, 77)
    pd.local_operation(bind(0x400, 0x9100, 16, 0x101, 2, 0x407), 77)
    assert window.key == 0x407
    assert pd.remote(0x407, 0x9100, 16, 2, 77)[1] == 0x1100
    with pytest.raises(ProtectionError):
        pd.remote(0x407, 0x9100, 16, 2, 78)
    for key, address, length, access in ((0x400, 0x9100, 1, 2), (0x407, 0x90FF, 2, 2), (0x407, 0x9100, 16, 4)):
        with pytest.raises(ProtectionError):
            pd.remote(key, address, length, access, 77)
    with pytest.raises(ProtectionError):
        pd.local(0x407, 0x9100, 1, 0)
    with pytest.raises(ProtectionError):
        pd.local_operation(bind(0x407, 0x9100, 16, 0x101, 2, 0x408), 77)
    with pytest.raises(ProtectionError):
        pd.invalidate(0x407, 78)
    pd.invalidate(0x407, 77)
    with pytest.raises(ProtectionError):
        pd.remote(0x407, 0x9100, 1, 2, 77)
    assert region.windows == 0  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda pd: setattr(pd.keys[1], "access", 3), "the region does not allow windows"),
        (lambda pd: setattr(pd.keys[1], "access", 16), "needs a region with local write"),
        (lambda pd: setattr(pd.keys[1], "end", 0x9101), "reaches beyond"),
        (lambda pd: setattr(pd.keys[1], "key", 0x1FF), "no region with lkey"),
    ],
)
def test_binds_that_are_refused(pd: ProtectionDomain, change: object, why: str) -> None:
    """Each reason, and the window stays unbound."""
    pd.keys[1].access |= 16
    pd.keys[4] = window = MemoryWindow(pd, 0x400, 1)
    change(pd)  # type: ignore[operator]
    with pytest.raises(ProtectionError, match=why):
        pd.local_operation(bind(0x400, 0x9100, 16, 0x101, 2, 0x407), 77)
    assert window.region is None


@pytest.mark.parametrize(("access", "number"), [(2, errno.EINVAL), (8, errno.EINVAL), (1 << 6, errno.EINVAL)])
def test_access_flags_that_no_region_has(access: int, number: int) -> None:
    """Remote write without local write; on-demand paging."""
    with pytest.raises(VerbsError) as caught:
        check_access(access)
    assert caught.value.number == number


@pytest.mark.parametrize(
    ("interface", "active"),
    [(1104, 1024), (1103, 512), (1500, 1024), (2128, 2048), (4175, 2048), (4176, 4096), (9000, 4096)],
)
def test_active_mtu(interface: int, active: int) -> None:
    """The largest IB MTU that fits with 80 bytes of headers, as Linux rxe chooses."""
    assert limits.MTU_BYTES[limits.active_mtu(interface)] == active
