"""Backend `cpp` of the optimizer step: clipping by the global norm, Adam and unit rows in one sweep (csrc/step.h)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from transcoder.kernels.backend import active_backend

DTYPES = (torch.float32, torch.float64)


def runs(parameters: Sequence[Tensor]) -> bool:
    """Whether backend `cpp` is active and these parameters and their gradients are what it takes: dense, contiguous, on the
    CPU, one dtype of float32 and float64."""
    if not parameters or any(p.grad is None for p in parameters):
        return False
    tensors = [*parameters, *(p.grad for p in parameters if p.grad is not None)]
    plain = all(t.is_cpu and t.layout == torch.strided and t.is_contiguous() for t in tensors)
    one = len({t.dtype for t in tensors}) == 1 and tensors[0].dtype in DTYPES
    return plain and one and active_backend("cpu", "decode") == "cpp"


@torch.no_grad()
def adam_step(
    parameters: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    unit_rows: int | None,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    max_norm: float,
) -> Tensor:
    """One Adam update of parameters and state in place, from the parameters' gradients, which stay as they are.

    Args:
        parameters: those that `runs` accepts.   exp_avgs, exp_avg_sqs: their moments.   steps: float32, one number each.
        unit_rows: which parameter is a matrix of unit rows: its gradient loses the part along each row first, and its rows
            are scaled back to unit length after. None: no such matrix.
        max_norm: the gradients' global norm is clipped to it; infinity does not clip.

    Returns: the norm before clipping, 0-dim. Bitwise the same for any number of threads.

    Equivalent to: `grad -= (grad * W).sum(1, keepdim=True) * W` of that matrix, `torch.nn.utils.clip_grad_norm_`,
    `torch.optim.Adam.step` and `W /= W.norm(dim=1, keepdim=True)`, up to rounding.
    """
    norm: Tensor = torch.ops.transcoder_cpp.adam_step(
        parameters,
        [p.grad for p in parameters],
        exp_avgs,
        exp_avg_sqs,
        steps,
        -1 if unit_rows is None else unit_rows,
        lr,
        *betas,
        eps,
        max_norm,
    )
    # A graph that saved a parameter before this must not be walked after it.
    torch.autograd.graph.increment_version([*parameters, *exp_avgs, *exp_avg_sqs, *steps])
    return norm
