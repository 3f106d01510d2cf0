"""Adam over fp32 masters, with the decoder kept on the unit sphere."""

from __future__ import annotations

import torch
from torch import Tensor

from transcoder.config import TrainingSection
from transcoder.model import Transcoder


def make_optimizer(transcoder: Transcoder, section: TrainingSection, lr: float) -> torch.optim.Adam:
    """PyTorch's fused Adam (one pass over parameters, gradients and moments)."""
    return torch.optim.Adam(transcoder.parameters(), lr=lr, betas=section.betas, eps=section.eps, fused=True)


def optimizer_step(
    transcoder: Transcoder, optimizer: torch.optim.Adam, lr: float, gradient_clip: float | None
) -> Tensor:
    """One update: parallel decoder gradient removed, gradients clipped by global norm, Adam, decoder rows renormalised.

    Returns: the gradient norm before clipping, 0-dim on the device. Nothing is read back.
    """
    transcoder.remove_parallel_gradient()
    limit = float("inf") if gradient_clip is None else gradient_clip
    norm = torch.nn.utils.clip_grad_norm_(transcoder.parameters(), limit)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    transcoder.normalize_decoder()
    return norm.detach()
