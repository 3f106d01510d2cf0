"""Uncertainty of the correlation of two sparse latents: bounds, and a jackknife over groups of sequences for some pairs.

The rule of thumb for the standard error (`STANDARD_ERROR`) is right for moderate amplitudes. Where few large activations carry
a correlation, or firings cluster in sequences, the error is several times larger; a jackknife over groups of sequences
estimates it (Efron and Stein 1981; Bertail and others for dependent data).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transcoder.kernels import SparseCodes, counts_cpp
from transcoder.kernels.correlation.counter_rng import hash_bits
from transcoder.kernels.correlation.statistics import CONSTANT

STANDARD_ERROR = 1.32
"""SE(atanh r) ~ 1.32 / sqrt(U - 3) with U union-firing tokens (calibrated on planted pairs). Fisher's 1 / sqrt(n - 3) over all
tokens is 12 to 123 times too small: tokens on which neither latent fires carry almost no information."""
TWO_SIDED_95 = 1.959963984540054
ONE_SIDED_95 = 1.6448536269514722
JACKKNIFE_95 = 2.131
"""Two-sided 95 % quantile of Student's t with 15 degrees of freedom: 16 groups of sequences."""
NEARLY_ONE = 1 - 1e-15


def correlation_bounds(correlation: float, support: int, error: float | None = None) -> tuple[float, float]:
    """(lower, upper) 95 % bounds of a correlation measured on `support` union-firing tokens; (-1, 1) below 4
    tokens.

    Args:
        error: the pair's own standard error of atanh(r), by a jackknife over 16 groups; None takes the rule of thumb, which is
            too small for amplitudes of heavy tails.
    """
    if support <= 3:
        return -1.0, 1.0
    z = math.atanh(max(-NEARLY_ONE, min(NEARLY_ONE, correlation)))
    half = TWO_SIDED_95 * STANDARD_ERROR / math.sqrt(support - 3) if error is None else JACKKNIFE_95 * error
    # The transform rounds: a bound must not cross the value that it bounds.
    return min(correlation, math.tanh(z - half)), max(correlation, math.tanh(z + half))


def lower_bounds(correlation: Tensor, support: Tensor) -> Tensor:
    """[P] lower bounds of `correlation_bounds` by the rule of thumb."""
    z = torch.atanh(correlation.clamp(-NEARLY_ONE, NEARLY_ONE))
    half = TWO_SIDED_95 * STANDARD_ERROR / (support - 3).clamp(min=1).double().sqrt()
    return torch.where(support > 3, torch.minimum(correlation, torch.tanh(z - half)), -1.0)


def pooled_lower_bound(blocks: Sequence[tuple[float, float, float]]) -> float:
    """Lower 95 % bound of the correlation over disjoint blocks, each (r, its standard error, weight).

    Correlations are averaged without atanh: a block without a mismatch would outweigh all others.
    """
    total = sum(weight for _, _, weight in blocks)
    r = sum(weight * value for value, _, weight in blocks) / total
    error = math.sqrt(sum((weight * error) ** 2 for _, error, weight in blocks)) / total
    r = max(-NEARLY_ONE, min(NEARLY_ONE, r))
    return math.tanh(math.atanh(r) - ONE_SIDED_95 * error / (1 - r * r))


GROUPS = 16
"""Number of groups; a hash assigns each sequence to one. In simulation, bounds of 32 groups contain the true value no more
often and cost twice as much."""
MOST_PAIRS = 4096
"""Most pairs followed, at 6 * 16 float64 numbers each and O(B) work a pair and step. There are at most two pairs a latent: a
dictionary with more candidates has failed as a whole."""
LEAST_SHARE = 0.25
"""Share of the tokens on which a pair must have been followed for its own error to be used."""
EVERY_UPDATE = 1024
"""Pairs that are followed in every update; of more, each in one of two or (from twice as many on) three, which the errors are
scaled for: the work of an update is bounded, and the share of tokens stays above `LEAST_SHARE`."""
TILE_NUMBERS = 1 << 20
"""Numbers in the largest temporary (8 MiB)."""
_KEY = 0x6A61636B
"""Keys the hash, so that groups are independent of the bits of `SequenceCounts`."""


def most_pairs(d_sae: int) -> int:
    """Most pairs that are followed in a dictionary of d_sae latents."""
    return min(MOST_PAIRS, 2 * d_sae, d_sae * (d_sae - 1) // 2)


class PairErrors(NamedTuple):
    """Errors of P pairs, each over the tokens since it began to be followed."""

    fisher: Tensor
    """[P] float64: standard error of atanh(r)."""
    plain: Tensor
    """[P] float64: standard error of r."""
    weight: Tensor
    """[P] float64: sum of those tokens' weights."""


def scaled(found: PairErrors, error: Tensor, weight: Tensor) -> Tensor:
    """[P]: errors rescaled from the tokens on which a pair was followed to those of `weight` [P]; NaN if it was followed on too
    few."""
    share = found.weight / weight.clamp(min=1e-300)
    return torch.where(share >= LEAST_SHARE, error * share.clamp(max=1).sqrt(), torch.nan)


class PairJackknife:
    """Per pair and group of sequences: sum of weights, sums and squares of both latents, and of their product.

    Sums over disjoint tokens add up. Nothing here waits for a device.
    """

    def __init__(self, d_sae: int, device: torch.device) -> None:
        self.d_sae, self.device, self.most = d_sae, device, most_pairs(d_sae)
        self._offered = 0
        self._begin(*(torch.zeros(0, dtype=torch.int64, device=device) for _ in range(2)))

    def _begin(self, i: Tensor, j: Tensor) -> None:
        self.i, self.j = i, j
        self._sums = torch.zeros(6, i.numel(), GROUPS, dtype=torch.float64, device=self.device)
        """weight, sum and square of i, sum and square of j, product."""

    def __len__(self) -> int:
        return self.i.numel()

    def watch(self, i: Tensor, j: Tensor) -> None:
        """Follow exactly these pairs i < j [P], each once; only the first `most` of them. A pair that was followed before keeps
        its sums."""
        i, j = i[: self.most], j[: self.most]
        old, sums = self.places(i, j), self._sums
        self._begin(i.clone(), j.clone())
        if sums.shape[1]:
            self._sums = torch.where((old >= 0)[None, :, None], sums[:, old.clamp(min=0)], 0.0)

    def places(self, i: Tensor, j: Tensor) -> Tensor:
        """[Q] int64: index of each pair i < j, -1 if it is not followed."""
        return places_of(i, j, (self.i, self.j), self.d_sae)

    @torch.no_grad()
    def update(self, codes: SparseCodes, sequences: Tensor | None, weights: Tensor | None) -> None:
        """Add the tokens of `codes` (B, d_sae): each to the group of its sequence [B]; where sequences are not known, each
        token counts as a sequence. `weights` [B] as in `FeatureCorrelation.update`."""
        batch = codes.shape[0]
        numbers = torch.arange(self._offered, self._offered + batch, device=self.device)
        turn = self._offered // max(1, batch)
        if len(self) == 0 or turn % min(3, -(-len(self) // EVERY_UPDATE)):
            return
        group = hash_bits(numbers if sequences is None else sequences, _KEY) & (GROUPS - 1)
        if counts_cpp.runs(codes):
            counts_cpp.add_by_group(codes, self.i, self.j, group, weights, self._sums)
            return
        spread = torch.zeros(batch, GROUPS, dtype=torch.float64, device=self.device)
        spread.scatter_(1, group[:, None], 1.0 if weights is None else weights.detach().double()[:, None])
        self._sums[0] += spread.sum(0)
        z, slot = self._columns(codes)
        step = max(1, TILE_NUMBERS // max(1, batch))
        for a in range(0, len(self), step):
            left, right = z[slot[self.i[a : a + step]]], z[slot[self.j[a : a + step]]]
            parts = (left, left.square(), right, right.square(), left * right)
            for n, part in enumerate(parts, 1):
                self._sums[n, a : a + step] += part @ spread

    def _columns(self, codes: SparseCodes) -> tuple[Tensor, Tensor]:
        """(activations [n + 1, B] of the latents followed, the last row 0; slot [d_sae])."""
        latents = torch.cat([self.i, self.j])
        n = latents.numel()
        slot = torch.full((self.d_sae,), n, dtype=torch.int64, device=self.device)
        # A latent of several pairs has the first of its places, whatever the order of writes.
        slot.scatter_reduce_(0, latents, torch.arange(n, device=self.device), "amin")
        z = torch.zeros(n + 1, codes.shape[0], dtype=torch.float64, device=self.device)
        entry = slot[codes.indices]
        z[entry, codes.rows()] = torch.where(entry < n, codes.values.detach().double(), 0.0)
        return z, slot

    def errors(self, i: Tensor, j: Tensor, *, earlier: PairJackknife | None = None) -> PairErrors:
        """Errors of pairs i < j [Q], in their order; NaN errors and weight 0 for a pair that is not followed. `earlier`: sums
        of earlier tokens, which are included."""
        total = self._at(i, j) if earlier is None else self._at(i, j) + earlier._at(i, j)
        whole = total.sum(2, keepdim=True)
        r = _correlation(whole - total)
        z = torch.atanh(r.clamp(-NEARLY_ONE, NEARLY_ONE))
        scale = (GROUPS - 1) / GROUPS
        fisher, plain = ((scale * (x - x.mean(1, keepdim=True)).square().sum(1)).sqrt() for x in (z, r))
        weight = whole[0, :, 0]
        followed = weight > 0
        return PairErrors(torch.where(followed, fisher, torch.nan), torch.where(followed, plain, torch.nan), weight)

    def _at(self, i: Tensor, j: Tensor) -> Tensor:
        place = self.places(i, j)
        if len(self) == 0:
            return torch.zeros(6, i.numel(), GROUPS, dtype=torch.float64, device=self.device)
        return torch.where((place >= 0)[None, :, None], self._sums[:, place.clamp(min=0)], 0.0)

    def forget(self, latents: Tensor) -> None:
        """Stop following pairs that contain one of these latents."""
        keep = ~(torch.isin(self.i, latents) | torch.isin(self.j, latents))
        self.watch(self.i[keep], self.j[keep])

    def reset(self) -> None:
        """Forget the sums; the pairs stay."""
        self._sums.zero_()

    @staticmethod
    def state_bytes_at_most(d_sae: int) -> int:
        """Bytes that the tensors of a `state_dict` can ever hold."""
        return most_pairs(d_sae) * (16 + 6 * GROUPS * 8)

    def state_dict(self) -> dict[str, Any]:
        return {"i": self.i.clone(), "j": self.j.clone(), "sums": self._sums.clone(), "offered": self._offered}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """All of it or, with a ValueError, nothing."""
        i, j, sums, offered = (state[name] for name in ("i", "j", "sums", "offered"))
        if i.shape != j.shape or i.dim() != 1 or sums.shape != (6, i.numel(), GROUPS):
            raise ValueError(
                f"PairJackknife.load_state_dict: expected i and j [P] and sums [6, P, {GROUPS}], got {list(i.shape)}, "
                f"{list(j.shape)} and {list(sums.shape)}"
            )
        self.i, self.j = i.to(self.device, copy=True), j.to(self.device, copy=True)
        self._sums, self._offered = sums.to(self.device, torch.float64, copy=True), int(offered)


def places_of(i: Tensor, j: Tensor, among: tuple[Tensor, Tensor], d_sae: int) -> Tensor:
    """[Q] int64: index of each pair (i, j) in the pairs `among` [P], which are distinct; -1 if it is not among them."""
    if among[0].numel() == 0:
        return torch.full_like(i, -1)
    key, order = (among[0] * d_sae + among[1]).sort()
    wanted = i * d_sae + j
    place = torch.searchsorted(key, wanted).clamp_(max=key.numel() - 1)
    return torch.where(key[place] == wanted, order[place], -1)


def _correlation(sums: Tensor) -> Tensor:
    """[P, G] from [6, P, G]; 0 where a latent does not vary."""
    weight, total_i, square_i, total_j, square_j, product = sums
    weight = weight.clamp(min=1e-300)
    mean_i, mean_j = total_i / weight, total_j / weight
    second_i, second_j = square_i / weight, square_j / weight
    spread_i, spread_j = second_i - mean_i.square(), second_j - mean_j.square()
    varies = (spread_i > CONSTANT * second_i) & (spread_j > CONSTANT * second_j)
    scale = torch.where(varies, spread_i * spread_j, 1.0).clamp(min=1e-300).rsqrt()
    return torch.where(varies, (product / weight - mean_i * mean_j) * scale, 0.0).clamp(-1, 1)
