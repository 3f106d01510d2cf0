"""The optimizer step of backend `triton` against its float64 definition and against torch.optim.Adam."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from transcoder.kernels.adam.op import AdamUpdate
from transcoder.kernels.adam.reference import adam_step_reference

EPS = torch.finfo(torch.float32).eps
BY = {"betas": (0.9, 0.999), "eps": 1e-8}


@pytest.mark.usefixtures("interpreted_again")
def test_in_the_interpreter() -> None:
    """In a process of its own."""


class Case:
    """Parameters (W_enc, b_enc, unit rows W_dec, b_dec), state and the gradients of each step."""

    def __init__(self, device: torch.device, columns: int, latents: int = 9) -> None:
        self.generator = torch.Generator().manual_seed(columns)
        shapes = ((latents, 20), (latents,), (latents, columns), (columns,))
        self.parameters = [torch.randn(s, generator=self.generator) for s in shapes]
        self.parameters[2] = torch.nn.functional.normalize(self.parameters[2])
        self.parameters = [p.to(device) for p in self.parameters]
        self.first, self.second = ([torch.zeros_like(p) for p in self.parameters] for _ in range(2))
        self.steps = [torch.zeros((), device=device) for _ in self.parameters]
        self.bad = torch.zeros((), dtype=torch.bool, device=device)

    def gradients(self, scale: float) -> list[Tensor]:
        return [(torch.randn(p.shape, generator=self.generator) * scale).to(p.device) for p in self.parameters]

    def run(self, gradients: list[Tensor], lr: float | Tensor, max_norm: float, guarded: bool = True) -> Tensor:
        from transcoder.kernels.adam.triton_backend import adam_step

        for p, gradient in zip(self.parameters, gradients, strict=True):
            p.grad = gradient
        state = (self.parameters, self.first, self.second, self.steps)
        bad = self.bad if guarded else None
        return adam_step(AdamUpdate(*state, unit_rows=2, lr=lr, max_norm=max_norm, bad=bad, **BY))

    def tensors(self) -> list[Tensor]:
        return [t.clone() for t in (*self.parameters, *self.first, *self.second, *self.steps)]


def near(found: Tensor, exact: Tensor, ulps: float, scale: float | None = None) -> None:
    size = float(exact.abs().max()) if scale is None else scale
    assert float((found.double() - exact).abs().max()) <= ulps * EPS * size


@pytest.mark.interpreted
@pytest.mark.parametrize("max_norm", [1.0, math.inf])
@pytest.mark.parametrize("columns", [2, 37, 4097])
def test_three_steps_are_the_definition(columns: int, max_norm: float, triton_device: torch.device) -> None:
    case = Case(triton_device, columns)
    for step in (1, 2, 3):
        gradients, lr = case.gradients(10.0**-step), 1e-2 / step
        given = (case.parameters, gradients, case.first, case.second, step)
        want = adam_step_reference(*given, unit_rows=2, lr=lr, max_norm=max_norm, **BY)
        norm = case.run(gradients, lr, max_norm)
        near(norm, want.norm, 4)
        for i in range(4):
            # Adam divides: an element whose tangent gradient all but cancels carries that rounding times lr / |g|.
            near(case.parameters[i], want.parameters[i], 60 if i == 2 else 4)
            near(case.first[i], want.exp_avgs[i], 8)
            near(case.second[i], want.exp_avg_sqs[i], 8)
        assert [float(s) for s in case.steps] == [step] * 4
    lengths = case.parameters[2].double().norm(dim=1)
    assert float((lengths - 1).abs().max()) <= 4 * EPS


@pytest.mark.interpreted
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", range(4))
def test_a_bad_gradient_leaves_everything(bad: float, where: int, triton_device: torch.device) -> None:
    case = Case(triton_device, 5)
    case.run(case.gradients(1.0), 1e-2, 1.0)
    before, gradients = case.tensors(), case.gradients(1.0)
    gradients[where].view(-1)[-1] = bad
    norm = case.run(gradients, 1e-2, 1.0)
    assert not math.isfinite(float(norm))
    assert bool(case.bad)
    assert all(torch.equal(a, b) for a, b in zip(before, case.tensors(), strict=True))


@pytest.mark.interpreted
def test_a_flag_that_is_set_holds_and_no_flag_changes_no_bit(triton_device: torch.device) -> None:
    guarded, free = Case(triton_device, 33), Case(triton_device, 33)
    rate = torch.tensor(1e-2, dtype=torch.float64, device=triton_device)
    for _ in range(2):
        a = guarded.run(guarded.gradients(1.0), 1e-2, 1.0)
        b = free.run(free.gradients(1.0), rate, 1.0, guarded=False)
        assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(guarded.tensors(), free.tensors(), strict=True))
    guarded.bad.fill_(True)
    guarded.run(guarded.gradients(1.0), 1e-2, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(guarded.tensors(), free.tensors(), strict=True))


@pytest.mark.interpreted
def test_a_row_without_a_direction_stays_zero(triton_device: torch.device) -> None:
    case = Case(triton_device, 9)
    case.parameters[2][3] = 0
    gradients = case.gradients(1.0)
    gradients[2][3] = 0
    case.run(gradients, 1e-2, 1.0)
    assert not bool(case.parameters[2][3].any())
    assert bool(torch.isfinite(case.parameters[2]).all())
