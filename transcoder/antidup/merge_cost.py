"""The merge test: the cost, on held-out tokens, of folding one latent of a pair into the other.

A high correlation shows that two latents fire together; only this test shows that one of them can be removed. Two latents
with correlated causes but different directions fail it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from transcoder.kernels import SparseCodes
from transcoder.kernels.correlation.torch_backend import add_at

TILE_NUMBERS = 1 << 22
"""Numbers in the largest temporary (32 MiB of fp64)."""
MERGEABLE_SHARE = 0.1
"""A pair is mergeable when the fold costs at most this share of the cost of removing the latent. If it has its own decoder row,
a latent whose uncentred cosine with its partner is c costs the share 1 - c^2: at 0.1, pairs with c > 0.949 pass. In
`bench.science` (S2, S3) four fifths of the pairs of features split by too large a k cost less; planted pairs that are no
duplicates cost 0.145 or more.
Two features that always fire together with amplitudes of little spread pass it, whatever their directions: one latent does
carry most of their output."""
MIN_FIRINGS = 10
"""Fewest held-out tokens on which the dropped latent must fire for a verdict."""


@dataclass(frozen=True, eq=False)
class MergeResult:
    """One entry a pair, each [P].

    Fields:
        kept, dropped: int64 latent ids. Kept is the latent of the narrower prefix where they differ, else the direction of the
            smaller loss.
        scale: float64 a >= 0; the kept latent's decoder row becomes W[kept] + a W[dropped].
        fvu_change: float64, the change of the FVU on all held-out tokens by the fold, with unchanged selections.
        fvu_without: float64, the change of the FVU by leaving `dropped` out and changing nothing else.
        firings: int64, held-out tokens on which `dropped` fires; on each of them the fold saves one active latent.
    """

    kept: Tensor
    dropped: Tensor
    scale: Tensor
    fvu_change: Tensor
    fvu_without: Tensor
    firings: Tensor

    @classmethod
    def untested(cls, i: Tensor, j: Tensor) -> MergeResult:
        """The result for pairs that were not tested: no firings, so no verdict."""
        nothing = torch.zeros(i.shape, dtype=torch.float64, device=i.device)
        return cls(i.clone(), j.clone(), nothing, nothing.clone(), nothing.clone(), torch.zeros_like(i))

    def at(self, index: Tensor) -> MergeResult:
        return MergeResult(*(getattr(self, f.name)[index] for f in fields(MergeResult)))

    @property
    def known(self) -> Tensor:
        """[P] bool: the dropped latent fired often enough for a verdict."""
        return self.firings >= MIN_FIRINGS

    @property
    def cost_share(self) -> Tensor:
        """[P] float64: the cost of the fold divided by the cost of removing the latent; at most 0 if the fold lowers the FVU,
        inf if removing the latent costs nothing and the fold does."""
        worth = self.fvu_without.clamp(min=0)
        free = self.fvu_change <= 0
        harm = torch.where(worth > 0, self.fvu_change / worth.clamp(min=torch.finfo(torch.float64).tiny), torch.inf)
        return torch.where(free, torch.where(worth > 0, harm, 0.0), harm)

    def mergeable(self, share: float = MERGEABLE_SHARE) -> Tensor:
        """[P] bool: there is a verdict, and the fold costs at most `share` of removing the latent."""
        return self.known & (self.cost_share <= share)


class MergeTest:
    """Streams held-out tokens; every pair is tested against the unchanged transcoder, one at a time.

    With residual r = y_hat - y and the fold of j into i by a, the residual of token t becomes r_t + (a z_ti - z_tj) w_j, so
    the squared error changes by 2 (a S(z_i r.w_j) - S(z_j r.w_j)) + |w_j|^2 (a^2 S(z_i^2) - 2 a S(z_i z_j) + S(z_j^2)):
    sums over tokens that do not depend on the scale. `scale` is the minimiser over a >= 0.

    The codes of the other latents stay fixed: changes of the selection by the fold (the kept latent grows and is selected more
    often) are not included.

    Args:
        i, j: [P] int64, the pairs.
        W_dec: [d_sae, d_out], in the units of `residual`.
        widths: cumulative prefix widths; a latent is never folded into one that fewer prefixes have. None is one prefix.

    Equivalent to: for each pair, decode the codes without j by W_dec with row i replaced by W_dec[i] + a W_dec[j].
    """

    def __init__(self, i: Tensor, j: Tensor, W_dec: Tensor, widths: Sequence[int] | None = None) -> None:
        if i.dim() != 1 or i.shape != j.shape or i.dtype != torch.int64 or j.dtype != torch.int64:
            raise ValueError(
                f"MergeTest: expected i and j, each [P] int64, got {list(i.shape)} {i.dtype} and {list(j.shape)} {j.dtype}"
            )
        if i.numel() and not (int(torch.minimum(i, j).min()) >= 0 and int(torch.maximum(i, j).max()) < W_dec.shape[0]):
            raise ValueError(f"MergeTest: expected latent ids in [0, {W_dec.shape[0]})")
        if bool((i == j).any()):
            raise ValueError("MergeTest: expected two different latents in every pair")
        self.d_sae = W_dec.shape[0]
        self._widths = widths
        self._latents, slots = torch.unique(torch.cat([i, j]), return_inverse=True)
        self._i, self._j = slots[: i.numel()], slots[i.numel() :]
        wide = torch.promote_types(W_dec.dtype, torch.float32)
        self._rows = W_dec.detach()[self._latents].to(wide)
        count, device = self._latents.numel(), W_dec.device
        self._slot = torch.full((self.d_sae,), count, dtype=torch.int64, device=device)
        self._slot[self._latents] = torch.arange(count, device=device)
        self._square = torch.zeros(count, dtype=torch.float64, device=device)
        self._along = torch.zeros_like(self._square)
        """Per latent l: sum of z_l (r . w_l)."""
        self._fired = torch.zeros(count, dtype=torch.int64, device=device)
        self._product = torch.zeros(i.numel(), dtype=torch.float64, device=device)
        self._cross_j = torch.zeros_like(self._product)
        """Per pair: sum of z_i (r . w_j)."""
        self._cross_i = torch.zeros_like(self._product)
        self._tokens = 0
        self._target_sum = torch.zeros(W_dec.shape[1], dtype=torch.float64, device=device)
        self._target_square = torch.zeros((), dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, codes: SparseCodes, residual: Tensor, target: Tensor) -> None:
        """Add B held-out tokens.

        Args:
            codes: (B, d_sae), the transcoder's own.
            residual: [B, d_out] reconstruction minus target.
            target: [B, d_out], for the FVU's denominator.
        """
        if codes.shape[1] != self.d_sae or residual.shape != target.shape or residual.shape[0] != codes.shape[0]:
            raise ValueError(
                f"MergeTest.update: expected codes (B, {self.d_sae}), residual and target [B, {self._rows.shape[1]}], got "
                f"{codes.shape}, {list(residual.shape)}, {list(target.shape)}"
            )
        wide = target.double()
        self._target_sum += wide.sum(0)
        self._target_square += wide.square().sum()
        self._tokens += codes.shape[0]
        values, entry = codes.values.detach(), self._slot[codes.indices]
        fires = (entry < self._latents.numel()) & (values > 0)
        # By latent; on each in the order of the tokens.
        order = entry[fires].sort(stable=True)
        place = fires.nonzero().flatten()[order.indices]
        latent, row, value = order.values, codes.rows()[place], values[place].double()
        step = max(1, TILE_NUMBERS // (self._latents.numel() + 1))
        for a in range(0, codes.shape[0], step):
            here = (row >= a) & (row < a + step)
            with torch.autocast(residual.device.type, enabled=False):
                along = residual[a : a + step].to(self._rows.dtype) @ self._rows.T
            self._add(latent[here], row[here] - a, value[here], along)

    def _add(self, latent: Tensor, row: Tensor, value: Tensor, along: Tensor) -> None:
        """Firings of some tokens, by latent; `along` [tokens, latents] are the products of their residuals with each row."""
        count, pairs = self._latents.numel(), self._i.numel()
        add_at(self._square, latent, value.square())
        add_at(self._along, latent, value * along[row, latent])
        often = torch.bincount(latent, minlength=count)
        self._fired += often
        first = often.cumsum(0) - often
        z = along.new_zeros(along.shape, dtype=value.dtype)
        z[row, latent] = value
        step = max(1, TILE_NUMBERS // max(1, along.shape[0]))
        for a in range(0, pairs, step):
            i, j = self._i[a : a + step], self._j[a : a + step]
            for side, other, cross in ((i, j, self._cross_j), (j, i, self._cross_i)):
                # A pair's sums have terms only where `side` fires.
                number = often[side]
                pair = torch.repeat_interleave(torch.arange(side.numel(), device=side.device), number)
                nth = torch.arange(pair.numel(), device=side.device) - (number.cumsum(0) - number)[pair]
                at = first[side][pair] + nth
                where, partner = row[at], other[pair]
                add_at(cross, a + pair, value[at] * along[where, partner])
                if side is i:
                    add_at(self._product, a + pair, value[at] * z[where, partner])

    @staticmethod
    def joined(tests: Sequence[MergeTest]) -> MergeTest:
        """One test of the tokens of all of these, which are of the same pairs and decoder."""
        found = copy.copy(tests[0])
        for name in ("_square", "_along", "_fired", "_product", "_cross_j", "_cross_i", "_tokens", *_TARGET_SUMS):
            setattr(found, name, sum(getattr(test, name) for test in tests[1:]) + getattr(tests[0], name))
        return found

    def result(self) -> MergeResult:
        """The result over all tokens so far, the better direction of each pair. Raises: ValueError before the first token."""
        if self._tokens == 0:
            raise ValueError("MergeTest.result: expected at least one token; call update first")
        around = self._target_square - self._target_sum.square().sum() / self._tokens
        # For targets that do not vary, the denominator is their mean square, as in `losses.spread`.
        rounding = torch.finfo(torch.float32).eps ** 2 * self._target_square
        total = torch.where(around > rounding, around, self._target_square.clamp(min=1e-30))
        into_i = self._fold(self._i, self._j, self._cross_j, total)
        into_j = self._fold(self._j, self._i, self._cross_i, total)
        return cheaper_fold(into_i, into_j, self._widths)

    def _fold(self, kept: Tensor, dropped: Tensor, cross: Tensor, total: Tensor) -> MergeResult:
        length = self._rows.double().square().sum(1)[dropped]
        sums = PairTotals(self._square[kept], self._square[dropped], self._along[dropped], self._product, cross, length)
        return sums.fold(self._latents[kept], self._latents[dropped], self._fired[dropped], total)


_TARGET_SUMS = ("_target_sum", "_target_square")


def jackknifed(tests: Sequence[MergeTest]) -> tuple[MergeResult, Tensor]:
    """The result of all tests together, and the standard error [P] float64 of its `cost_share`, by leaving out one test at a
    time (NaN with fewer than two): the tests are of separate stretches of the held-out tokens."""
    found = MergeTest.joined(tests).result()
    count = len(tests)
    if count < 2:
        return found, torch.full_like(found.cost_share, math.nan)
    without = [MergeTest.joined([t for t in tests if t is not left]).result().cost_share for left in tests]
    shares = torch.stack(without)
    return found, ((shares - shares.mean(0)).square().sum(0) * (count - 1) / count).sqrt()


class PairTotals(NamedTuple):
    """Sums over tokens of folding one latent of each pair into the other, each [P]; r is the residual, w the dropped row."""

    square: Tensor
    """z_kept^2."""
    own: Tensor
    """z_dropped^2."""
    along: Tensor
    """z_dropped (r . w)."""
    product: Tensor
    """z_kept z_dropped."""
    cross: Tensor
    """z_kept (r . w)."""
    length: Tensor
    """|w|^2, not a sum over tokens."""

    def fold(self, kept: Tensor, dropped: Tensor, firings: Tensor, total: Tensor) -> MergeResult:
        """The fold with the scale of the smallest loss; `total` is the FVU's denominator."""
        square, own, along, product, cross, length = self
        curvature = square * length
        scale = torch.where(curvature > 0, (product * length - cross) / curvature.clamp(min=1e-300), 0).clamp(min=0)
        change = 2 * (scale * cross - along) + length * (scale.square() * square - 2 * scale * product + own)
        without = -2 * along + length * own
        return MergeResult(kept, dropped, scale, change / total, without / total, firings)


def cheaper_fold(into_i: MergeResult, into_j: MergeResult, widths: Sequence[int] | None) -> MergeResult:
    """For each pair the direction of the smaller loss (ties keep the lower id), but never into a latent of fewer prefixes."""
    if not widths:
        prefix_i = prefix_j = torch.zeros_like(into_i.kept)
    else:
        bounds = torch.tensor(list(widths), device=into_i.kept.device)
        # The narrowest prefix that contains the latent.
        prefix_i, prefix_j = (torch.searchsorted(bounds, found.kept, right=True) for found in (into_i, into_j))
    better_j = into_j.fvu_change < into_i.fvu_change
    better_j |= (into_j.fvu_change == into_i.fvu_change) & (into_j.kept < into_i.kept)
    better_j = (better_j & ~(prefix_i < prefix_j)) | (prefix_j < prefix_i)
    fields = MergeResult.__dataclass_fields__
    return MergeResult(*(torch.where(better_j, getattr(into_j, f), getattr(into_i, f)) for f in fields))
