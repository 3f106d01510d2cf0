"""How sure a measured correlation between two sparse latents is."""

from __future__ import annotations

import math
from collections.abc import Sequence

STANDARD_ERROR = 1.32
"""SE(atanh r) ~ 1.32 / sqrt(U - 3) with U union-firing tokens (SCIENCE: calibrated on planted pairs).
Fisher's 1 / sqrt(n - 3)
over all tokens is 12 to 123 times too small: tokens on which neither fires say almost nothing."""
TWO_SIDED_95 = 1.959963984540054
ONE_SIDED_95 = 1.6448536269514722
JACKKNIFE_95 = 2.131
"""Two-sided 95 % quantile of Student's t with 15 degrees of freedom: 16 groups of sequences."""
NEARLY_ONE = 1 - 1e-15


def correlation_bounds(correlation: float, support: int, error: float | None = None) -> tuple[float, float]:
    """(lower, upper) 95 % bounds of a correlation seen on `support` union-firing tokens; (-1, 1) below 4
    tokens.

    Args:
        error: the pair's own standard error of atanh(r), by a jackknife over 16 groups; None takes the rule of thumb, which is
            too small for amplitudes of heavy tails.
    """
    if support <= 3:
        return -1.0, 1.0
    z = math.atanh(max(-NEARLY_ONE, min(NEARLY_ONE, correlation)))
    half = TWO_SIDED_95 * STANDARD_ERROR / math.sqrt(support - 3) if error is None else JACKKNIFE_95 * error
    # The transform rounds; a bound never crosses the value that it bounds.
    return min(correlation, math.tanh(z - half)), max(correlation, math.tanh(z + half))


def pooled_lower_bound(blocks: Sequence[tuple[float, float, float]]) -> float:
    """Lower 95 % bound of the correlation over disjoint blocks, each (r, its standard error, weight).

    Correlations are averaged as they are: atanh of a block in which no mismatch was seen would outweigh all others.
    """
    total = sum(weight for _, _, weight in blocks)
    r = sum(weight * value for value, _, weight in blocks) / total
    error = math.sqrt(sum((weight * error) ** 2 for _, error, weight in blocks)) / total
    r = max(-NEARLY_ONE, min(NEARLY_ONE, r))
    return math.tanh(math.atanh(r) - ONE_SIDED_95 * error / (1 - r * r))
