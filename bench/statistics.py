"""Statistics of repeated measurements: medians and quartiles of short ones, totals and intervals of long ones; and 95 %
intervals as text to put after a value (`of_...`), empty for too few measurements."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from transcoder.reporting.statistics import half_width, interval

NORMAL_95 = 1.96


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(samples) < 2:
        return {"median": samples[0], "low": samples[0], "high": samples[0]}
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


def ratios(samples: Sequence[float], to: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the ratio taken round by round."""
    return summary([a / b for a, b in zip(samples, to, strict=True)])


def whole_ratio(samples: Sequence[float], to: Sequence[float]) -> dict[str, float]:
    """Ratio of the totals, with a 95 % interval from the rounds, each of which timed both.

    A rare piece of work counts in a total at its true rate, where a median would leave it out. The interval is that of a ratio
    estimator: the rounds' deviations from the ratio, Student's t.
    """
    pairs = list(zip(samples, to, strict=True))
    ratio = math.fsum(samples) / math.fsum(to)
    return {"total": ratio, **_around(ratio, [(a - ratio * b) / statistics.fmean(to) for a, b in pairs])}


def mean(samples: Sequence[float]) -> dict[str, float]:
    """Mean with a 95 % interval."""
    middle = statistics.fmean(samples)
    return {"total": middle, **_around(middle, [a - middle for a in samples])}


def _around(middle: float, deviations: Sequence[float]) -> dict[str, float]:
    if len(deviations) < 2:
        return {"low": math.nan, "high": math.nan}
    reach = half_width(deviations)
    return {"low": middle - reach, "high": middle + reach}


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


def of_two(a: Sequence[float], b: Sequence[float], combine: Callable[[float, float], float]) -> str:
    """Of combine(mean of a, mean of b), a and b paired by seed: Student's interval over the jackknife's pseudo-values."""
    n = len(a)
    if n < 3:
        return ""
    whole = combine(statistics.fmean(a), statistics.fmean(b))
    without = [
        combine(statistics.fmean([*a[:s], *a[s + 1 :]]), statistics.fmean([*b[:s], *b[s + 1 :]])) for s in range(n)
    ]
    found = interval([n * whole - (n - 1) * part for part in without])
    if found["low"] is None or found["high"] is None:
        return ""
    return _told(found["low"], found["high"])


def _told(low: float, high: float, digits: int = 4) -> str:
    return f" [{low:.{digits}g}, {high:.{digits}g}]"
