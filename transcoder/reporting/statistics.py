"""Intervals of repeated measurements by Student's t."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def half_width(values: Sequence[float], level: float = 0.95) -> float:
    """Half the confidence interval of the mean of two or more independent values: Student's quantile times the standard error.

    Equivalent to `scipy.stats.t.ppf((1 + level) / 2, n - 1) * stdev(values) / sqrt(n)`.
    """
    # scipy.stats takes five times as long to import as this function of it.
    from scipy.special import stdtrit

    quantile = float(stdtrit(len(values) - 1, (1 + level) / 2))
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def interval(values: Sequence[float]) -> dict[str, float | None]:
    """Mean of independent values with its 95 % interval: {"mean", "low", "high"}; the bounds of one value are None."""
    mean = statistics.fmean(values)
    half = half_width(values) if len(values) > 1 else None
    return {"mean": mean, "low": None if half is None else mean - half, "high": None if half is None else mean + half}
