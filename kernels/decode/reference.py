"""Dense definitions of the decode ops, which tests compare with. Any floating dtype; differentiable by autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sparse_decode_reference(z: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """[B, d_out] from dense codes z [B, d_sae]."""
    return z @ W_dec + b_dec


def nested_loss_reference(
    z: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    y: Tensor,
    widths: Sequence[int],
    token_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(per-prefix mean squared errors [P], final residual [B, d_out]) from dense codes z [B, d_sae]."""
    weights = torch.ones(z.shape[0], 1).to(z) if token_weights is None else token_weights[:, None].to(z)
    residuals = [z[:, :w] @ W_dec[:w] + b_dec - y for w in widths]
    return torch.stack([(weights * r**2).mean() for r in residuals]), residuals[-1]
