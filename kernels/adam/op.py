"""The optimizer step as one op, on the backends that have it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from transcoder.kernels.backend import implementation


def one_op_for(parameters: Sequence[Tensor]) -> Any:
    """The backend's module whose `adam_step` takes these parameters and their gradients in one op; None where there is none:
    a parameter without a gradient, a layout or dtype that the backend does not know, backend `torch`."""
    if not parameters or any(p.grad is None for p in parameters):
        return None
    module = implementation("adam", parameters[0].device)
    return module if module.takes([*parameters, *(p.grad for p in parameters if p.grad is not None)]) else None


@torch.no_grad()
def adam_step(
    module: Any,
    parameters: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    unit_rows: int | None,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    max_norm: float,
    bad: Tensor | None = None,
) -> Tensor:
    """One Adam update of parameters and state in place, from the parameters' gradients, which stay as they are.

    Args:
        module: what `one_op_for` gave for these parameters.
        exp_avgs, exp_avg_sqs: their moments.   steps: float32, one number each, on the parameters' device.
        unit_rows: which parameter is a matrix of unit rows: its gradient loses the part along each row first, and its rows
            are scaled back to unit length after. None: no such matrix.
        lr: a number, or 0-dim on the device (a CUDA graph then follows it; backend `triton`).
        max_norm: the gradients' global norm is clipped to it; infinity does not clip.
        bad: 0-dim bool on the device. It is set, in place, where the norm is not finite; where it holds, nothing is updated.
            None updates always.

    Returns: the norm before clipping, 0-dim on the device. Bitwise the same for equal inputs on one backend and device.

    Equivalent to: `grad -= (grad * W).sum(1, keepdim=True) * W` of that matrix, `torch.nn.utils.clip_grad_norm_`,
    `torch.optim.Adam.step` and `W /= W.norm(dim=1, keepdim=True)`, up to rounding (`adam_step_reference`).
    """
    gradients = [p.grad for p in parameters]
    norm: Tensor = module.adam_step(
        parameters,
        gradients,
        exp_avgs,
        exp_avg_sqs,
        steps,
        unit_rows=unit_rows,
        lr=lr,
        betas=betas,
        eps=eps,
        max_norm=max_norm,
        bad=bad,
    )
    # A graph that saved a parameter before this must not be walked after it.
    torch.autograd.graph.increment_version([*parameters, *exp_avgs, *exp_avg_sqs, *steps])
    return norm
