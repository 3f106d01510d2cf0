"""95 % intervals of what the table says, as text behind a value; empty where there is nothing to take one from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean

from transcoder.reporting.statistics import interval

NORMAL_95 = 1.96


def of_share(hits: int, of: int, scale: float = 1.0, digits: int = 4) -> str:
    """Wilson's interval of a share of independent cases, times `scale`."""
    if of == 0:
        return ""
    z, p = NORMAL_95 / math.sqrt(of), hits / of
    middle, half = p + z * z / 2, z * math.sqrt(p * (1 - p) + z * z / 4)
    low, high = ((middle + side * half) / (1 + z * z) for side in (-1, 1))
    return _told(scale * max(0.0, low), scale * min(1.0, high), digits)


def of_mean(values: Sequence[float]) -> str:
    """Half of Student's interval of a mean over seeds, as \"+-\"."""
    found = interval(list(values))
    return "" if found["high"] is None or found["mean"] is None else f"+-{found['high'] - found['mean']:.2g}"


def of_two(a: Sequence[float], b: Sequence[float], figure: Callable[[float, float], float]) -> str:
    """Of figure(mean of a, mean of b), a and b paired by seed: Student's interval over the jackknife's pseudo-values."""
    n = len(a)
    if n < 3:
        return ""
    whole = figure(fmean(a), fmean(b))
    without = [figure(fmean([*a[:s], *a[s + 1 :]]), fmean([*b[:s], *b[s + 1 :]])) for s in range(n)]
    found = interval([n * whole - (n - 1) * part for part in without])
    if found["low"] is None or found["high"] is None:
        return ""
    return _told(found["low"], found["high"])


def _told(low: float, high: float, digits: int = 4) -> str:
    return f" [{low:.{digits}g}, {high:.{digits}g}]"
