"""What mining returns: sorted pairs, and the survey of all pairs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from transcoder.kernels.correlation.moments import PairStatistics


@dataclass(frozen=True, eq=False)
class CorrelatedPairs:
    """Pairs of latents, sorted by correlation descending, then by (i, j); i < j.

    Fields, each [P], on the statistics' device:
        i, j: int64 latent ids.
        correlation: float64 Pearson correlation over the tokens that counted.
        support: int64 tokens on which at least one of the two fires.
        cosine: float64 uncentred cosine; `1 - cosine^2` is the share of z_j^2 lost when j is folded into i.
        jaccard: float64 tokens on which both fire, over support.
        weight: float64 sum of the weights of the tokens that all this was counted on (their number, where none has a
            weight): the whole stream's, or what a sketch has looked at for this pair (see `FeatureCorrelation.statistics`).
    """

    i: Tensor
    j: Tensor
    correlation: Tensor
    support: Tensor
    cosine: Tensor
    jaccard: Tensor
    weight: Tensor

    def __len__(self) -> int:
        return self.i.numel()


@dataclass(frozen=True, eq=False)
class Survey:
    """One pass over all pairs. `histogram` and `squared_sum` are None where only a sketch is kept, `candidates` where all is
    counted."""

    pairs: CorrelatedPairs
    histogram: Tensor | None
    """[bins] int64: pairs that fired together at least once, by correlation."""
    squared_sum: float | None
    """sum of r_ij^2 over ALL pairs i < j, those that never fire together included."""
    candidates: tuple[Tensor, Tensor] | None = None
    """(i, j) of the pairs that the sketch proposed: `pairs` are those of them that their counts confirm, so far."""


def kept(stats: PairStatistics, min_correlation: float, min_support: int) -> PairStatistics:
    keep = (stats.correlation >= min_correlation) & (stats.support >= min_support)
    return PairStatistics(*(getattr(stats, name)[keep] for name in PairStatistics.__dataclass_fields__))


def sorted_pairs(found: list[PairStatistics], d_sae: int, device: torch.device) -> CorrelatedPairs:
    names = ("i", "j", "correlation", "support", "cosine", "jaccard", "weight")
    kinds = (torch.int64, torch.int64, torch.float64, torch.int64, torch.float64, torch.float64, torch.float64)
    columns = [
        torch.cat([torch.empty(0, dtype=kind, device=device), *(getattr(part, name) for part in found)])
        for name, kind in zip(names, kinds, strict=True)
    ]
    by_pair = (columns[0] * d_sae + columns[1]).argsort()
    order = by_pair[columns[2][by_pair].sort(descending=True, stable=True).indices]
    return CorrelatedPairs(*(column[order] for column in columns))
