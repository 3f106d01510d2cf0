"""Per-latent sums, the formulas that turn sums into correlation, cosine and Jaccard, and what mining returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from transcoder.kernels.backend import active_backend
from transcoder.kernels.correlation import cpp_backend
from transcoder.kernels.correlation.checks import check_fields, check_tensor
from transcoder.kernels.correlation.torch_backend import Entries, add_at

CONSTANT = 1e-12
"""A latent whose variance is below this share of its mean square is constant: its correlation is defined as
0. float64 sums carry a relative error near 1e-14, and a latent that is nearly always on (mean 35, sd 0.15)
has a share of 2e-5."""


@dataclass(eq=False)
class Moments:
    """n, sum z, sum z^2 and firing counts of every latent. float64: the one-pass variance of a latent that is nearly always on
    loses five digits, too many for fp32."""

    weight: Tensor
    """0-dim: sum of token weights."""
    weight_squared: Tensor
    """0-dim: sum of squared token weights."""
    total: Tensor
    """[d_sae] sum w z."""
    square: Tensor
    """[d_sae] sum w z^2."""
    count: Tensor
    """[d_sae] firing tokens, int64; float64 (decayed) with a half-life."""

    @classmethod
    def zeros(cls, d_sae: int, device: torch.device, decayed: bool) -> Moments:
        def vector(*size: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(*size, dtype=dtype, device=device)

        count = vector(d_sae, dtype=torch.float64 if decayed else torch.int64)
        return cls(vector(()), vector(()), vector(d_sae), vector(d_sae), count)  # type: ignore[arg-type]

    def add_tokens(self, tokens: int, weight: Tensor | None) -> None:
        if weight is None:
            self.weight += tokens
            self.weight_squared += tokens
        else:
            self.weight += weight.sum()
            self.weight_squared += weight.square().sum()

    def add(self, entries: Entries, tokens: int, weight: Tensor | None) -> None:
        self.add_tokens(tokens, weight)
        if entries.fires is None and active_backend(self.total.device, "correlation") == "cpp":
            cpp_backend.add_moments(entries, self.total, self.square, self.count)
            return
        add_at(self.total, entries.latent, entries.weighted)
        add_at(self.square, entries.latent, entries.weighted * entries.value)
        add_at(self.count, entries.latent, entries.tally.to(self.count.dtype))

    def check_state(self, state: object) -> None:
        """`state` fits these moments, or a ValueError that names the field."""
        check_fields("moments", state, self.tensors())
        assert isinstance(state, Mapping)
        for name, part in self.tensors().items():
            check_tensor(f"moments.{name}", state[name], tuple(part.shape), part.dtype)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, part in self.tensors().items():
            part.copy_(state[name])

    def tensors(self) -> dict[str, Tensor]:
        return {
            "weight": self.weight,
            "weight_squared": self.weight_squared,
            "total": self.total,
            "square": self.square,
            "count": self.count,
        }

    def merge(self, other: Moments, scale: float) -> None:
        for mine, theirs in zip(self.tensors().values(), other.tensors().values(), strict=True):
            mine += theirs.to(mine.device) if scale == 1 else theirs.to(mine.device) * scale
        if scale != 1:
            # Weights scale once, their squares twice.
            self.weight_squared += other.weight_squared.to(self.weight.device) * (scale * scale - scale)

    def forget(self, latents: Tensor) -> None:
        """Remove all firings of these latents."""
        for part in (self.total, self.square, self.count):
            part.index_fill_(0, latents, 0)

    def scale(self, factor: float) -> None:
        """Multiply every sum by an exact power of two (decayed sums only)."""
        for part in self.tensors().values():
            part *= factor
        self.weight_squared *= factor

    def centred(self) -> tuple[Tensor, Tensor]:
        """(mean [d_sae], 1 / standard deviation [d_sae], 0 for a constant latent)."""
        return _centred(self.weight, self.total, self.square)

    def effective_tokens(self) -> Tensor:
        """0-dim: (sum w)^2 / sum w^2, the number of equally weighted tokens of the same noise."""
        return self.weight.square() / self.weight_squared.clamp(min=1e-300)


class PairSums(NamedTuple):
    """Sums from which the statistics of some pairs are computed, each pair over its part of the stream. Sums of disjoint parts
    can be added."""

    weight: Tensor
    """[P] sum w."""
    total: Tensor
    """[2, P] sum w z of i and of j."""
    square: Tensor
    """[2, P] sum w z^2."""
    fired: Tensor
    """[2, P] firing tokens, in the dtype of the counts."""
    product: Tensor
    """[P] sum w z_i z_j."""
    joint: Tensor
    """[P] tokens on which both fire."""

    @classmethod
    def zeros(cls, pairs: int, device: torch.device) -> PairSums:
        def table(*size: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(*size, dtype=dtype, device=device)

        whole = torch.int64
        return cls(
            table(pairs), table(2, pairs), table(2, pairs), table(2, pairs, dtype=whole), table(pairs),
            table(pairs, dtype=whole),
        )  # fmt: skip

    @classmethod
    def of(cls, moments: Moments, i: Tensor, j: Tensor, product: Tensor, joint: Tensor) -> PairSums:
        """The sums over all tokens of `moments`. For a latent with itself, `product` and `joint` are ignored: its own sums are
        the diagonal."""
        same = i == j
        return cls(
            moments.weight.expand(i.shape),
            torch.stack([moments.total[i], moments.total[j]]),
            torch.stack([moments.square[i], moments.square[j]]),
            torch.stack([moments.count[i], moments.count[j]]),
            torch.where(same, moments.square[i], product),
            torch.where(same, moments.count[i].to(joint.dtype), joint),
        )

    def plus(self, other: PairSums) -> PairSums:
        return PairSums(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    def minus(self, other: PairSums) -> PairSums:
        return PairSums(*(mine - theirs for mine, theirs in zip(self, other, strict=True)))

    def followed_by(self, other: PairSums) -> PairSums:
        """The pairs of both, one after the other."""
        return PairSums(*(torch.cat(parts, -1) for parts in zip(self, other, strict=True)))

    def at(self, place: Tensor) -> PairSums:
        return PairSums(*(part[..., place] for part in self))

    def to(self, device: torch.device) -> PairSums:
        return PairSums(*(part.to(device) for part in self))


@dataclass(frozen=True, eq=False)
class PairStatistics:
    """Statistics of some pairs, each field [P]."""

    i: Tensor
    j: Tensor
    correlation: Tensor
    cosine: Tensor
    jaccard: Tensor
    support: Tensor
    """int64: tokens on which at least one fires (decayed ones rounded down)."""
    weight: Tensor
    """float64: sum of the weights of the counted tokens (their number without weights). A sketch counts its newest tokens, for
    watched pairs more of them."""


def pair_statistics(
    moments: Moments, i: Tensor, j: Tensor, product: Tensor, joint: Tensor, unit: float = 1.0
) -> PairStatistics:
    """Formulas of a pair from `product` = sum w z_i z_j and `joint` = tokens on which both fire, over all tokens of
    `moments`."""
    return statistics_of(i, j, PairSums.of(moments, i, j, product, joint), unit)


def statistics_of(i: Tensor, j: Tensor, sums: PairSums, unit: float = 1.0) -> PairStatistics:
    """Bitwise the same with i and j exchanged.

    `unit` is what one token counts in the sums (above 1 where old tokens fade by newer ones growing).
    """
    mean, inverse = _centred(sums.weight, sums.total, sums.square)
    covariance = sums.product / sums.weight.clamp(min=1e-300) - mean[0] * mean[1]
    correlation = (covariance * (inverse[0] * inverse[1])).clamp(-1, 1)
    norms = (sums.square[0] * sums.square[1]).sqrt()
    cosine = torch.where(norms > 0, sums.product / norms.clamp(min=1e-300), 0.0).clamp(max=1)
    union = sums.fired[0] + sums.fired[1] - sums.joint
    jaccard = sums.joint.double() / union.double().clamp(min=1e-300)
    support = union if unit == 1 else union / unit
    weight = sums.weight if unit == 1 else sums.weight / unit
    return PairStatistics(i, j, correlation, cosine, jaccard, support.long(), weight)


def _centred(weight: Tensor, total: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, 1 / standard deviation, 0 for a constant latent), each of the shape of `total`."""
    weight = weight.clamp(min=1e-300)
    mean, second = total / weight, square / weight
    variance = second - mean.square()
    valid = variance > CONSTANT * second
    return mean, torch.where(valid, variance.clamp(min=1e-300).rsqrt(), 0.0)


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
            weight): those of the whole stream, or those that a sketch has counted for this pair (see
            `FeatureCorrelation.statistics`).
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
    total: int
    """Pairs that passed; `pairs` are the strongest of them where not all were asked for."""
    histogram: Tensor | None
    """[bins] int64: pairs that fired together at least once, counted by correlation."""
    squared_sum: float | None
    """sum of r_ij^2 over ALL pairs i < j, those that never fire together included."""
    candidates: tuple[Tensor, Tensor] | None = None
    """(i, j) of the pairs that the sketch proposed: `pairs` are those of them that exact counts confirm."""


def kept(stats: PairStatistics, min_correlation: float, min_support: int) -> PairStatistics:
    keep = (stats.correlation >= min_correlation) & (stats.support >= min_support)
    return PairStatistics(*(getattr(stats, name)[keep] for name in PairStatistics.__dataclass_fields__))


def sorted_pairs(
    found: list[PairStatistics], d_sae: int, device: torch.device, most: int | None = None
) -> CorrelatedPairs:
    """The first `most` of all the pairs (None: all), strongest first."""
    names = ("i", "j", "correlation", "support", "cosine", "jaccard", "weight")
    kinds = (torch.int64, torch.int64, torch.float64, torch.int64, torch.float64, torch.float64, torch.float64)
    columns = [
        torch.cat([torch.empty(0, dtype=kind, device=device), *(getattr(part, name) for part in found)])
        for name, kind in zip(names, kinds, strict=True)
    ]
    by_pair = (columns[0] * d_sae + columns[1]).argsort()
    order = by_pair[columns[2][by_pair].sort(descending=True, stable=True).indices][:most]
    return CorrelatedPairs(*(column[order] for column in columns))


class StrongestPairs:
    """Collects pairs in parts; holds at most twice `most` of them (None: all), the strongest ones."""

    def __init__(self, d_sae: int, device: torch.device, most: int | None) -> None:
        self._d_sae, self._device, self._most = d_sae, device, most
        self._parts: list[PairStatistics] = []
        self._held = self.total = 0

    def add(self, part: PairStatistics) -> None:
        self._parts.append(part)
        self._held += part.i.numel()
        self.total += part.i.numel()
        if self._most is not None and self._held > 2 * self._most:
            kept_ones = self.pairs()
            self._parts = [PairStatistics(*(getattr(kept_ones, n) for n in PairStatistics.__dataclass_fields__))]
            self._held = len(kept_ones)

    def pairs(self) -> CorrelatedPairs:
        return sorted_pairs(self._parts, self._d_sae, self._device, self._most)
