"""The losses of a training step: the nested reconstruction loss by a named convention, and AuxK for dead latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    return never_zero(variance, size)


def never_zero(variance: Tensor, size: Tensor) -> Tensor:
    """`variance`, or where it is rounding only the mean square `size`, or 1 where that is 0 too."""
    tiny = torch.finfo(size.dtype).tiny
    rounding = (8 * torch.finfo(size.dtype).eps) ** 2 * size
    instead = torch.where(size >= tiny, size, torch.ones_like(size))
    return torch.where((variance > rounding) & (variance >= tiny), variance, instead)


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
    loss = by_convention(nested.value, prefix_weights, convention, target.shape[1], variance)
    return Reconstruction(loss, mse, mse / variance, nested.residual, variance)


def by_convention(
    value: Tensor, prefix_weights: Sequence[float], convention: Convention, d_out: int, variance: Tensor
) -> Tensor:
    """The loss of a convention of `reconstruction_loss` from `value` = sum_p w_p m_p. `variance` is read by `fvu` only."""
    if convention == "saelens":
        return value * d_out
    if convention == "dictionary_learning":
        return value * (d_out / len(prefix_weights))
    if convention == "fvu":
        return value / (sum(prefix_weights) * variance)
    if convention == "mse":
        return value / sum(prefix_weights)
    raise ValueError(f"convention: expected one of {', '.join(CONVENTIONS)}, got {convention!r}")


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
    return auxk_by_convention(mse, residual, dead.numel(), aux_k, target_variance, convention, spread)


def auxk_by_convention(
    mse: Tensor,
    residual: Tensor,
    dead: int,
    aux_k: int,
    target_variance: Tensor,
    convention: Convention,
    spread_of: Callable[[Tensor], Tensor],
) -> Tensor:
    """The loss of a convention of `auxk_loss` from the mean square error of the reconstruction by `dead` latents."""
    if convention == "dictionary_learning":
        return mse / spread_of(residual)
    scale = min(dead / aux_k, 1.0)
    if convention == "saelens":
        return mse * (scale * residual.shape[1])
    return mse * scale / target_variance if convention == "fvu" else mse * scale
