"""Fixed-size stores of samples: per group the k best by score, contexts that overlap a better one dropped.

Everything is a tensor of static shape, so collecting needs neither a loop over latents nor a wait for the
device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from transcoder.config import SamplesSection

EMPTY = -1.0
"""Score of an empty place; scores of samples are >= 0."""


class Samples(NamedTuple):
    """Samples laid out [groups, k]; empty places have score EMPTY."""

    score: Tensor
    """[G, K] fp32: samples with higher scores are kept."""
    activation: Tensor
    """[G, K] fp32."""
    token: Tensor
    """[G, K] int64."""
    position: Tensor
    """[G, K] int64."""
    sequence: Tensor
    """[G, K] int64; -1 where unknown."""
    step: Tensor
    """[G, K] int64."""
    context: Tensor
    """[G, K, C] int32; -1 where there is no token."""

    @classmethod
    def empty(cls, groups: int, k: int, context: int, device: torch.device) -> Samples:
        def full(value: float, dtype: torch.dtype) -> Tensor:
            return torch.full((groups, k), value, dtype=dtype, device=device)

        return cls(
            score=full(EMPTY, torch.float32),
            activation=full(0, torch.float32),
            token=full(-1, torch.int64),
            position=full(-1, torch.int64),
            sequence=full(-1, torch.int64),
            step=full(-1, torch.int64),
            context=torch.full((groups, k, context), -1, dtype=torch.int32, device=device),
        )

    def take(self, order: Tensor) -> Samples:
        """Rearranged within each group by `order` [G, K']."""
        groups, k, window = self.context.shape
        # Gathering whole rows of the flat store takes a third of the time of a gather by single numbers.
        row = (order + k * torch.arange(groups, device=order.device)[:, None]).view(-1)
        context = self.context.view(-1, window).index_select(0, row).view(groups, -1, window)
        parts = {name: part.gather(1, order) for name, part in self._asdict().items() if name != "context"}
        return Samples(**parts, context=context)


def strongest_first(group: Tensor, score: Tensor) -> Tensor:
    """[n] int64: entries by group [n] int64, each group's by falling score [n] fp32 >= 0 (ties: the earlier entry).

    Equivalent to two stable sorts, by score and then by group, in the time of one: the bits of floats that are not negative
    are in the order of the numbers.
    """
    bits = score.contiguous().view(torch.int32).long()
    return ((group << 32) + (torch.iinfo(torch.int32).max - bits)).sort(stable=True).indices


def best_entries(group: Tensor, score: Tensor, groups: int, k: int) -> Tensor:
    """[groups, k] int64: entry numbers of each group's k highest scores (ties: the earlier entry), -1 where
    there are fewer.

    Entries of group `groups` take no part. Nothing is read by the host.
    """
    entry = strongest_first(group, score)
    sorted_group = group[entry]
    first = torch.searchsorted(sorted_group, torch.arange(groups + 1, device=group.device))
    rank = torch.arange(entry.numel(), device=group.device) - first[sorted_group]
    wanted = (sorted_group < groups) & (rank < k)
    # Entries that are not wanted share one place after the end of the table.
    place = torch.where(wanted, sorted_group * k + rank, groups * k)
    table = torch.full((groups * k + 1,), -1, dtype=torch.int64, device=group.device)
    table.scatter_(0, place, torch.where(wanted, entry, -1))
    return table[:-1].view(groups, k)


def merged(old: Samples, new: Samples, k: int, window: int) -> tuple[Samples, Tensor]:
    """The k best of both per group, by score (ties: old first); a sample whose context overlaps a better
    one's is dropped.

    Contexts overlap when both samples stand in one known sequence, fewer than `window` positions apart.

    Returns: the samples [G, k], and [G, k] bool: which of the places hold one of `new`.
    """
    both = Samples(*(torch.cat([a, b], 1) for a, b in zip(old, new, strict=True)))
    score, order = both.score.sort(dim=1, descending=True, stable=True)
    keep = without_overlap(score, both.position.gather(1, order), both.sequence.gather(1, order), window)
    score = torch.where(keep, score, EMPTY)
    best = score.sort(dim=1, descending=True, stable=True).indices[:, :k]
    # Contexts are nearly all of the bytes: they move only once, into their final place.
    chosen = order.gather(1, best)
    taken = both.take(chosen)._replace(score=score.gather(1, best))
    return taken, (chosen >= old.score.shape[1]) & (taken.score >= 0)


def without_overlap(score: Tensor, position: Tensor, sequence: Tensor, window: int) -> Tensor:
    """[G, K] bool: which of the samples [G, K], best first within a group, stay when each drops the worse ones that it
    overlaps."""
    keep = score >= 0
    known = sequence >= 0
    for n in range(1, keep.shape[1]):
        near = (position[:, :n] - position[:, n : n + 1]).abs() < window
        same = (sequence[:, :n] == sequence[:, n : n + 1]) & known[:, :n]
        keep[:, n] &= ~(near & same & keep[:, :n]).any(1)
    return keep


def strata_of(section: SamplesSection) -> tuple[int, int]:
    """(strata, places in each) of a latent's stratified samples: position bins, and one for special tokens if any are kept."""
    bins, wanted = section.position_bins, section.stratified_per_latent
    per_bin = max(section.min_per_bin, -(-wanted // bins)) if wanted else 0
    return bins + 1 if section.max_sink_fraction > 0 else bins, per_bin


def evenly_chosen(spread: Samples, followed: int, section: SamplesSection, window: int) -> Samples:
    """[followed, strata * places] of stratified samples [followed * strata, places]: overlaps between bins dropped, special
    tokens cut to `max_sink_fraction` of a latent's samples."""
    strata, per_bin = strata_of(section)
    joined = Samples(*(part.reshape(followed, strata * per_bin, *part.shape[2:]) for part in spread))
    keep = without_overlap(joined.score, joined.position, joined.sequence, window)
    ordinary = section.position_bins * per_bin
    fraction = section.max_sink_fraction
    if strata > section.position_bins and fraction < 1:
        room = (keep[:, :ordinary].sum(1, keepdim=True).double() * fraction / (1 - fraction) + 1e-6).floor()
        keep[:, ordinary:] &= keep[:, ordinary:].cumsum(1) <= room
    return joined._replace(score=torch.where(keep, joined.score, EMPTY))
