"""Backend `triton` of the optimizer step: two sweeps, one over the gradients for their norm, one over everything.

Nothing is read by the host: the norm, the clip factor, the count of steps and whether the step is taken at all stay on the
device, so that a CUDA graph can hold the step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from transcoder.kernels.adam import config
from transcoder.kernels.adam.op import AdamUpdate
from transcoder.kernels.triton_support import cdiv, check_device, on_device, usable

if usable():
    from transcoder.kernels.adam import kernel

__all__ = ["adam_step", "takes", "usable"]

NAME = "adam_step"


def takes(tensors: Sequence[Tensor]) -> bool:
    """Whether the kernels take these parameters and gradients: contiguous float32 on one device."""
    plain = all(t.layout == torch.strided and t.is_contiguous() for t in tensors)
    return plain and all(t.dtype == torch.float32 and t.device == tensors[0].device for t in tensors)


def adam_step(update: AdamUpdate) -> Tensor:
    parameters, gradients, unit_rows = update.parameters, update.gradients, update.unit_rows
    lr, betas, max_norm, bad = update.lr, update.betas, update.max_norm, update.bad
    device = parameters[0].device
    check_device(NAME, device)
    with on_device(device):
        sizes = [p.shape[0] if i == unit_rows else cdiv(p.numel(), config.BLOCK) for i, p in enumerate(parameters)]
        partial = torch.empty(sum(sizes), dtype=torch.float32, device=device)
        along = torch.empty(0 if unit_rows is None else sizes[unit_rows], dtype=torch.float32, device=device)
        for i, (p, g, at) in enumerate(zip(parameters, gradients, partial.split(sizes), strict=True)):
            if at.numel() == 0:
                continue
            if i == unit_rows:
                tile, warps = config.row_tile(p.shape[1])
                kernel.tangent_squares[(sizes[i],)](g, p, along, at, p.shape[1], TILE=tile, num_warps=warps)
            else:
                kernel.block_squares[(sizes[i],)](g, at, g.numel(), BLOCK=config.BLOCK, num_warps=config.BLOCK_WARPS)
        norm = partial.sum(dtype=torch.float64).sqrt().float()
        if bad is not None:
            bad |= ~torch.isfinite(norm)
        guarded = bad is not None
        flag = norm if bad is None else bad
        rate = torch.full((), lr, dtype=torch.float64, device=device) if not isinstance(lr, Tensor) else lr
        rate = rate.to(device, torch.float64)
        # Four columns: each row begins at a multiple of 16 bytes, which kernels are compiled for.
        scalars = torch.zeros(len(parameters), 4, dtype=torch.float32, device=device)
        weights = (betas[0], 1 - betas[0], betas[1], 1 - betas[1], update.eps)
        for i, (p, g, m, v, step, mine) in enumerate(
            zip(parameters, gradients, update.exp_avgs, update.exp_avg_sqs, update.steps, scalars, strict=True)
        ):
            kernel.step_scalars[(1,)](
                norm, flag, step, rate, mine, float(max_norm),
                LOG_BETA1=math.log(betas[0]) if betas[0] else -math.inf,
                LOG_BETA2=math.log(betas[1]) if betas[1] else -math.inf,
                CLIP=math.isfinite(max_norm), GUARDED=guarded, num_warps=1,
            )  # fmt: skip
            if sizes[i] == 0:
                continue
            if i == unit_rows:
                tile, warps = config.row_tile(p.shape[1])
                kernel.adam_rows[(sizes[i],)](
                    p, g, m, v, along, mine, flag, p.shape[1], *weights, torch.finfo(torch.float32).tiny,
                    GUARDED=guarded, ONE_TILE=p.shape[1] <= tile, TILE=tile, num_warps=warps,
                )  # fmt: skip
            else:
                kernel.adam_blocks[(sizes[i],)](
                    p, g, m, v, mine, flag, p.numel(), *weights,
                    GUARDED=guarded, BLOCK=config.BLOCK, num_warps=config.BLOCK_WARPS,
                )  # fmt: skip
        return norm
