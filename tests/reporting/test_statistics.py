"""Student's intervals: those of scipy's own distribution."""

from __future__ import annotations

import numpy as np
import pytest

from transcoder.reporting.statistics import half_width, interval


@pytest.mark.parametrize("count", [2, 3, 10, 16, 400])
def test_intervals_are_those_of_scipys_distribution(count: int) -> None:
    from scipy import stats

    values = np.random.default_rng(count).normal(3, 2, count).tolist()
    low, high = stats.t.interval(0.95, count - 1, loc=np.mean(values), scale=stats.sem(values))
    found = interval(values)
    assert (found["low"], found["high"]) == (pytest.approx(low), pytest.approx(high))
    low, high = stats.t.interval(0.5, count - 1, loc=0, scale=stats.sem(values))
    assert half_width(values, 0.5) == pytest.approx(high)


def test_one_value_has_a_mean_only() -> None:
    assert interval([2.5]) == {"mean": 2.5, "low": None, "high": None}
