"""The definition of the optimizer step, in float64, out of place. Slow and obvious."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class AdamStep(NamedTuple):
    parameters: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    norm: Tensor
    """Norm of all gradients before clipping, without the component along the unit rows."""


def adam_step_reference(
    parameters: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    step: int,
    *,
    unit_rows: int | None,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    max_norm: float,
) -> AdamStep:
    """Parameters and moments after step number `step` (from 1) (Kingma and Ba, 2015, algorithm 1)."""
    ps, gs, ms, vs = ([t.double() for t in given] for given in (parameters, gradients, exp_avgs, exp_avg_sqs))
    if unit_rows is not None:
        w = ps[unit_rows]
        gs[unit_rows] = gs[unit_rows] - (gs[unit_rows] * w).sum(1, keepdim=True) * w
    norm = torch.cat([g.flatten() for g in gs]).norm()
    clip = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    ms = [betas[0] * m + (1 - betas[0]) * clip * g for m, g in zip(ms, gs, strict=True)]
    vs = [betas[1] * v + (1 - betas[1]) * (clip * g) ** 2 for v, g in zip(vs, gs, strict=True)]
    corrected = [(m / (1 - betas[0] ** step), v / (1 - betas[1] ** step)) for m, v in zip(ms, vs, strict=True)]
    ps = [p - lr * m / (v.sqrt() + eps) for p, (m, v) in zip(ps, corrected, strict=True)]
    if unit_rows is not None:
        w = ps[unit_rows]
        ps[unit_rows] = w / w.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return AdamStep(ps, ms, vs, norm)
