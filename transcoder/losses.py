"""The losses of a training step: the nested reconstruction loss by a named convention, and AuxK for dead latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from transcoder.dictionary_config import CONVENTIONS, Convention
from transcoder.kernels import SparseCodes, nested_loss, topk_encode


class Reconstruction(NamedTuple):
    loss: Tensor
    """Scalar, by the convention. Differentiable."""
    mse_per_prefix: Tensor
    """[P]: squared error, mean over tokens and d_out, for every convention. Detached."""
    fvu_per_prefix: Tensor
    """[P]: fraction of variance unexplained on this batch (see `spread` for one that does not vary). Detached."""
    residual: Tensor
    """[B, d_out]: reconstruction of the full width minus target. Detached."""
    target_variance: Tensor
    """Scalar: the denominator of `fvu`, mean over tokens and d_out; never 0, see `spread`."""


def spread(y: Tensor) -> Tensor:
    """The denominator of FVU: the mean square of y [B, d] around its mean row. Reads nothing back.

    For a batch that does not vary beyond rounding (one row, constant targets) it is the mean square of y itself, and 1 where
    that is 0 too: the result is finite and positive for every batch.
    """
    variance, size = (y - y.mean(0)).square().mean(), y.square().mean()
    rounding = (8 * torch.finfo(y.dtype).eps) ** 2 * size
    instead = torch.where(size >= torch.finfo(y.dtype).tiny, size, torch.ones_like(size))
    return torch.where((variance > rounding) & (variance >= torch.finfo(y.dtype).tiny), variance, instead)


def reconstruction_loss(
    codes: SparseCodes,
    W_dec: Tensor,
    b_dec: Tensor,
    target: Tensor,
    widths: Sequence[int],
    prefix_weights: Sequence[float],
    convention: Convention = "mse",
    token_weights: Tensor | None = None,
    explained: Tensor | None = None,
) -> Reconstruction:
    """Nested loss over cumulative widths, scaled as one of the field's libraries does.

    With m_p the squared error of prefix p (mean over tokens and d_out), w_p its weight, P prefixes:
        `mse`: sum_p w_p m_p / sum_p w_p. Independent of d_out and of the number of prefixes.
        `saelens`: d_out * sum_p w_p m_p. SAELens sums over d_out and over prefixes, means over tokens.
        `dictionary_learning`: d_out * sum_p w_p m_p / P. It weighs prefixes, then takes their mean.
        `fvu`: sum_p w_p fvu_p / sum_p w_p, fvu_p = m_p / var(target), see `spread`. sparsify minimises FVU.

    Shapes: codes (B, d_sae), W_dec [d_sae, d_out], b_dec [d_out], target [B, d_out], token_weights [B] or None.
    FVU is relative to the variance of `explained` [B, d_out]: the whole target, where a skip connection leaves only a part of
    it to the dictionary. None is `target`.
    """
    nested = nested_loss(codes, W_dec, b_dec, target, widths, prefix_weights, token_weights=token_weights)
    with torch.no_grad():
        whole = target if explained is None else explained
        variance = spread(whole)
        mse = nested.per_prefix.detach()
    if convention == "saelens":
        loss = nested.value * target.shape[1]
    elif convention == "dictionary_learning":
        loss = nested.value * (target.shape[1] / len(widths))
    elif convention == "fvu":
        loss = nested.value / (sum(prefix_weights) * variance)
    elif convention == "mse":
        loss = nested.value / sum(prefix_weights)
    else:
        raise ValueError(f"convention: expected one of {', '.join(CONVENTIONS)}, got {convention!r}")
    return Reconstruction(loss, mse, mse / variance, nested.residual, variance)


def penalty_scale(convention: Convention, d_out: int, prefix_weights: Sequence[float]) -> float:
    """The factor between the loss of a convention and that of `mse`: penalty weights are relative to the latter."""
    if convention == "saelens":
        return d_out * sum(prefix_weights)
    if convention == "dictionary_learning":
        return d_out * sum(prefix_weights) / len(prefix_weights)
    return 1.0


def auxk_loss(
    x: Tensor,
    residual: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    dead: Tensor,
    aux_k: int,
    target_variance: Tensor,
    convention: Convention = "mse",
    token_weights: Tensor | None = None,
) -> Tensor:
    """AuxK (Gao et al. 2024): the aux_k strongest dead latents of each token reconstruct the residual of the live ones.

    Args:
        x: [B, d_in] what the encoder reads.
        residual: [B, d_out] reconstruction minus target, detached.
        W_enc: [d_sae, d_in].  b_enc: [d_sae].  W_dec: [d_sae, d_out].
        dead: [D] int64, ids of the dead latents, D >= 1. Only their rows are gathered and encoded.
        aux_k: latents a token, cut to D.
        target_variance: scalar, variance of the batch's target (`Reconstruction.target_variance`); read by `fvu` only.
        convention: as `reconstruction_loss`. `mse`: mean square over tokens and d_out, times min(D / aux_k, 1) as
            sparsify and SAELens scale it; `saelens` sums over d_out; `fvu` divides by the target's variance;
            `dictionary_learning` divides by the residual's variance, without that factor.

    Returns: a scalar whose gradient reaches the dead latents' encoder rows, biases and decoder rows, nothing else.
    """
    k = min(aux_k, dead.numel())
    codes = topk_encode(x, W_enc[dead], b_enc[dead], k)
    no_bias = residual.new_zeros(residual.shape[1])
    mse = nested_loss(codes, W_dec[dead], no_bias, -residual, [dead.numel()], token_weights=token_weights).value
    if convention == "dictionary_learning":
        return mse / spread(residual)
    scale = min(dead.numel() / aux_k, 1.0)
    if convention == "saelens":
        return mse * (scale * residual.shape[1])
    return mse * scale / target_variance if convention == "fvu" else mse * scale
