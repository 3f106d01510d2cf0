"""The bounds against their formulas, number for number."""

from __future__ import annotations

import math

import pytest
import torch

from transcoder.antidup.monitor import _scaled
from transcoder.antidup.pair_errors import PairErrors, correlation_bounds, pooled_lower_bound


def test_bounds_are_those_of_the_formula() -> None:
    half = 1.959964 * 1.32 / math.sqrt(103 - 3)
    assert correlation_bounds(0.8, 103) == pytest.approx(
        (math.tanh(math.atanh(0.8) - half), math.tanh(math.atanh(0.8) + half)), rel=1e-5
    )
    # Of 16 groups: Student's t with 15 degrees of freedom.
    assert correlation_bounds(0.8, 103, 0.1) == pytest.approx(
        (math.tanh(math.atanh(0.8) - 0.2131), math.tanh(math.atanh(0.8) + 0.2131)), rel=1e-4
    )
    assert correlation_bounds(0.8, 3) == (-1, 1)


def test_blocks_are_pooled_by_their_weights() -> None:
    r = (300 * 0.9 + 100 * 0.8) / 400
    error = math.sqrt((300 * 0.02) ** 2 + (100 * 0.05) ** 2) / 400
    wanted = math.tanh(math.atanh(r) - 1.644854 * error / (1 - r * r))
    assert pooled_lower_bound([(0.9, 0.02, 300.0), (0.8, 0.05, 100.0)]) == pytest.approx(wanted, rel=1e-5)


def test_an_error_of_part_of_the_tokens_is_scaled_to_all_of_them_or_not_believed() -> None:
    error = torch.tensor([0.1, 0.1, 0.1, 0.1], dtype=torch.float64)
    found = PairErrors(error, error, torch.tensor([400.0, 100.0, 99.0, 500.0], dtype=torch.float64))
    scaled = _scaled(found, found.fisher, torch.full((4,), 400.0, dtype=torch.float64))
    assert scaled[[0, 1, 3]].tolist() == pytest.approx([0.1, 0.05, 0.1])
    assert bool(scaled[2].isnan())
