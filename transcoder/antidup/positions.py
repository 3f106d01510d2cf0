"""PositionSampler: which positions activation samples are collected from, or which train, drawn by position bins, with
weights that keep the objective."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transcoder.antidup.ledger import UsageLedger
from transcoder.antidup.special_tokens import SpecialTokens
from transcoder.config import PositionsSection
from transcoder.files import replace_atomically
from transcoder.kernels.correlation.counter_rng import uniform

_NAME = "position_sampler"


@dataclass(frozen=True, eq=False)
class PositionSample:
    """A draw over batch_tokens [S, L]: S sequences of length L, or one row of the L tokens of a training batch.

    Fields:
        keep: [S, L] bool, the drawn positions.
        weights: [S, L] fp32 importance weights, 0 where not drawn, of mean about 1 over the drawn.
        counts: [2, bins + 1] int64, positions seen and drawn per bin, special tokens last.
        resampled: 0-dim int64, drawn positions with an inclusion probability below 1.
        beyond_minimum: 0-dim int64, ordinary tokens that bins have beyond those that are drawn from each in any case.
    """

    keep: Tensor
    weights: Tensor
    counts: Tensor
    resampled: Tensor
    beyond_minimum: Tensor


class PositionSampler:
    """Draws about `keep_fraction` of each sequence's positions, stratified over position bins.

    In a run it chooses which tokens of a training batch the activation samples are collected from: the batch is one
    row of tokens with their `positions`, and every token trains. With `section.train` it chooses which positions of
    whole sequences become training tokens.

    Each bin of ordinary tokens gets a whole number of draws: its share of keep_fraction, but at least `min_samples_per_bin` if
    it has that many tokens. Special tokens form their own stratum, drawn with keep_fraction * bos_penalty and so rarely
    that they never exceed `max_bos_fraction` of a sequence's draws. Within strata the draw is systematic over a random order
    (Madow 1949): the inclusion probability pi of every position is known and exact, and each bin's count is fixed.

    Weights are `c / pi` with c = (expected draws) / (positions with pi > 0), a number that does not depend on
    the draw: so E[sum over drawn of w f] = c * (sum over positions with pi > 0 of f) for any f, and the
    expected sum of weights equals the expected number of draws (mean 1). Dividing by the realised mean
    instead would bias the objective. Positions with pi = 0 (special tokens under bos_penalty 0 or
    max_bos_fraction 0) leave the objective, as masked tokens do.

    The draw is a function of (seed, step) alone: no global generator, and no state but the counts of what was
    drawn.

    Args:
        section: fractions and bins.
        seed: keys the draw, with the step.
        special_ids: token ids counted as special (BOS, EOS, PAD, ...).
        ledger: records calls, positions drawn and files.
        out_dir: folder of `positions.json` (`save`).
        sequence_length: positions run from 0 to sequence_length - 1 where `sample_positions` is given positions.
    """

    def __init__(
        self,
        section: PositionsSection,
        seed: int,
        special_ids: Sequence[int],
        ledger: UsageLedger,
        out_dir: Path | None = None,
        sequence_length: int = 0,
    ) -> None:
        self.section, self.seed, self.sequence_length = section, seed, sequence_length
        self._special = SpecialTokens(special_ids)
        self._ledger, self._out_dir = ledger, out_dir
        self._counts = torch.zeros(2, section.bins + 1, dtype=torch.int64, device="cpu")
        """Positions seen and drawn, per bin; special tokens last."""

    def sample_positions(
        self,
        batch_tokens: Tensor,
        step: int = 0,
        record: bool = True,
        positions: Tensor | None = None,
        micro: int = 0,
    ) -> PositionSample:
        """Draw positions of batch_tokens [S, L] int64 (padding counts as special if its id is). Never waits
        for a device.

        Args:
            batch_tokens: [S, L] token ids.
            step: keys the draw, with micro; equal keys draw equally.
            positions: [S, L] int64, each token's position in its own sequence; bounds and shares then hold for each row
                as if it were a sequence. None: the column is the position. A position of `sequence_length` or more
                counts as the last one.
            micro: which of the step's micro-batches.
            record: count the draw as used. A stream that draws ahead passes False and calls `record` when the
                batch reaches training, so that a resumed run counts each draw once.
        """
        if not isinstance(batch_tokens, Tensor) or batch_tokens.dim() != 2 or batch_tokens.dtype.is_floating_point:
            got = (
                f"{batch_tokens.dtype} {list(batch_tokens.shape)}"
                if isinstance(batch_tokens, Tensor)
                else type(batch_tokens)
            )
            raise ValueError(f"PositionSampler.sample_positions: batch_tokens: expected integers [S, L], got {got}")
        if positions is not None and (positions.shape != batch_tokens.shape or self.sequence_length < 1):
            raise ValueError(
                f"PositionSampler.sample_positions: positions: expected the shape of batch_tokens, {list(batch_tokens.shape)}, "
                f"and a sequence_length of at least 1, got {list(positions.shape)} and {self.sequence_length}"
            )
        stratum = self._strata(batch_tokens, positions)
        chance = self._inclusion(stratum)
        keep = self._draw(stratum, chance, step, micro)
        possible = chance > 0
        scale = chance.sum() / possible.sum().clamp(min=1)
        weights = torch.where(keep, scale / torch.where(possible, chance, 1), 0).float()
        counts = torch.zeros(2, self.section.bins + 1, dtype=torch.int64, device=stratum.device)
        counts[0].index_add_(0, stratum.flatten(), torch.ones_like(stratum).flatten())
        counts[1].index_add_(0, stratum.flatten(), keep.flatten().long())
        # Only positions with an inclusion probability below 1 count as resampled.
        at_least = max(1, self.section.min_samples_per_bin)
        sizes = self._sizes(stratum)[:, :-1]
        sample = PositionSample(
            keep, weights, counts, (keep & (chance < 1)).sum(), (sizes - at_least).clamp(min=0).sum()
        )
        if record:
            self.record(sample)
        return sample

    def record(self, sample: PositionSample) -> None:
        """Count a draw of `sample_positions(..., record=False)` as used: in `positions.json` and the ledger.
        Never waits for a device."""
        # One assignment: the sampler may run in another thread while `save` reads.
        self._counts = self._counts.to(sample.counts.device) + sample.counts
        self._ledger.record_call(_NAME)
        self._ledger.record_effect(
            _NAME,
            positions_seen=sample.keep.numel(),
            positions_drawn=sample.counts[1].sum(),
            positions_resampled=sample.resampled,
            positions_beyond_minimum=sample.beyond_minimum,
        )

    def _strata(self, batch_tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """[S, L]: the position's bin; the number of bins for a special token."""
        length = batch_tokens.shape[1] if positions is None else self.sequence_length
        place = torch.arange(length, device=batch_tokens.device) if positions is None else positions
        bins = (place * self.section.bins // max(1, length)).clamp(0, self.section.bins - 1)
        return torch.where(self._special.marked(batch_tokens), self.section.bins, bins)

    def _sizes(self, stratum: Tensor) -> Tensor:
        """[S, bins + 1]: tokens of each stratum."""
        return torch.stack([(stratum == b).sum(1) for b in range(self.section.bins + 1)], 1)

    def _inclusion(self, stratum: Tensor) -> Tensor:
        section, sizes = self.section, self._sizes(stratum)
        ordinary = sizes[:, :-1]
        # Rounding the running total gives every bin a whole number of draws and the sequence its share.
        running = (ordinary.cumsum(1).double() * section.keep_fraction + 0.5).floor()
        draws = running.diff(dim=1, prepend=running.new_zeros(running.shape[0], 1))
        draws = torch.minimum(draws.clamp(min=section.min_samples_per_bin), ordinary.double())
        fraction = section.max_bos_fraction
        most = (draws.sum(1) * fraction / (1 - fraction) + 1e-9).floor() if fraction < 1 else sizes[:, -1].double()
        wanted = sizes[:, -1].double() * section.keep_fraction * section.bos_penalty
        draws = torch.cat([draws, torch.minimum(wanted, most)[:, None]], 1)
        return (draws / sizes.clamp(min=1)).gather(1, stratum)

    def _draw(self, stratum: Tensor, chance: Tensor, step: int, micro: int) -> Tensor:
        """Systematic draw: with the chances laid end to end, keep the positions in which u, u + 1, u + 2, ...
        fall."""
        count, length = stratum.shape
        first = micro << 32
        number = torch.arange(first, first + stratum.numel(), device=stratum.device).view(count, length)
        order = (stratum + uniform(number, self.seed, step, 0)).argsort(1)
        start = uniform(torch.arange(first, first + count, device=stratum.device), self.seed, step, 1)[:, None]
        end = chance.gather(1, order).cumsum(1)
        # Sums of a bin's chances are whole numbers up to rounding; snapping them keeps the bin's count exact.
        end = torch.where((end - end.round()).abs() < 1e-9, end.round(), end)
        hits = (end - start).floor()
        before = torch.cat([(-start).floor(), hits[:, :-1]], 1)
        return torch.zeros_like(stratum, dtype=torch.bool).scatter_(1, order, hits > before)

    def state_dict(self) -> dict[str, Any]:
        """The counts of `positions.json`. The draw itself has no state."""
        return {"counts": self._counts.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        counts = state["counts"]
        if counts.shape != self._counts.shape:
            raise ValueError(
                f"PositionSampler.load_state_dict: expected counts {list(self._counts.shape)} of {self.section.bins} bins, "
                f"got {list(counts.shape)}"
            )
        self._counts = counts.to(torch.int64, copy=True)

    def save(self, step: int) -> Path:
        """Write `positions.json`: positions seen and drawn per bin, over the whole run. Reads the device.

        Raises:
            OSError: the file could not be written; the previous file is unchanged.
        """
        if self._out_dir is None:
            raise ValueError("PositionSampler.save: expected an out_dir at construction, got None")
        path = self._out_dir / "positions.json"
        seen, drawn = self._counts.tolist()
        content = {
            "schema_version": 1,
            "step": step,
            "chooses": "training" if self.section.train else "samples",
            "bins": self.section.bins,
            "seen": seen[:-1],
            "drawn": drawn[:-1],
            "special_seen": seen[-1],
            "special_drawn": drawn[-1],
        }
        replace_atomically(path, json.dumps(content, indent=1) + "\n")
        self._ledger.record_file(_NAME, path)
        return path
