"""The optimizer step as one op, on the backends that have it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from transcoder.kernels.backend import implementation


@dataclass(frozen=True, eq=False)
class AdamUpdate:
    """The tensors and settings of one update."""

    parameters: Sequence[Tensor]
    """Each has a gradient, which is not changed."""
    exp_avgs: Sequence[Tensor]
    exp_avg_sqs: Sequence[Tensor]
    """Moments of the parameters."""
    steps: Sequence[Tensor]
    """float32, one number each, on the parameters' device."""
    unit_rows: int | None
    """Index of the parameter that is a matrix of unit rows: the component of its gradient along each row is removed before the
    update, and its rows are scaled to unit length after it. None: no such matrix."""
    lr: float | Tensor
    """A number, or 0-dim on the device (a CUDA graph then follows it; backend `triton`)."""
    betas: tuple[float, float]
    eps: float
    max_norm: float
    """The gradients' global norm is clipped to it; infinity does not clip."""
    bad: Tensor | None = None
    """0-dim bool on the device. The update sets it, in place, if the norm is not finite; if it is set, nothing is updated. None
    always updates."""

    @property
    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters if p.grad is not None]


def one_op_for(parameters: Sequence[Tensor]) -> Any:
    """The backend's module whose `adam_step` takes these parameters and their gradients in one op; None where there is none:
    a parameter without a gradient, a layout or dtype that the backend does not know, backend `torch`."""
    if not parameters or any(p.grad is None for p in parameters):
        return None
    module = implementation("adam", parameters[0].device)
    return module if module.takes([*parameters, *(p.grad for p in parameters if p.grad is not None)]) else None


@torch.no_grad()
def adam_step(module: Any, update: AdamUpdate) -> Tensor:
    """One Adam update of parameters and state, in place.

    Args:
        module: the result of `one_op_for` for these parameters.

    Returns: the norm before clipping, 0-dim on the device. Bitwise the same for equal inputs on one backend and device.

    Equivalent to: `grad -= (grad * W).sum(1, keepdim=True) * W` of the matrix of unit rows, `torch.nn.utils.clip_grad_norm_`,
    `torch.optim.Adam.step` and `W /= W.norm(dim=1, keepdim=True)`, up to rounding (`adam_step_reference`).
    """
    moments = [*update.exp_avgs, *update.exp_avg_sqs]
    for p, moment in zip([*update.parameters] * 2, moments, strict=True):
        if (moment.shape, moment.dtype, moment.device) != (p.shape, p.dtype, p.device):
            raise ValueError(
                f"adam_step: exp_avgs, exp_avg_sqs: expected the parameter's {p.dtype} of shape {list(p.shape)} on {p.device}, "
                f"got {moment.dtype} of shape {list(moment.shape)} on {moment.device}"
            )
    # The kernels read and write raw memory; a loaded state may have any strides.
    dense = [moment.contiguous() for moment in moments]
    count = len(update.parameters)
    norm: Tensor = module.adam_step(replace(update, exp_avgs=dense[:count], exp_avg_sqs=dense[count:]))
    for moment, made in zip(moments, dense, strict=True):
        if made is not moment:
            moment.copy_(made)
    # Backward through a graph that saved a parameter before this update must raise.
    written = [*update.parameters, *update.exp_avgs, *update.exp_avg_sqs, *update.steps]
    torch.autograd.graph.increment_version(written)
    return norm
