"""CorrelationMonitor: streams the correlation of all pairs of latents during training and reports duplicates."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transcoder.antidup.correlation_report import (
    HISTOGRAM_BINS,
    SCHEMA_VERSION,
    connected_components,
    cosines,
    distinct_latents,
    effective_size,
    histogram,
    pair_entries,
    report_metrics,
)
from transcoder.antidup.flags import MAX_PAIRS, Evidence, FlagBook, Pair
from transcoder.antidup.ledger import UsageLedger
from transcoder.antidup.merge_cost import MergeResult
from transcoder.antidup.merge_cost_streaming import MergeEvidence
from transcoder.antidup.pair_errors import LEAST_SHARE, PairErrors, PairJackknife, correlation_bounds, most_pairs
from transcoder.antidup.window import (
    BLOCK_TOKENS,
    SequenceCounts,
    Window,
    correlation_state_bytes,
    nothing,
    state_names,
)
from transcoder.config import MonitorSection
from transcoder.files import local_path, replace_atomically
from transcoder.kernels import CorrelatedPairs, FeatureCorrelation, SparseCodes
from transcoder.kernels.correlation.op import EXACT_LIMIT
from transcoder.kernels.correlation.statistics import PairStatistics, Survey, sorted_pairs

_NAME = "correlation_monitor"
Judge = Callable[[Tensor, Tensor], MergeResult]
MOST_JUDGED = 4096
"""Most pairs of a merge test, flagged ones first, then the strongest: each costs a product with the held-out residual."""
JUDGED_AT_A_TIME = 1024
SKETCH_DIM = 128
"""Used beyond the widest exactly counted dictionary: standard deviation 0.03 at r = 0.8."""
_NUMBERS_BYTES = 4096
"""Bytes reserved for the numbers of a state that are no tensors, as text."""


class CorrelationMonitor:
    """Streams latent correlation over tumbling blocks and reports duplicates.

    The stream is cut into disjoint blocks of `block_tokens`; a block closes at the first report after it is full (mining reads
    the device, so it never happens inside a step). The live view that reports show is the last full block and the one in
    progress or, with `halflife_tokens`, a second statistic that decays (twice the cost of an update).

    Under a sketch, the block counts the pairs that a search (`report`, `refresh_targets`) proposes exactly from then on,
    including those whose support is still too small. The decaying statistic cannot: its sketched pairs are decided by the
    recent tokens alone. Flags always come from the blocks.

    Pairs that a search finds are followed from then on with sums by groups of sequences (`PairJackknife`): their bounds and
    flags use the pair's own error. Bounds of other pairs use a rule of thumb.

    A candidate has correlation > threshold, support >= min_support and, where sequences are known, at least
    min_sequences distinct ones (linear counting). A flag rests on the lower 95 % bound in disjoint blocks:
    see `FlagBook`.

    Args:
        section: thresholds and block length. Beyond 32768 latents the statistics are sketched.
        d_sae, device: of the codes.
        out_dir: folder of `correlation_step_%08d.json`.
        ledger: records calls, pairs seen and files.
    """

    def __init__(
        self,
        section: MonitorSection,
        d_sae: int,
        device: torch.device | str,
        out_dir: Path,
        ledger: UsageLedger,
    ) -> None:
        self.section, self.d_sae, self._block_tokens = section, d_sae, section.block_tokens or BLOCK_TOKENS
        self.device = torch.empty(0, device=device).device
        self._out_dir, self._ledger = local_path(out_dir), ledger
        self._sketch_dim = section.sketch_dim
        if self._sketch_dim is None and d_sae > EXACT_LIMIT:
            self._sketch_dim = SKETCH_DIM
        self._block = Window(self._statistics())
        self._past: Window | None = None
        """The last full block, which with the one in progress is the live view; None before the first block closes."""
        self._fading = self._statistics(section.halflife_tokens) if section.halflife_tokens is not None else None
        self._book = self._new_book()
        self._tokens = 0
        self._targets = nothing(self.device)
        self._judged = MergeResult.untested(*nothing(self.device))
        self._metrics: dict[str, float] = {}
        self.evidence = MergeEvidence(d_sae, self.device)
        """Sums over training tokens for pairs without a verdict of `judge`, which may use them to complete its verdicts."""

    def update_correlations(
        self, codes: SparseCodes, step: int, sequences: Tensor | None = None, weights: Tensor | None = None
    ) -> None:
        """Count the tokens of `codes`; steps that `update_every` does not divide are skipped. Never waits
        for a device.

        Args:
            codes: shape (B, d_sae); sinks are expected to be masked out already.
            step: the training step.
            sequences: [B] int64 ids of the sequences that the tokens come from.
            weights: [B] floating importance weights >= 0, as a position sampler gives them; None weighs every
                token 1. Sums are weighted; firings, supports and sequences are counted, tokens of weight 0
                not.
        """
        if step % self.section.update_every:
            return
        self._block.update(codes, sequences, weights)
        if self._fading is not None:
            self._fading.update(codes, weights)
        self._tokens += codes.shape[0]
        self._ledger.record_call(_NAME)
        self._ledger.record_effect(_NAME, pairs_seen=_pairs_in(codes))

    def refresh_targets(self, judge: Judge | None = None) -> int:
        """Search the live view for pairs to penalise. Writes no report, closes no block and does not change `metrics`. Reads
        the device; one pass over the pairs that fired together.

        Called before the first report, so that the pair penalty acts early. `judge` as in `report`.

        Returns: the number of pairs of `target_pairs`.
        """
        view, beside = self._view()
        survey = view.survey(self.section.correlation_threshold, self.section.min_support, beside=beside)
        pairs, _ = self._listed(survey.pairs, sorted(self._book.flagged))
        self._watch(survey, pairs)
        self._set_targets(pairs, self._verdicts(pairs, judge))
        return self._targets[0].numel()

    def report(
        self,
        step: int,
        W_dec: Tensor | None = None,
        judge: Judge | None = None,
        *,
        W_enc: Tensor | None = None,
        cosines_by_block: bool = False,
    ) -> dict[str, Any]:
        """Close a full block, mine the live view, write `correlation_step_%08d.json` and return its content
        (schema version 5, see `validate_correlation_report`). Reads the device.

        Args:
            step: the training step, in the file's name.
            W_dec, W_enc: [d_sae, d_out] and [d_sae, d_in]; if given, the report has the tails of their rows' cosines, and those
                of random rows for comparison.
            cosines_by_block: report cosines only when a block closes: a product of all pairs of rows is expensive.
            judge: (i, j), each [P] int64 -> the merge test on held-out tokens. At most `MOST_JUDGED` pairs are tested, flagged
                ones first. Pairs that it refuses (`merge_share_to_act`) or has no verdict for (`act_on_untested`) are no
                targets. None tests nothing, and every candidate is a target.

        Raises:
            OSError: the file could not be written. Targets, flags and metrics are updated nevertheless, and the next report is
                not affected.
        """
        section = self.section
        closes = self._block.statistics.tokens_offered >= self._block_tokens
        if closes:
            self._close_block()
        with_cosines = closes or not cosines_by_block
        edges = torch.linspace(-1, 1, HISTOGRAM_BINS + 1, dtype=torch.float64, device=self.device)
        view, beside = self._view()
        survey = view.survey(section.correlation_threshold, section.min_support, edges, beside=beside)
        flagged = sorted(self._book.flagged)
        pairs, sequences = self._listed(survey.pairs, flagged)
        errors = self._own_errors(pairs)
        self._watch(survey, pairs)
        live = int((view.counts(beside=beside) > 0).sum())
        paired = torch.cat([pairs.i, pairs.j]).unique().numel()
        components = connected_components(flagged)
        verdicts = self._verdicts(pairs, judge)
        # `pairs` has the flagged ones too.
        wider = connected_components(zip(pairs.i.tolist(), pairs.j.tolist(), strict=True))
        report: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "step": step,
            "tokens": self._tokens,
            "block_tokens": self._block_tokens,
            "d_sae": self.d_sae,
            "live_latents": live,
            "thresholds": {
                "correlation": section.correlation_threshold,
                "release": section.release_threshold,
                "min_support": section.min_support,
                "min_sequences": section.min_sequences,
            },
            "pairs": pair_entries(pairs, sequences, errors, verdicts, self._book, section.max_reported_pairs),
            "pairs_total": len(pairs),
            "pairs_flagged": len(flagged),
            "pairs_mergeable": None if verdicts is None else int(verdicts.mergeable().sum()),
            "pairs_refused": None if verdicts is None else int(self._refused(verdicts).sum()),
            "pairs_untested": len(pairs) if verdicts is None else int((~verdicts.known).sum()),
            "components": components,
            "candidate_components": wider,
            "distinct_latents": distinct_latents(live, components),
            "distinct_latents_candidates": distinct_latents(live, wider),
            "share_of_live_with_neighbour": min(1.0, paired / live) if live else 0.0,
            "effective_dictionary_size": effective_size(live, survey, view.effective_tokens(beside=beside)),
            "decoder_cosine": cosines(W_dec) if with_cosines else None,
            "encoder_cosine": cosines(W_enc) if with_cosines else None,
            "histogram": histogram(survey, edges),
        }
        self._set_targets(pairs, verdicts)
        self._judged = MergeResult.untested(*nothing(self.device)) if verdicts is None else verdicts
        self._metrics = report_metrics(report)
        self._write(step, report)
        return report

    def target_pairs(self, max_pairs: int) -> tuple[Tensor, Tensor]:
        """(i, j), each [P] int64 on the device, P <= max_pairs: flagged pairs, then the other candidates of the last
        search (`report` or `refresh_targets`) by falling correlation, without those that the merge test refused. Empty
        before the first."""
        i, j = self._targets
        return i[:max_pairs], j[:max_pairs]

    def foldable(self) -> MergeResult:
        """The flagged pairs of the last report that passed the merge test, the cheapest first. Not part of `state_dict`: call
        it right after the report."""
        found = self._judged
        flagged = [
            tuple(sorted(p)) in self._book.flagged
            for p in zip(found.kept.tolist(), found.dropped.tolist(), strict=True)
        ]
        chosen = found.mergeable() & torch.tensor(flagged, dtype=torch.bool, device=self.device)
        order = torch.where(chosen, found.cost_share, torch.inf).argsort(stable=True)[: int(chosen.sum())]
        return MergeResult(*(getattr(found, f.name)[order] for f in fields(MergeResult)))

    def forget(self, latents: Tensor) -> None:
        """Drop the statistics of these latents [n] int64, which were reset, and every pair that contains one of them."""
        for part in (self._block, self._past, self._fading):
            if part is not None:
                part.forget(latents)
        self.evidence.forget(latents)
        gone = set(latents.tolist())
        self._book.forget(gone)
        keep = ~(torch.isin(self._targets[0], latents) | torch.isin(self._targets[1], latents))
        self._targets = (self._targets[0][keep], self._targets[1][keep])

    def metrics(self) -> dict[str, float]:
        """Numbers of the last report for the log (`duplicates/...`); empty before the first. Reads
        nothing."""
        return dict(self._metrics)

    def state_bytes_at_most(self, *, batch_tokens: int = 16384, entries_per_token: int = 128) -> int:
        """Upper bound of the bytes of tensors and numbers in `state_dict`, for any length of the run.

        Exact statistics hold 16 bytes a pair and statistic at the most (12 until a count of 2^31 tokens could
        overflow). Early in a run, and for sparse dictionaries, the state is far smaller.

        Args:
            batch_tokens, entries_per_token: of the largest update; only the sketch (d_sae above 32768) keeps
                codes, about 262,144 recent tokens, and depends on them.
        """
        one = correlation_state_bytes(self._block.statistics, batch_tokens, entries_per_token)
        rest = self._block.sequences.state_bytes() + PairJackknife.state_bytes_at_most(self.d_sae)
        # The block and the past, each with its bitmap of sequences and its errors; the fading view has none.
        statistics = 2 * (one + rest) + (one if self._fading is not None else 0)
        held = min(MAX_PAIRS, self.d_sae * (self.d_sae - 1) // 2)
        # int64 (i, j): targets, flagged pairs, and the pairs of each block remembered; with three numbers, its evidence.
        remembered = (16 * held + 40 * most_pairs(self.d_sae)) * self.section.blocks_remembered
        return statistics + 16 * held * 2 + remembered + MergeEvidence.state_bytes_at_most() + _NUMBERS_BYTES

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            **self._block.state_dict("block"),
            "book": self._book.state_dict(),
            "tokens": self._tokens,
            "targets": {"i": self._targets[0].clone(), "j": self._targets[1].clone()},
            "evidence": self.evidence.state_dict(),
            "metrics": dict(self._metrics),
        }
        if self._past is not None:
            state.update(self._past.state_dict("past"))
        if self._fading is not None:
            state["fading"] = self._fading.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state of `state_dict`. Raises: ValueError naming the field; nothing has changed then."""
        needed = {*state_names("block"), "book", "tokens", "targets", "evidence", "metrics"}
        optional = state_names("past")
        missing, unknown = needed - set(state), set(state) - needed - optional - {"fading"}
        if optional & set(state):
            missing |= optional - set(state)
        if missing or unknown:
            raise ValueError(
                f"CorrelationMonitor.load_state_dict: missing {sorted(missing)}, unknown {sorted(unknown)}"
            )
        if ("fading" in state) != (self._fading is not None):
            raise ValueError(
                "CorrelationMonitor.load_state_dict: fading: expected it exactly where halflife_tokens is set, got "
                f"{'one' if 'fading' in state else 'none'}"
            )
        # Read into new parts first, so that a state that does not fit changes nothing.
        evidence = MergeEvidence(self.d_sae, self.device)
        evidence.load_state_dict(state["evidence"])
        block, past = Window(self._statistics()), Window(self._statistics()) if "past" in state else None
        block.load_state_dict("block", state)
        if past is not None:
            past.load_state_dict("past", state)
        fading = self._statistics(self.section.halflife_tokens) if "fading" in state else None
        if fading is not None:
            fading.load_state_dict(state["fading"])
        book = self._new_book()
        book.load_state_dict(state["book"])
        i, j = state["targets"]["i"].to(self.device), state["targets"]["j"].to(self.device)
        tokens, metrics = int(state["tokens"]), dict(state["metrics"])
        self._block, self._past, self._fading, self._book = block, past, fading, book
        self.evidence = evidence
        self._tokens, self._targets, self._metrics = tokens, (i, j), metrics

    def _view(self) -> tuple[FeatureCorrelation, list[FeatureCorrelation]]:
        """The statistics that reports use: the decaying ones, or the block in progress with the last full one."""
        return self._by_blocks() if self._fading is None else (self._fading, [])

    def _by_blocks(self) -> tuple[FeatureCorrelation, list[FeatureCorrelation]]:
        return self._block.statistics, [] if self._past is None else [self._past.statistics]

    def _statistics(self, halflife: int | None = None) -> FeatureCorrelation:
        return FeatureCorrelation(self.d_sae, self._sketch_dim, halflife, device=self.device)

    def _new_book(self) -> FlagBook:
        section = self.section
        return FlagBook(section.blocks_to_flag, section.blocks_remembered, section.correlation_threshold)

    def _watch(self, survey: Survey, listed: CorrelatedPairs) -> None:
        """Follow pairs from now on. By groups of sequences: the listed pairs and those that the book remembers, flagged ones
        first. Under a sketch, by exact counts of the block: the pairs that the sketch proposes and the flagged ones, since a
        pair that is too rare for the sketch's recent tokens is decided by the counts of its block. After a report that closes a
        block, the new block follows what the old one proposed, from its first token on."""
        flagged = self._table(self._book.flagged)
        remembered = self._table(self._book.remembered() - self._book.flagged)
        i, j = (torch.cat([flagged[n], remembered[n], side]) for n, side in enumerate((listed.i, listed.j)))
        self._block.errors.watch(*_first_of_each(i, j, self.d_sae))
        if survey.candidates is None:
            return
        if self._fading is not None:
            # A decaying sketch proposes pairs of its own time span and cannot watch pairs.
            view, beside = self._by_blocks()
            survey = view.survey(self.section.correlation_threshold, self.section.min_support, beside=beside)
        assert survey.candidates is not None
        i, j = (torch.cat([part, flagged[n]]) for n, part in enumerate(survey.candidates))
        self._block.statistics.watch(i, j)

    def _table(self, pairs: set[Pair]) -> Tensor:
        """[2, P] int64, ascending."""
        return torch.tensor(sorted(pairs), dtype=torch.int64, device=self.device).view(-1, 2).T

    def _own_errors(self, pairs: CorrelatedPairs) -> list[float | None]:
        """Standard errors of atanh(r) over the live view; None where a pair was not followed on enough of it, and under a
        half-life."""
        if self._fading is not None:
            return [None] * len(pairs)
        past = None if self._past is None else self._past.errors
        found = self._block.errors.errors(pairs.i, pairs.j, earlier=past)
        return [None if math.isnan(e) else e for e in _scaled(found, found.fisher, pairs.weight).tolist()]

    def _listed(self, found: CorrelatedPairs, flagged: list[Pair]) -> tuple[CorrelatedPairs, list[int | None]]:
        """Candidates (above the threshold, on enough sequences) and flagged pairs, sorted, and each one's
        sequences."""
        seen = SequenceCounts(self.d_sae, self.device)
        seen.merge(self._block.sequences)
        if self._past is not None:
            seen.merge(self._past.sequences)
        keep = found.correlation > self.section.correlation_threshold
        distinct = seen.distinct(found.i, found.j)
        if distinct is not None:
            keep &= distinct >= self.section.min_sequences
        parts = [PairStatistics(*(getattr(found, f.name)[keep] for f in fields(PairStatistics)))]
        known = set(zip(parts[0].i.tolist(), parts[0].j.tolist(), strict=True))
        extra = [pair for pair in flagged if pair not in known]
        if extra:
            i, j = (torch.tensor(side, device=self.device) for side in zip(*extra, strict=True))
            statistics, beside = self._view()
            parts.append(statistics.statistics(i, j, beside=beside))
        pairs = sorted_pairs(parts, self.d_sae, self.device)
        distinct = seen.distinct(pairs.i, pairs.j)
        return pairs, [None] * len(pairs) if distinct is None else distinct.tolist()

    def _verdicts(self, pairs: CorrelatedPairs, judge: Judge | None) -> MergeResult | None:
        """One verdict a pair, flagged pairs judged first; pairs beyond `MOST_JUDGED` are untested."""
        if judge is None:
            return None
        found = MergeResult.untested(pairs.i, pairs.j)
        order = self._flagged_first(pairs)[:MOST_JUDGED]
        for part in order.split(JUDGED_AT_A_TIME):
            one = judge(pairs.i[part], pairs.j[part])
            for name in MergeResult.__dataclass_fields__:
                getattr(found, name)[part] = getattr(one, name)
        return found

    def _flagged_first(self, pairs: CorrelatedPairs) -> Tensor:
        """[P] int64: the order of flagged pairs, then the others, each in the report's order."""
        flagged = self._book.flagged
        late = [(i, j) not in flagged for i, j in zip(pairs.i.tolist(), pairs.j.tolist(), strict=True)]
        return torch.tensor(late, dtype=torch.bool, device=self.device).sort(stable=True).indices

    def _refused(self, verdicts: MergeResult) -> Tensor:
        limit = self.section.merge_share_to_act
        return torch.zeros_like(verdicts.known) if limit is None else verdicts.known & ~verdicts.mergeable(limit)

    def _close_block(self) -> None:
        """Pass the block's evidence to the flag book, keep the block as the last full one and begin the next."""
        section, block = self.section, self._block
        pairs = block.statistics.pairs(section.correlation_threshold, section.min_support)
        distinct = block.sequences.distinct(pairs.i, pairs.j)
        enough = [True] * len(pairs) if distinct is None else (distinct >= section.min_sequences).tolist()
        columns = (pairs.i, pairs.j, pairs.correlation, pairs.support)
        above = [
            (i, j)
            for i, j, r, support, often in zip(*(c.tolist() for c in columns), enough, strict=True)
            if often and correlation_bounds(r, support)[0] > section.correlation_threshold
        ]
        self._book.close_block(above, self._released(block), self._evidence(block))
        fresh = Window(self._statistics()) if self._past is None else self._past
        # The block before the last is dropped, so that pairs that are no longer correlated leave the live view.
        self._past, self._block = self._block, fresh
        self._block.begin(self._past)

    def _evidence(self, block: Window) -> dict[Pair, Evidence]:
        """Evidence of every pair that was followed on enough of the block, at any correlation."""
        i, j = block.errors.i, block.errors.j
        stats, found = block.statistics.statistics(i, j), block.errors.errors(i, j)
        error = _scaled(found, found.plain, stats.weight)
        kept = ~error.isnan() & (stats.support > 3)
        columns = (i, j, stats.correlation, error, stats.support.double())
        rows = zip(*(column[kept].tolist() for column in columns), strict=True)
        return {(a, b): (r, e, support) for a, b, r, e, support in rows}

    def _released(self, block: Window) -> list[Pair]:
        flagged = sorted(self._book.flagged)
        if not flagged:
            return []
        i, j = self._table(self._book.flagged)
        stats, counts = block.statistics.statistics(i, j), block.statistics.counts()
        found = block.errors.errors(i, j)
        errors = _scaled(found, found.fisher, stats.weight).tolist()
        dead = ((counts[i] == 0) | (counts[j] == 0)).tolist()
        columns = (stats.correlation.tolist(), stats.support.tolist(), errors, dead)
        released = []
        for pair, r, support, error, gone in zip(flagged, *columns, strict=True):
            upper = correlation_bounds(r, support, None if math.isnan(error) else error)[1]
            if gone or upper < self.section.release_threshold:
                released.append(pair)
        return released

    def _set_targets(self, pairs: CorrelatedPairs, verdicts: MergeResult | None) -> None:
        """Flagged pairs first, then the others, each in the report's order. The search is recorded only if there were
        tokens."""
        order = self._flagged_first(pairs)
        if verdicts is not None:
            acted = ~self._refused(verdicts)
            if self.section.merge_share_to_act is not None and not self.section.act_on_untested:
                acted &= verdicts.known
            order = order[acted[order]]
        self.evidence.settle()
        order = order[:MAX_PAIRS]
        self._targets = (pairs.i[order], pairs.j[order])
        if self._tokens:
            self._ledger.record_survey()

    def _write(self, step: int, report: dict[str, Any]) -> None:
        path = self._out_dir / f"correlation_step_{step:08d}.json"
        replace_atomically(path, json.dumps(report, indent=1, allow_nan=False) + "\n")
        self._ledger.record_file(_NAME, path)


def _scaled(found: PairErrors, error: Tensor, weight: Tensor) -> Tensor:
    """[P]: errors rescaled from the tokens on which a pair was followed to those of `weight` [P]; NaN if it was followed on too
    few."""
    share = found.weight / weight.clamp(min=1e-300)
    return torch.where(share >= LEAST_SHARE, error * share.clamp(max=1).sqrt(), torch.nan)


def _first_of_each(i: Tensor, j: Tensor, d_sae: int) -> tuple[Tensor, Tensor]:
    """Each distinct pair at its first place."""
    key, inverse = torch.unique(i * d_sae + j, return_inverse=True)
    first = torch.full_like(key, key.numel() + i.numel())
    first.scatter_reduce_(0, inverse, torch.arange(i.numel(), device=i.device), "amin")
    order = first.sort().values
    return i[order], j[order]


def _pairs_in(codes: SparseCodes) -> Tensor:
    """0-dim: pairs of latents that fire on the same token, summed over tokens."""
    fires = codes.values.detach() > 0
    if codes.device.type == "cpu" and bool(fires.all()):
        active = codes.row_ptr.diff()
    else:
        fired = torch.zeros(codes.nnz + 1, dtype=torch.int64, device=codes.device)
        torch.cumsum(fires, 0, out=fired[1:])
        active = fired[codes.row_ptr].diff()
    return (active * (active - 1)).sum() // 2
