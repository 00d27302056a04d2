"""Number formats of the live view and the report, for times, sizes, rates and counts."""

from __future__ import annotations


def count(value: int | None) -> str:
    """A count with thousands separators: 1234567 → `1,234,567`; None → `–`."""
    return "–" if value is None else f"{value:,}"


def size(value: float | None) -> str:
    """Bytes with a binary prefix and three significant digits: 4404019 → `4.20 MiB`; None → `–`."""
    if value is None:
        return "–"
    amount, unit = float(value), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if amount < 1000:
            break
        amount, unit = amount / 1024, larger
    return f"{amount:.0f} B" if unit == "B" else f"{amount:.{_places(amount)}f} {unit}"


def rate(bytes_per_second: float | None) -> str:
    """Bits per second with a decimal prefix, as link speeds are given: 1.25e8 → `1.00 Gbit/s`; None → `–`."""
    if bytes_per_second is None:
        return "–"
    amount, unit = bytes_per_second * 8, "bit/s"
    for larger in ("kbit/s", "Mbit/s", "Gbit/s"):
        if amount < 1000:
            break
        amount, unit = amount / 1000, larger
    return f"{amount:.0f} bit/s" if unit == "bit/s" else f"{amount:.{_places(amount)}f} {unit}"


def ms(value: float | None) -> str:
    """Milliseconds with three significant digits, at most two decimals: 0.0312 → `0.03`, 1234.5 → `1,234`."""
    return "–" if value is None else f"{value:,.{_places(abs(value))}f}"


def seconds(value: float | None) -> str:
    """Seconds with two decimals; None → `–`."""
    return "–" if value is None else f"{value:,.2f}"


def _places(amount: float) -> int:
    return 2 if amount < 10 else 1 if amount < 100 else 0
