"""Quantities as people read them: few digits, no powers of ten, one unit."""

from __future__ import annotations

_SPANS = ((3 * 86400, 86400, "days"), (5400, 3600, "h"), (90, 60, "min"), (1, 1, "s"), (0, 1e-3, "ms"))
"""(from so many seconds on, seconds of the unit, its name)."""


def figures(value: float) -> str:
    """Three digits, or all before the point: 0.28, 12.3, 1,570."""
    if value >= 99.5:
        return f"{value:,.0f}"
    return "< 0.001" if 0 < value < 0.001 else f"{value:.3g}"


def span(seconds: float) -> str:
    """A time: 0.136 ms, 89.3 h, 16.1 days."""
    size, unit = next((size, unit) for least, size, unit in _SPANS if seconds >= least)
    return f"{figures(seconds / size)} {unit}"


def money(dollars: float) -> str:
    """US dollars: < $0.01, $2.50, $2,144."""
    if 0 < dollars < 0.01:
        return "< $0.01"
    return f"${dollars:,.0f}" if dollars >= 10 else f"${dollars:.2f}"


def size(num_bytes: float) -> str:
    """Bytes: 14.5 MB, 60.1 GB."""
    return f"{figures(num_bytes / 1e9)} GB" if num_bytes >= 1e8 else f"{figures(num_bytes / 1e6)} MB"


def many(number: int, one: str, more: str) -> str:
    """1 micro-batch, 6 micro-batches."""
    return f"{number:,} {one if number == 1 else more}"


def count(value: float) -> str:
    """How many, in short: 64, 35.8 k, 12.8 G."""
    for least, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= least:
            return f"{figures(value / least)} {letter}"
    return figures(value)
