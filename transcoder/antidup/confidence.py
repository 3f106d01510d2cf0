"""How sure a measured correlation between two sparse latents is."""

from __future__ import annotations

import math

STANDARD_ERROR = 1.32
"""SE(atanh r) ~ 1.32 / sqrt(U - 3) with U union-firing tokens (SCIENCE: calibrated on planted pairs).
Fisher's 1 / sqrt(n - 3)
over all tokens is 12 to 123 times too small: tokens on which neither fires say almost nothing."""
TWO_SIDED_95 = 1.959963984540054
_NEARLY_ONE = 1 - 1e-15


def correlation_bounds(correlation: float, support: int) -> tuple[float, float]:
    """(lower, upper) 95 % bounds of a correlation seen on `support` union-firing tokens; (-1, 1) below 4
    tokens."""
    if support <= 3:
        return -1.0, 1.0
    z = math.atanh(max(-_NEARLY_ONE, min(_NEARLY_ONE, correlation)))
    half = TWO_SIDED_95 * STANDARD_ERROR / math.sqrt(support - 3)
    # The transform rounds; a bound never crosses the value that it bounds.
    return min(correlation, math.tanh(z - half)), max(correlation, math.tanh(z + half))
