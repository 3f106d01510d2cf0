"""CKA: similarity of two representations of the same tokens, independent of their basis. It does not measure duplicates.

Linear CKA (Kornblith et al. 2019) compares Gram matrices over tokens, K = X X^T. The plain estimate is near 1 for any two
representations of more dimensions than tokens, so HSIC is estimated without bias (Song et al. 2012, HSIC_1) on each
mini-batch and averaged over them (Nguyen, Raghu and Kornblith 2021): the mean does not depend on the mini-batch's size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from transcoder.kernels import SparseCodes

LEAST_TOKENS = 4
"""HSIC_1 divides by n (n - 3)."""
TILE_COLUMNS = 4096
"""Number of latents made dense at a time: 8 MiB for 512 tokens."""


class Similarity(NamedTuple):
    """Between R representations."""

    cka: Tensor
    """[R, R] float64, 1 on the diagonal; NaN where a representation does not vary (or varies less than its noise)."""
    error: Tensor
    """[R, R] float64: its standard error by a jackknife over mini-batches, NaN below two of them."""


class StreamingCKA:
    """Debiased linear CKA between representations of one stream of tokens, mini-batch by mini-batch.

    Equivalent to: with H(K, L) = (tr(K L) + sum(K) sum(L) / ((n - 1) (n - 2)) - 2 sum(K L) / (n - 2)) / (n (n - 3)) of Gram
    matrices whose diagonal is set to 0, averaged over mini-batches: H(K, L) / sqrt(H(K, K) H(L, L)).

    CKA does not change when the features are rotated or permuted, or each representation scaled or shifted. That is why it
    cannot show duplicates within a dictionary: a dictionary of which every latent is split into two equal halves has CKA 1
    with the one that was not. Correlate latents for that.

    Args:
        representations: R, the number of representations.
    """

    def __init__(self, representations: int) -> None:
        if representations < 1:
            raise ValueError(f"StreamingCKA: representations: expected at least 1, got {representations}")
        self.representations = representations
        self._batches: list[Tensor] = []

    def update(self, *grams: Tensor) -> None:
        """Add a mini-batch of n >= 4 tokens.

        Args:
            grams: one a representation, each [n, n], symmetric: `gram_of_rows` or `gram_of_codes` of the same tokens.
        """
        sizes = {tuple(gram.shape) for gram in grams}
        if len(grams) != self.representations or len(sizes) != 1:
            raise ValueError(
                f"StreamingCKA.update: expected {self.representations} Gram matrices of one shape [n, n], got {len(grams)} of "
                f"shapes {sorted(sizes)}"
            )
        n = grams[0].shape[0]
        if grams[0].shape != (n, n) or n < LEAST_TOKENS:
            raise ValueError(
                f"StreamingCKA.update: expected [n, n] with n at least {LEAST_TOKENS}, got {list(grams[0].shape)}"
            )
        centred = torch.stack([centred_without_bias(gram).flatten() for gram in grams])
        self._batches.append(centred @ centred.T / (n * (n - 3)))

    def result(self) -> Similarity:
        """Raises: ValueError before the first mini-batch."""
        if not self._batches:
            raise ValueError("StreamingCKA.result: expected at least one mini-batch; call update first")
        parts = torch.stack(self._batches)
        count = parts.shape[0]
        cka = _normalised(parts.mean(0))
        if count < 2:
            return Similarity(cka, torch.full_like(cka, torch.nan))
        without = _normalised((parts.sum(0) - parts) / (count - 1))
        spread = (without - without.mean(0)).square().sum(0) * ((count - 1) / count)
        return Similarity(cka, spread.sqrt())


def _normalised(hsic: Tensor) -> Tensor:
    """[..., R, R]."""
    own = hsic.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(own > 0, own, torch.nan).rsqrt()
    return hsic * scale[..., :, None] * scale[..., None, :]


def centred_without_bias(gram: Tensor) -> Tensor:
    """U-centring [n, n] (Szekely and Rizzo 2014): its inner product with another one's, over n (n - 3), is HSIC_1. Adding a_i +
    a_j to the entries, which shifting the features does, changes nothing."""
    n = gram.shape[0]
    gram = gram.double().clone().fill_diagonal_(0)
    row = gram.sum(1) / (n - 2)
    centred = gram - row[:, None] - row[None, :] + gram.sum() / ((n - 1) * (n - 2))
    return centred.fill_diagonal_(0)


def gram_of_rows(rows: Tensor) -> Tensor:
    """[n, n] inner products of tokens, of dense rows [n, d]. Their mean is subtracted first, which does not change CKA and
    reduces rounding in fp32."""
    rows = rows.detach().float()
    rows = rows - rows.mean(0)
    return rows @ rows.T


def gram_of_codes(codes: SparseCodes, first: int = 0, last: int | None = None) -> Tensor:
    """[n, n] inner products of tokens by the latents `first` <= l < `last` of codes (n, d_sae).

    Equivalent to: `z = codes.to_dense()[:, first:last]; z @ z.T`. Only latents that fire get a column: at most nnz of them.
    """
    last = codes.shape[1] if last is None else last
    values = codes.values.detach().float()
    inside = (codes.indices >= first) & (codes.indices < last) & (values > 0)
    latents, column = torch.unique(codes.indices[inside], return_inverse=True)
    rows, values = codes.rows()[inside], values[inside]
    gram = values.new_zeros(codes.shape[0], codes.shape[0])
    for a in range(0, latents.numel(), TILE_COLUMNS):
        width = min(TILE_COLUMNS, latents.numel() - a)
        here = (column >= a) & (column < a + width)
        tile = values.new_zeros(codes.shape[0], width)
        tile[rows[here], column[here] - a] = values[here]
        gram += tile @ tile.T
    return gram
