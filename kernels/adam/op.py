"""The optimizer step as one op, on the backends that have it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transcoder.kernels.backend import implementation


@dataclass(frozen=True, eq=False)
class AdamUpdate:
    """What one update reads and writes."""

    parameters: Sequence[Tensor]
    """Each with a gradient, which stays as it is."""
    exp_avgs: Sequence[Tensor]
    exp_avg_sqs: Sequence[Tensor]
    """Moments of the parameters."""
    steps: Sequence[Tensor]
    """float32, one number each, on the parameters' device."""
    unit_rows: int | None
    """Which parameter is a matrix of unit rows: its gradient loses the part along each row first, and its rows are scaled back
    to unit length after. None: no such matrix."""
    lr: float | Tensor
    """A number, or 0-dim on the device (a CUDA graph then follows it; backend `triton`)."""
    betas: tuple[float, float]
    eps: float
    max_norm: float
    """The gradients' global norm is clipped to it; infinity does not clip."""
    bad: Tensor | None = None
    """0-dim bool on the device. It is set, in place, where the norm is not finite; where it holds, nothing is updated. None
    updates always."""

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
        module: what `one_op_for` gave for these parameters.

    Returns: the norm before clipping, 0-dim on the device. Bitwise the same for equal inputs on one backend and device.

    Equivalent to: `grad -= (grad * W).sum(1, keepdim=True) * W` of the matrix of unit rows, `torch.nn.utils.clip_grad_norm_`,
    `torch.optim.Adam.step` and `W /= W.norm(dim=1, keepdim=True)`, up to rounding (`adam_step_reference`).
    """
    norm: Tensor = module.adam_step(update)
    # A graph that saved a parameter before this must not be walked after it.
    written = [*update.parameters, *update.exp_avgs, *update.exp_avg_sqs, *update.steps]
    torch.autograd.graph.increment_version(written)
    return norm
