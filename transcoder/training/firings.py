"""Firings: every activation of every latent on some tokens, on the host; samples, counts and histograms are read from it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from transcoder.activations import ActivationBatch
from transcoder.antidup.sample_store import (
    Samples,
    best_entries,
    evenly_chosen,
    strata_of,
    strongest_first,
    without_overlap,
)
from transcoder.config import SamplesSection
from transcoder.kernels.correlation.counter_rng import uniform
from transcoder.model import Transcoder
from transcoder.training.evaluation import at_inference

BINS = 20
QUANTILES = (0.25, 0.5, 0.75, 0.95)
"""Of the tokens on which a latent fires, by activation."""
MOST_ENTRIES = 1 << 24
"""Activations held, 12 bytes each; more tokens than give these are not looked at."""
FIRST_LOOK = 64
"""Strongest activations of a latent that are looked at for its top samples; more only where their contexts overlap."""
MOST_LOOKED_AT = 4096


class LatentCounts(NamedTuple):
    """Over the tokens looked at: tokens fired on [d_sae] int64, highest activation [d_sae] fp32, histogram [d_sae, BINS] int64
    of activations from 0 to the highest, quantiles [d_sae, len(QUANTILES)] fp32; all 0 for a latent that did not fire."""

    fired: Tensor
    peak: Tensor
    histogram: Tensor
    quantiles: Tensor


@dataclass(frozen=True, eq=False)
class Firings:
    """T tokens and the E activations above 0 on them, all on the host.

    Fields:
        latent: [E] int64 ascending, and row: [E] int64, ascending for each latent: which token; value: [E] fp32.
        tokens, positions, sequences: [T] int64, sequences -1 where unknown; contexts: [T, C] int32, -1 where there is no token.
        anchor: the column of `contexts` that holds the token itself.
        d_sae: latents of the dictionary.
    """

    latent: Tensor
    row: Tensor
    value: Tensor
    tokens: Tensor
    positions: Tensor
    sequences: Tensor
    contexts: Tensor
    anchor: int
    d_sae: int

    def __len__(self) -> int:
        return self.tokens.numel()

    @classmethod
    @torch.no_grad()
    def of(cls, transcoder: Transcoder, batches: Iterable[ActivationBatch], tokens: int) -> Firings:
        """What `transcoder` does at inference on the first `tokens` tokens of `batches`, or on fewer: all there are, or those
        that give `MOST_ENTRIES` activations."""
        entries: list[tuple[Tensor, ...]] = []
        columns: list[tuple[Tensor, ...]] = []
        seen = held = anchor = 0
        with at_inference(transcoder):
            for batch in batches:
                size = min(len(batch), tokens - seen)
                if size <= 0 or held >= MOST_ENTRIES:
                    break
                codes = transcoder.encode(batch.source[:size])
                live = codes.values > 0
                kept = (codes.indices[live].long(), codes.rows()[live] + seen, codes.values[live].float())
                entries.append(tuple(part.cpu() for part in kept))
                anchor = batch.context_anchor if batch.contexts is not None else 0
                shown = batch.tokens[:, None] if batch.contexts is None else batch.contexts
                unknown = torch.full_like(batch.tokens, -1)
                where = (batch.tokens, batch.positions, unknown if batch.sequences is None else batch.sequences)
                columns.append(tuple(part[:size].cpu() for part in (*where, shown.int())))
                seen, held = seen + size, held + kept[0].numel()
        nothing = torch.zeros(0, dtype=torch.int64, device="cpu")
        if not columns:
            entries, columns = [(nothing, nothing, nothing.float())], [(nothing,) * 3 + (nothing[:, None].int(),)]
        latent, row, value = (torch.cat(parts) for parts in zip(*entries, strict=True))
        latent, order = latent.sort(stable=True)
        ids, positions, sequences, contexts = (torch.cat(parts) for parts in zip(*columns, strict=True))
        found = (ids, positions, sequences, contexts)
        return cls(latent, row[order], value[order], *found, anchor=anchor, d_sae=transcoder.config.d_sae)

    @cached_property
    def _first(self) -> Tensor:
        """[d_sae + 1] int64: where each latent's entries begin."""
        return torch.searchsorted(self.latent, torch.arange(self.d_sae + 1, device="cpu"))

    @cached_property
    def _strongest_first(self) -> Tensor:
        """[E] int64: entries by latent, each latent's by falling activation (ties: the earlier token)."""
        return strongest_first(self.latent, self.value)

    def counts(self) -> LatentCounts:
        """Counts, peaks, histograms and quantiles of all latents."""
        fired, strongest = self._first.diff(), self.value[self._strongest_first]
        last = max(0, self.value.numel() - 1)
        lives = fired > 0
        if not bool(lives.any()):
            shape = (self.d_sae, len(QUANTILES))
            none = torch.zeros(shape, device="cpu")
            return LatentCounts(fired, none[:, 0], torch.zeros(self.d_sae, BINS, dtype=torch.int64, device="cpu"), none)
        peak = torch.where(lives, strongest[self._first[:-1].clamp(max=last)], 0.0)
        place = (self.value / peak[self.latent] * BINS).long().clamp_(0, BINS - 1)
        histogram = torch.bincount(self.latent * BINS + place, minlength=self.d_sae * BINS).view(self.d_sae, BINS)
        share = 1 - torch.tensor(QUANTILES, dtype=torch.float64, device="cpu")
        at = self._first[:-1, None] + ((fired[:, None] - 1).clamp(min=0) * share).round().long()
        return LatentCounts(fired, peak, histogram, torch.where(lives[:, None], strongest[at.clamp(max=last)], 0.0))

    def samples(
        self, section: SamplesSection, followed: Tensor, special: Tensor, length: int, seed: int, step: int
    ) -> tuple[Samples, Samples]:
        """(top [F, top_per_latent], stratified [F, places]) samples of the followed latents [F], contexts that overlap a
        stronger one's (or, stratified, one drawn before) left out. As `ActivationSampleCollector` keeps them, but exactly, of
        all tokens at once.

        Args:
            special: [T] bool, tokens that count as sinks.
            length: of a sequence; `seed` draws the stratified samples.
        """
        count, window = followed.numel(), max(1, self.contexts.shape[1])
        slots = torch.full((self.d_sae,), count, dtype=torch.int64, device="cpu")
        slots[followed] = torch.arange(count, device="cpu")
        slot = torch.where(self.value >= section.min_activation, slots[self.latent], count)
        bins, (strata, per_bin) = section.position_bins, strata_of(section)
        bin_of = (self.positions * bins // max(1, length)).clamp(0, bins - 1)
        stratum = torch.where(special, bins, bin_of)[self.row]
        group = torch.where((slot < count) & (stratum < strata), slot * strata + stratum, count * strata)
        key = uniform(torch.arange(self.value.numel(), device="cpu"), seed, 0, step, 0).float()
        drawn = self._taken(best_entries(group, key, count * strata, per_bin), key, step)
        return self._top(section, followed, window, step), evenly_chosen(drawn, count, section, window)

    def _top(self, section: SamplesSection, followed: Tensor, window: int, step: int) -> Samples:
        first, fired = self._first[followed], self._first.diff()[followed]
        look, most = FIRST_LOOK, int(fired.max()) if fired.numel() else 0
        entry = torch.full((followed.numel(), section.top_per_latent), -1, dtype=torch.int64, device="cpu")
        rest = torch.arange(followed.numel(), device="cpu")
        while rest.numel():
            at = torch.arange(min(look, most), device="cpu")
            inside = at < fired[rest, None]
            found = self._strongest_first[(first[rest, None] + at).clamp(max=max(0, self.value.numel() - 1))]
            strong = torch.where(inside & (self.value[found] >= section.min_activation), self.value[found], -1.0)
            row = self.row[found]
            keep = without_overlap(strong, self.positions[row], self.sequences[row], window)
            best = torch.where(keep, strong, -1.0).sort(dim=1, descending=True, stable=True)
            chosen = torch.where(best.values >= 0, found.gather(1, best.indices), -1)[:, : section.top_per_latent]
            entry[rest, : chosen.shape[1]] = chosen
            # Where overlaps left too few, those further down are looked at too.
            lacking = (keep.sum(1) < section.top_per_latent) & (fired[rest] > look) & (strong[:, -1] >= 0)
            rest, look = (rest[lacking], 8 * look) if look < MOST_LOOKED_AT else (rest[:0], look)
        return self._taken(entry, self.value, step)

    def _taken(self, entry: Tensor, score: Tensor, step: int) -> Samples:
        """The samples of these entries [G, k], -1 for an empty place."""
        if self.value.numel() == 0:
            groups, k = entry.shape
            return Samples.empty(groups, k, self.contexts.shape[1], torch.device("cpu"))
        at = entry.clamp(min=0)
        row = self.row[at]
        columns = (self.tokens[row], self.positions[row], self.sequences[row], torch.full_like(row, step))
        return Samples(torch.where(entry >= 0, score[at], -1.0), self.value[at], *columns, self.contexts[row])

    def activations(self, latent: Tensor, samples: Samples) -> Tensor:
        """[n, C] fp32: the activation of latents [n] on every token of the contexts of samples [n], NaN on tokens that were not
        looked at (sinks, padding)."""
        n, width = samples.context.shape
        offsets = torch.arange(width, device="cpu") - self.anchor
        known, place = self.sequences.unique(return_inverse=True)
        length = (int(self.positions.max()) if len(self) else 0) + width + 1
        keys, rows = (place * length + self.positions).sort(stable=True)
        where = torch.searchsorted(known, samples.sequence).clamp(max=max(0, known.numel() - 1))
        position = samples.position[:, None] + offsets
        wanted = torch.where(position >= 0, where[:, None] * length + position, -1)
        at = torch.searchsorted(keys, wanted).clamp(max=max(0, keys.numel() - 1))
        there = (keys[at] == wanted) & (samples.context >= 0) & (samples.sequence >= 0)[:, None]
        own = self.latent * len(self) + self.row
        entry_wanted = latent[:, None] * len(self) + rows[at]
        entry = torch.searchsorted(own, entry_wanted).clamp(max=max(0, own.numel() - 1))
        value = torch.where(own[entry] == entry_wanted, self.value[entry], 0.0)
        value = torch.where(there, value, torch.nan)
        # The token itself is known even where its sequence is not.
        value[torch.arange(n, device="cpu"), self.anchor] = samples.activation
        return value
