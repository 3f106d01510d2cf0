"""CorrelationMonitor: streams the correlation of all pairs of latents during training and reports duplicates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transcoder.antidup.candidates import (
    MOST_MINED,
    KnownPairs,
    Verdicts,
    above,
    first_of_each,
    flagged_first,
    listed_pairs,
    most_candidates,
)
from transcoder.antidup.correlation_report import (
    HISTOGRAM_BINS,
    SCHEMA_VERSION,
    connected_components,
    cosines,
    distinct_latents,
    effective_size,
    histogram,
    merged_groups,
    pair_entries,
    report_metrics,
    report_text,
)
from transcoder.antidup.flags import MAX_PAIRS, FlagBook, Pair
from transcoder.antidup.ledger import UsageLedger
from transcoder.antidup.merge_cost import MergeResult
from transcoder.antidup.merge_cost_streaming import MergeEvidence
from transcoder.antidup.pair_errors import PairJackknife, lower_bounds, most_pairs
from transcoder.antidup.row_cosines import cosine_work
from transcoder.antidup.window import (
    BLOCK_TOKENS,
    SequenceCounts,
    Window,
    correlation_state_bytes,
    nothing,
    pairs_in,
    state_names,
)
from transcoder.antidup.workload import CELL, FOUND, SEARCH, WorkBudget
from transcoder.config import MonitorSection
from transcoder.files import local_path, replace_atomically
from transcoder.kernels import CorrelatedPairs, FeatureCorrelation, SparseCodes
from transcoder.kernels.correlation.op import EXACT_LIMIT
from transcoder.kernels.correlation.statistics import Survey

EDGES = torch.linspace(-1, 1, HISTOGRAM_BINS + 1, dtype=torch.float64, device="cpu")

_NAME = "correlation_monitor"
Judge = Callable[[Tensor, Tensor], MergeResult]
MOST_JUDGED = 4096
"""Most pairs of a merge test, flagged ones first, then the strongest: the residual is multiplied by the decoder rows of both
latents."""
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
    min_sequences distinct ones (linear counting). A flag rests on the lower 95 % bound in disjoint blocks, see `FlagBook`, and
    counts while the live view, which older weights have left, is above the threshold too.

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
        self._flagged: set[Pair] = set()
        """Of the book's pairs, those that were above the threshold in the live view of the last report."""
        self._tokens = 0
        self._targets = nothing(self.device)
        self._known: KnownPairs | None = None
        self._judged = MergeResult.untested(*nothing(self.device))
        self._verdicts = Verdicts(d_sae, self.device)
        self._metrics: dict[str, float] = {}
        self.work = WorkBudget()
        """Which searches and tests are affordable; kept by the caller, who knows what a step costs."""
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
        pairs = self._block.update(codes, sequences, weights)
        if self._fading is not None:
            self._fading.update(codes, weights)
        self._tokens += codes.shape[0]
        self._ledger.record_call(_NAME)
        self._ledger.record_effect(_NAME, pairs_seen=pairs_in(codes) if pairs is None else pairs)

    def refresh_targets(self, judge: Judge | None = None, *, test: bool = True) -> int:
        """Search the live view for pairs to penalise. Writes no report, closes no block and does not change `metrics`. Reads
        the device; one pass over the pairs that fired together.

        Called before the first report, so that the pair penalty acts early. `judge` and `test` as in `report`.

        Returns: the number of pairs of `target_pairs`.
        """
        survey = self._search(*self._view())
        pairs, _ = self._listed(survey.pairs, self._book.flagged)
        self._known = KnownPairs.of(survey, pairs, self.d_sae)
        self._watch(survey, pairs)
        self._set_targets(pairs, self._tested(pairs, judge, test))
        return self._targets[0].numel()

    def report(
        self,
        step: int,
        W_dec: Tensor | None = None,
        judge: Judge | None = None,
        *,
        W_enc: Tensor | None = None,
        cosines_by_block: bool = False,
        search: bool = True,
        test: bool = True,
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
            search: False measures the candidates of the last search again instead of searching all pairs (which a report that
                closes a block, and the first one, does in any case); histogram and effective size are then of that search.
            test: False takes the latest verdicts of earlier tests instead of asking `judge`.

        Raises:
            OSError: the file could not be written. Targets, flags and metrics are updated nevertheless, and the next report is
                not affected.
        """
        section = self.section
        closes = self._block.statistics.tokens_offered >= self._block_tokens
        survey = self._close_block() if closes else None
        with_cosines = closes or not cosines_by_block
        if with_cosines:
            self.work.spend(SEARCH, sum(cosine_work(rows) for rows in (W_dec, W_enc) if rows is not None))
        view, past = self._view()
        known = self._known
        if survey is None and known is not None and not search:
            found = known.now(view, past, section)
        else:
            survey = survey or self._search(view, past)
            found = survey.pairs
        pairs, sequences = self._listed(found, self._book.flagged)
        flagged = self._flagged = above(pairs, self._book.flagged, section.correlation_threshold)
        live = int((view.counts(beside=past) > 0).sum())
        if survey is not None:
            size = effective_size(live, survey, view.effective_tokens(beside=past))
            known = self._known = KnownPairs.of(survey, pairs, self.d_sae, size)
        assert known is not None
        errors = self._own_errors(pairs)
        if survey is not None:
            self._watch(survey, pairs)
        paired = torch.cat([pairs.i, pairs.j]).unique().numel()
        components = connected_components(sorted(flagged))
        verdicts = self._tested(pairs, judge, test)
        wider = connected_components(zip(pairs.i.tolist(), pairs.j.tolist(), strict=True))
        total = len(pairs) + known.unlisted
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
            "pairs": pair_entries(pairs, sequences, errors, verdicts, self._book, flagged, section.max_reported_pairs),
            "pairs_total": total,
            "pairs_flagged": len(flagged),
            "pairs_mergeable": None if verdicts is None else int(verdicts.mergeable().sum()),
            "pairs_refused": None if verdicts is None else int(self._refused(verdicts).sum()),
            "pairs_untested": total if verdicts is None else total - int(verdicts.known.sum()),
            "components": components,
            "candidate_components": wider,
            "distinct_latents": distinct_latents(live, merged_groups(pairs, verdicts, components)),
            "distinct_latents_candidates": distinct_latents(live, wider),
            "share_of_live_with_neighbour": min(1.0, paired / live) if live else 0.0,
            "effective_dictionary_size": known.effective_size,
            "decoder_cosine": cosines(W_dec) if with_cosines else None,
            "encoder_cosine": cosines(W_enc) if with_cosines else None,
            "histogram": histogram(known.histogram, pairs.correlation, EDGES.to(self.device)),
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
        pairs = zip(found.kept.tolist(), found.dropped.tolist(), strict=True)
        flagged = [(min(pair), max(pair)) in self._flagged for pair in pairs]
        chosen = found.mergeable() & torch.tensor(flagged, dtype=torch.bool, device=self.device)
        return found.at(torch.where(chosen, found.cost_share, torch.inf).argsort(stable=True)[: int(chosen.sum())])

    def forget(self, latents: Tensor) -> None:
        """Drop the statistics of these latents [n] int64, which were reset, and every pair that contains one of them."""
        for part in (self._block, self._past, self._fading):
            if part is not None:
                part.forget(latents)
        self.evidence.forget(latents)
        self._verdicts.forget(latents)
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
        every = self.d_sae * (self.d_sae - 1) // 2
        held = min(MAX_PAIRS, every)
        # The listed pairs, and the six columns of their verdicts.
        listed = 16 * min(2 * most_candidates(self.d_sae), every) + 48 * min(MOST_JUDGED, every)
        # int64 (i, j): targets, flagged pairs, and the pairs of each block remembered; with three numbers, its evidence.
        remembered = (16 * held + 40 * most_pairs(self.d_sae)) * self.section.blocks_remembered
        return statistics + listed + 16 * held * 2 + remembered + MergeEvidence.state_bytes_at_most() + _NUMBERS_BYTES

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            **self._block.state_dict("block"),
            "book": self._book.state_dict(),
            "tokens": self._tokens,
            "targets": {"i": self._targets[0].clone(), "j": self._targets[1].clone()},
            "evidence": self.evidence.state_dict(),
            "metrics": dict(self._metrics),
            "verdicts": self._verdicts.state_dict(),
            "work": self.work.state_dict(),
        }
        if self._known is not None:
            state["known"] = self._known.state_dict()
        if self._past is not None:
            state.update(self._past.state_dict("past"))
        if self._fading is not None:
            state["fading"] = self._fading.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state of `state_dict`. Raises: ValueError naming the field; nothing has changed then."""
        needed = {*state_names("block"), "book", "tokens", "targets", "evidence", "metrics"}
        optional = state_names("past")
        # Checkpoints of before 2026-12-01 have no verdicts, no work and no known pairs.
        later = {"verdicts", "work", "known"}
        missing, unknown = needed - set(state), set(state) - needed - optional - later - {"fading"}
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
        verdicts, work = Verdicts(self.d_sae, self.device), WorkBudget()
        if "verdicts" in state:
            verdicts.load_state_dict(state["verdicts"])
        if "work" in state:
            work.load_state_dict(state["work"])
        known = KnownPairs.from_state(state["known"], self.device) if "known" in state else None
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
        self.evidence, self._verdicts, self.work, self._known = evidence, verdicts, work, known
        self._tokens, self._targets, self._metrics = tokens, (i, j), metrics

    def _view(self) -> tuple[FeatureCorrelation, list[FeatureCorrelation]]:
        """The statistics that reports use: the decaying ones, or the block in progress with the last full one."""
        return self._by_blocks() if self._fading is None else (self._fading, [])

    def _by_blocks(self) -> tuple[FeatureCorrelation, list[FeatureCorrelation]]:
        if self._past is None:
            return self._block.statistics, []
        if self._block.statistics.tokens_offered == 0:
            return self._past.statistics, []
        return self._block.statistics, [self._past.statistics]

    def _search(self, view: FeatureCorrelation, past: list[FeatureCorrelation]) -> Survey:
        threshold, support = self.section.correlation_threshold, self.section.min_support
        found = view.survey(threshold, support, EDGES.to(self.device), beside=past, most=MOST_MINED)
        cells = self.d_sae * (self.d_sae - 1) / 2 * (1 + len(past))
        self.work.spend(SEARCH, CELL * cells + FOUND * min(found.total, 2 * MOST_MINED))
        return found

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
        self._block.errors.watch(*first_of_each(i, j, self.d_sae))
        if survey.candidates is None:
            return
        if self._fading is not None:
            # A decaying sketch proposes pairs of its own time span and cannot watch pairs.
            view, past = self._by_blocks()
            survey = self._search(view, past)
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
        return self._block.own_errors(pairs.i, pairs.j, pairs.weight, self._past)

    def _listed(self, found: CorrelatedPairs, flagged: set[Pair]) -> tuple[CorrelatedPairs, list[int | None]]:
        """Candidates (above the threshold, on enough sequences) and flagged pairs, sorted, and each one's
        sequences."""
        seen = SequenceCounts(self.d_sae, self.device)
        seen.merge(self._block.sequences)
        if self._past is not None:
            seen.merge(self._past.sequences)
        return listed_pairs(found, flagged, seen, *self._view(), self.section)

    def _tested(self, pairs: CorrelatedPairs, judge: Judge | None, test: bool) -> MergeResult | None:
        """One verdict a pair, flagged pairs judged first; pairs beyond `MOST_JUDGED` are untested."""
        if judge is None:
            return None
        if not test:
            return self._verdicts.of(pairs.i, pairs.j)
        found = MergeResult.untested(pairs.i, pairs.j)
        order = flagged_first(pairs, self._book.flagged)[:MOST_JUDGED]
        if order.numel():
            one = judge(pairs.i[order], pairs.j[order])
            for name in MergeResult.__dataclass_fields__:
                getattr(found, name)[order] = getattr(one, name)
        self.evidence.settle()
        self._verdicts.remember(found)
        return found

    def _refused(self, verdicts: MergeResult) -> Tensor:
        limit = self.section.merge_share_to_act
        return torch.zeros_like(verdicts.known) if limit is None else verdicts.known & ~verdicts.mergeable(limit)

    def _close_block(self) -> Survey | None:
        """Pass the block's evidence to the flag book, keep the block as the last full one and begin the next. Returns what was
        found in it, where that is the live view now."""
        section, block = self.section, self._block
        survey = self._search(block.statistics, [])
        # Of very many pairs not all are listed: those that were above in earlier blocks are looked at first.
        earlier = self._book.remembered()
        pairs, often = listed_pairs(survey.pairs, earlier, block.sequences, block.statistics, [], section)
        enough = torch.tensor([n is None or n >= section.min_sequences for n in often], device=self.device).bool()
        enough &= pairs.support >= section.min_support
        enough &= lower_bounds(pairs.correlation, pairs.support) > section.correlation_threshold
        above = list(zip(pairs.i[enough].tolist(), pairs.j[enough].tolist(), strict=True))
        above.sort(key=lambda pair: pair not in earlier)
        limited = above[: 2 * most_candidates(self.d_sae)]
        released = block.released(sorted(self._book.flagged), section.release_threshold)
        self._book.close_block(limited, released, block.evidence())
        fresh = Window(self._statistics()) if self._past is None else self._past
        # The block before the last is dropped, so that pairs that are no longer correlated leave the live view.
        self._past, self._block = self._block, fresh
        self._block.begin(self._past)
        return survey if self._fading is None else None

    def _set_targets(self, pairs: CorrelatedPairs, verdicts: MergeResult | None) -> None:
        """Flagged pairs first, then the others, each in the report's order. The search is recorded only if there were
        tokens."""
        order = flagged_first(pairs, self._book.flagged)
        if verdicts is not None:
            acted = ~self._refused(verdicts)
            if self.section.merge_share_to_act is not None and not self.section.act_on_untested:
                acted &= verdicts.known
            order = order[acted[order]]
        order = order[:MAX_PAIRS]
        self._targets = (pairs.i[order], pairs.j[order])
        if self._tokens:
            self._ledger.record_survey()

    def _write(self, step: int, report: dict[str, Any]) -> None:
        path = self._out_dir / f"correlation_step_{step:08d}.json"
        replace_atomically(path, report_text(report))
        self._ledger.record_file(_NAME, path)
