"""What every test shares: devices, tolerances (derived, never loosened to pass), seeds."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path

import pytest
import torch

# `bench` is imported from the checkout without the checkout on sys.path, where it would offer its folders to everyone.
_bench = ModuleSpec("bench", None, is_package=True)
_bench.submodule_search_locations = [str(Path(__file__).resolve().parent.parent / "bench")]
sys.modules.setdefault("bench", module_from_spec(_bench))

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def close() -> Callable[..., None]:
    """close(actual, expected, length, scale=1): equal up to the rounding of sums of `length` terms of size `scale`.

    A sum of n rounded products is off by about sqrt(n) ulps of its largest partial sum (worst case n); 8 standard
    deviations of that random walk separate rounding from a wrong formula.
    """

    def check(actual: torch.Tensor, expected: torch.Tensor, length: int, scale: float = 1.0) -> None:
        eps = torch.finfo(actual.dtype).eps
        bound = 8 * eps * math.sqrt(max(1, length))
        torch.testing.assert_close(
            actual, expected.to(actual.dtype), atol=bound * scale * math.sqrt(max(1, length)), rtol=bound
        )

    return check
