"""Backend `cpp` of the optimizer step: clipping by the global norm, Adam and unit rows in one sweep (csrc/adam.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from transcoder.kernels.adam.op import AdamUpdate
from transcoder.kernels.extension import usable

__all__ = ["adam_step", "takes", "usable"]

DTYPES = (torch.float32, torch.float64)


def takes(tensors: Sequence[Tensor]) -> bool:
    """Whether the op takes these parameters and gradients: dense, contiguous, on the CPU, all float32 or all float64."""
    plain = all(t.is_cpu and t.layout == torch.strided and t.is_contiguous() for t in tensors)
    return plain and len({t.dtype for t in tensors}) == 1 and tensors[0].dtype in DTYPES


def adam_step(update: AdamUpdate) -> Tensor:
    """Bitwise the same for any number of threads."""
    unit = -1 if update.unit_rows is None else update.unit_rows
    norm: Tensor = torch.ops.transcoder_cpp.adam_step(
        *(update.parameters, update.gradients, update.exp_avgs, update.exp_avg_sqs, update.steps),
        *(unit, float(update.lr), *update.betas, update.eps, update.max_norm, update.bad),
    )
    return norm
