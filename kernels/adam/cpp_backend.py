"""Backend `cpp` of the optimizer step: clipping by the global norm, Adam and unit rows in one sweep (csrc/adam.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from transcoder.kernels.extension import usable

__all__ = ["adam_step", "takes", "usable"]

DTYPES = (torch.float32, torch.float64)


def takes(tensors: Sequence[Tensor]) -> bool:
    """Whether parameters and gradients are what the op takes: dense, contiguous, on the CPU, all float32 or all float64."""
    plain = all(t.is_cpu and t.layout == torch.strided and t.is_contiguous() for t in tensors)
    return plain and len({t.dtype for t in tensors}) == 1 and tensors[0].dtype in DTYPES


def adam_step(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    unit_rows: int | None,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    max_norm: float,
    bad: Tensor | None,
) -> Tensor:
    """Bitwise the same for any number of threads."""
    norm: Tensor = torch.ops.transcoder_cpp.adam_step(
        parameters,
        gradients,
        exp_avgs,
        exp_avg_sqs,
        steps,
        -1 if unit_rows is None else unit_rows,
        float(lr),
        *betas,
        eps,
        max_norm,
        bad,
    )
    return norm
