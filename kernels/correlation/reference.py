"""The definition of FeatureCorrelation's statistics: two passes in float64 over the dense tokens. Slow and simple."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ReferenceStatistics(NamedTuple):
    """Every pair of columns of z [T, d_sae], in float64 (counts int64)."""

    correlation: Tensor
    """[d_sae, d_sae] Pearson correlation; 0 where a column is constant."""
    cosine: Tensor
    """[d_sae, d_sae] uncentred cosine; 0 where a column is zero."""
    fired: Tensor
    """[d_sae] tokens on which each latent fires (weight above 0 and value above 0)."""
    joint: Tensor
    """[d_sae, d_sae] tokens on which both fire."""

    @property
    def union(self) -> Tensor:
        return self.fired[:, None] + self.fired[None, :] - self.joint

    @property
    def jaccard(self) -> Tensor:
        return self.joint.double() / self.union.clamp(min=1)


def correlation_reference(z: Tensor, weights: Tensor | None = None) -> ReferenceStatistics:
    """Population Pearson correlation of the columns of z [T, d_sae] under token weights [T] (None weighs each
    token 1).

    Equivalent to: `torch.corrcoef(z.T)` (columns are variables: corrcoef of z itself would correlate tokens).
    """
    z = z.double()
    w = torch.ones(z.shape[0], dtype=torch.float64, device=z.device) if weights is None else weights.double()
    total = w.sum()
    mean = (w[:, None] * z).sum(0) / total
    centred = z - mean
    covariance = (w[:, None] * centred).T @ centred / total
    second = (w[:, None] * z).T @ z / total
    fires = ((z > 0) & (w > 0)[:, None]).double()
    return ReferenceStatistics(
        correlation=_normalised(covariance, second.diagonal()),
        cosine=_normalised(second, second.diagonal()),
        fired=fires.sum(0).long(),
        joint=(fires.T @ fires).long(),
    )


def _normalised(matrix: Tensor, scale: Tensor) -> Tensor:
    # A variance within the rounding of the mean square means a constant column.
    diagonal = matrix.diagonal()
    valid = diagonal > 1e-12 * scale
    inverse = torch.where(valid, diagonal.clamp(min=1e-300).rsqrt(), 0.0)
    return matrix * inverse[:, None] * inverse[None, :]
