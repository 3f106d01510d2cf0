"""What is said of repeated measurements: medians and quartiles of single times, totals and intervals of long ones."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from transcoder.reporting.statistics import half_width


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
