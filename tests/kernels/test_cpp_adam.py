"""The optimizer step of backend `cpp` leaves everything as it is where a gradient is NaN or Inf: its own norm says so."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from transcoder.kernels import extension
from transcoder.kernels.adam import cpp_backend
from transcoder.kernels.adam.op import AdamUpdate, adam_step

pytestmark = pytest.mark.skipif(not extension.usable(), reason="no compiler")
SHAPES = [(37,), (200, 130), (90, 70), (3, 5, 7)]
UNIT = 2


class State:
    def __init__(self, dtype: torch.dtype) -> None:
        g = torch.Generator().manual_seed(0)
        self.parameters = [torch.randn(shape, generator=g).to(dtype) for shape in SHAPES]
        self.parameters[UNIT] /= self.parameters[UNIT].norm(dim=1, keepdim=True)
        self.parameters[UNIT][4] = 0
        for p in self.parameters:
            p.grad = torch.randn(p.shape, generator=g).to(dtype)
        self.firsts, self.seconds = ([torch.rand(shape, generator=g).to(dtype) for shape in SHAPES] for _ in range(2))
        self.steps = [torch.full((), 3.0) for _ in SHAPES]

    def tensors(self) -> list[Tensor]:
        return [t.clone() for t in (*self.parameters, *self.firsts, *self.seconds, *self.steps)]

    def step(self, bad: Tensor | None) -> Tensor:
        by = {"unit_rows": UNIT, "lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "max_norm": 1.0, "bad": bad}
        return adam_step(cpp_backend, AdamUpdate(self.parameters, self.firsts, self.seconds, self.steps, **by))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("which", "place"), [(0, 0), (0, 36), (1, 25_999), (1, 16_384), (2, 0), (2, 4 * 70), (3, 104)])
def test_one_number_is_enough(which: int, place: int, dtype: torch.dtype, value: float) -> None:
    state, bad = State(dtype), torch.zeros((), dtype=torch.bool)
    grad = state.parameters[which].grad
    assert grad is not None
    grad.view(-1)[place] = value
    before = state.tensors()
    norm = state.step(bad)
    assert bool(bad)
    assert not math.isfinite(float(norm))
    assert all(torch.equal(now, then) for now, then in zip(state.tensors(), before, strict=True))


def test_a_step_that_is_known_to_be_bad_is_not_taken() -> None:
    state, bad = State(torch.float32), torch.ones((), dtype=torch.bool)
    before = state.tensors()
    assert math.isfinite(float(state.step(bad)))
    assert bool(bad)
    assert all(torch.equal(now, then) for now, then in zip(state.tensors(), before, strict=True))


def test_asking_changes_no_bit_of_a_good_step() -> None:
    asked, other, bad = State(torch.float32), State(torch.float32), torch.zeros((), dtype=torch.bool)
    assert torch.equal(asked.step(bad), other.step(None))
    assert not bool(bad)
    assert all(torch.equal(a, b) for a, b in zip(asked.tensors(), other.tensors(), strict=True))
    with pytest.raises((ValueError, RuntimeError), match="bad: expected one bool"):
        asked.step(torch.zeros(()))
