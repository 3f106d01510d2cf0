"""Adam over fp32 masters, with the decoder kept on the unit sphere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transcoder.config import TrainingSection
from transcoder.kernels.adam.op import AdamUpdate, adam_step, one_op_for
from transcoder.model import Transcoder
from transcoder.training.nonfinite import host_is_device

_BEYOND_ONE_OP = ("amsgrad", "maximize", "differentiable", "weight_decay")
"""Settings of Adam that the op does not know."""


def make_optimizer(transcoder: Transcoder, section: TrainingSection, lr: float) -> torch.optim.Adam:
    """PyTorch's fused Adam. `optimizer_step` may do its work by other means, over the same state."""
    return torch.optim.Adam(transcoder.parameters(), lr=lr, betas=section.betas, eps=section.eps, fused=True)


def optimizer_step(
    transcoder: Transcoder,
    optimizer: torch.optim.Adam,
    lr: float | Tensor,
    gradient_clip: float | None,
    bad: Tensor | None = None,
) -> Tensor:
    """One update: parallel decoder gradient removed, gradients clipped by global norm, Adam, decoder rows renormalised.

    Where backend `cpp` or `triton` is active for the parameters this is one op that reads each gradient twice and everything
    else once (the decoder twice); otherwise PyTorch's. They agree to a few units in the last place, not to the bit; each alone
    is reproducible. The state is torch.optim.Adam's in all.

    Args:
        lr: a number, or 0-dim on the parameters' device (for a captured step).
        gradient_clip: largest global norm of the gradients; None does not clip.
        bad: 0-dim bool on the parameters' device. It is set, in place, where the gradients' norm is not finite; where it
            holds, parameters and state stay as they are. Changes no bit of any other step. None updates always.

    Returns: the gradient norm before clipping, 0-dim on the device. Nothing is read back.
    """
    limit = float("inf") if gradient_clip is None else gradient_clip
    for group in optimizer.param_groups:
        group["lr"] = lr
    trained = transcoder.threshold if transcoder.selection.trains_threshold else None
    before = None if trained is None else trained.detach().clone()
    module = None
    if transcoder.in_one_process and _is_plain(optimizer):
        module = one_op_for(optimizer.param_groups[0]["params"])
    if module is not None:
        norm = _in_one_op(module, transcoder, optimizer, limit, bad)
    else:
        transcoder.remove_parallel_gradient()
        norm = transcoder.clip_gradients(limit, bad)
        _update(transcoder, optimizer, norm, bad)
    if trained is not None and before is not None:
        transcoder.selection.finish_update(trained, before)
    optimizer.zero_grad(set_to_none=True)
    return norm.detach()


@torch.no_grad()
def _update(transcoder: Transcoder, optimizer: torch.optim.Adam, norm: Tensor, bad: Tensor | None) -> None:
    if bad is None:
        optimizer.step()
        transcoder.normalize_decoder()
        return
    bad |= ~torch.isfinite(norm)
    if host_is_device(bad):
        if not bool(bad):
            optimizer.step()
            transcoder.normalize_decoder()
        return
    # The flag of gradient scalers: the fused kernels leave everything as it is where it is 1.
    optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]
    # As normalize_decoder, but rows are divided by 1 in a bad step: they are of unit length only up to rounding.
    rows = transcoder.W_dec
    lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    rows.div_(torch.where(bad, 1.0, lengths))


def _is_plain(optimizer: torch.optim.Adam) -> bool:
    groups = optimizer.param_groups
    return len(groups) == 1 and not any(groups[0][name] for name in _BEYOND_ONE_OP)


def _in_one_op(
    module: Any, transcoder: Transcoder, optimizer: torch.optim.Adam, limit: float, bad: Tensor | None
) -> Tensor:
    group = optimizer.param_groups[0]
    parameters: list[Tensor] = group["params"]
    states = [optimizer.state[p] for p in parameters]
    for p, state in zip(parameters, states, strict=True):
        if not state:  # as torch.optim.Adam makes it at its first step
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
    unit = next((i for i, p in enumerate(parameters) if p is transcoder.W_dec), None)
    exp_avgs, exp_avg_sqs, steps = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
    settings: dict[str, Any] = {name: group[name] for name in ("lr", "betas", "eps")}
    update = AdamUpdate(parameters, exp_avgs, exp_avg_sqs, steps, unit_rows=unit, **settings, max_norm=limit, bad=bad)
    return adam_step(module, update)
