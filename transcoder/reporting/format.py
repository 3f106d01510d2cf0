"""Figures as people read them."""

from __future__ import annotations

import math

MISSING = "–"
MOST_STEPS = 1 << 62


def as_float(value: float) -> float:
    """`value` as a float; a whole number beyond floats (a damaged file) is infinite, of its sign."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def whole(value: object) -> int | None:
    """`value` where it is a number of steps or the like, else None: no bool, nothing that an int64 could not hold."""
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < MOST_STEPS else None


def real(value: object) -> float | None:
    """`value` where it is a finite number, else None."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    found = as_float(value)
    return found if math.isfinite(found) else None


def number(value: float | None) -> str:
    """Four significant digits, whole numbers in full, '–' for what is not known (never 0).

    >>> number(0.123456), number(18432.0), number(1.2e9), number(0.00001234), number(None)
    ('0.1235', '18,432', '1.2G', '1.23e-05', '–')
    """
    if value is None:
        return MISSING
    value = as_float(value)
    if not math.isfinite(value):
        return "not finite"
    if value.is_integer() or abs(value) >= 1e3:
        return f"{value:,.0f}" if abs(value) < 1e7 else thousands(value)
    return f"{value:.2e}" if abs(value) < 1e-3 else f"{value:.4g}"


def percent(value: float | None) -> str:
    """A share as percent: 0.0213 is '2.1 %'."""
    if value is None or not math.isfinite(value):
        return number(value)
    share = 100 * value
    return f"{share:.0f} %" if share == round(share) or abs(share) >= 99.95 else f"{share:.1f} %"


def thousands(value: float) -> str:
    """12345 as '12.3k', 4.2e6 as '4.2M'."""
    if not math.isfinite(value):
        return "?"
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def clock(seconds: float) -> str:
    """3671 s as '1:01:11'."""
    if not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(int(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}" if hour else f"{minute}:{second:02d}"
