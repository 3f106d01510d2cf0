"""Dense definitions of the encode ops, which tests compare with. Any floating dtype; differentiable by autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def largest_first(activations: Tensor) -> Tensor:
    """int64 places along the last dimension in the order of selection: NaN (so that it reaches the result), then +inf, then by
    falling value, ties to the lowest place. Every backend chooses the first k of this order."""
    return activations.argsort(dim=-1, descending=True, stable=True)


def topk_encode_reference(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> Tensor:
    """[B, d_sae]: relu(x @ W_enc.T + b_enc) with all but the k largest of each row set to 0; ties go to the lowest id."""
    activations = torch.relu(x @ W_enc.T + b_enc)
    chosen = largest_first(activations)[:, :k]
    return torch.zeros_like(activations).scatter(1, chosen, activations.gather(1, chosen))


def batch_topk_encode_reference(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> Tensor:
    """[B, d_sae]: all but the k * B largest entries of the whole batch set to 0; ties go to the lowest (row, id)."""
    activations = torch.relu(x @ W_enc.T + b_enc)
    flat = activations.flatten()
    chosen = largest_first(flat)[: k * x.shape[0]]
    return torch.zeros_like(flat).scatter(0, chosen, flat[chosen]).view_as(activations)


def threshold_encode_reference(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor | float) -> Tensor:
    """[B, d_sae]: pre-activations above the threshold (a number, or one a latent), the others set to 0."""
    pre = x @ W_enc.T + b_enc
    return torch.where(pre > threshold, pre, torch.zeros_like(pre))
