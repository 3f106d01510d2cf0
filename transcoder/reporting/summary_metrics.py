"""The final metrics that reports and comparisons show, each with what it means and which way is better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from transcoder.reporting.format import number, percent

if TYPE_CHECKING:
    from transcoder.reporting.run import Run


@dataclass(frozen=True)
class SummaryMetric:
    name: str
    label: str
    meaning: str
    better: Literal["lower", "higher", "neither"] = "neither"
    how: Literal["last", "tail_mean", "rate"] = "last"
    """What of metrics.jsonl stands for the run's end where summary.json does not say, see `Run.metric`."""
    share: bool = False

    def of(self, run: Run) -> float | None:
        return run.metric(self.name, self.how)

    def text(self, value: float | None) -> str:
        return percent(value) if self.share else number(value)

    def signed(self, difference: float) -> str:
        return ("+" if difference > 0 else "-" if difference < 0 else "±") + self.text(abs(difference))

    def verdict(self, low: float | None, high: float | None) -> str | None:
        """Whether a difference between `low` and `high` is "better" or "worse"; None where that cannot be said."""
        if low is None or high is None or low <= 0 <= high or self.better == "neither":
            return None
        return "better" if (high < 0) == (self.better == "lower") else "worse"

    def described(self) -> dict[str, str]:
        """Its fields in a comparison's rows."""
        return {"name": self.name, "label": self.label, "meaning": self.meaning, "better": self.better}


HELDOUT_FVU = SummaryMetric(
    "evaluation/fvu", "Held-out FVU", "Fraction of variance unexplained on held-out tokens, sinks left out.", "lower"
)
MEAN_BASELINE = SummaryMetric(
    "evaluation/baseline_mean_fvu",
    "Mean of the target",
    "What predicting the training mean everywhere leaves unexplained.",
)
LINEAR_BASELINE = SummaryMetric(
    "evaluation/baseline_linear_fvu",
    "Linear map",
    "What the least-squares linear map from source to target leaves unexplained.",
)
FVU_WITH_SINKS = SummaryMetric(
    "evaluation/fvu_with_sinks", "FVU with sinks", "Over all held-out tokens, those that training masks included."
)
FVU_WITHOUT_SINKS = SummaryMetric(
    "evaluation/fvu_without_sinks",
    "FVU without sinks",
    "Without masked tokens and without any further ones whose norms stand apart.",
)
SINK_FVU = SummaryMetric(
    "evaluation/sink_fvu", "FVU on sink tokens", "The tokens that training masks: reported apart, not optimised."
)
CE_RECOVERED = SummaryMetric(
    "evaluation/ce_recovered",
    "Cross-entropy recovered",
    "With the transcoder in the layer's place: 100 % costs the language model nothing, 0 % is leaving the layer out.",
    "higher",
    share=True,
)
SET_CE_RECOVERED = SummaryMetric(
    "set/ce_recovered",
    "  all layers at once",
    "Of a layer set: with every layer's transcoder in its place, as in a replacement model.",
    "higher",
    share=True,
)
TRAINING_FVU = SummaryMetric(
    "metrics/fvu", "Training FVU", "Mean of the last ten logged batches.", "lower", "tail_mean"
)
L0 = SummaryMetric(
    "metrics/l0", "L0", "Latents active on a token, mean of the last ten logged batches.", "neither", "tail_mean"
)
DEAD = SummaryMetric(
    "sparsity/dead_share",
    "Dead latents",
    "Share that has not fired for transcoder.dead_after_tokens.",
    "lower",
    share=True,
)
_HELDOUT = "On held-out tokens, with the final weights."
DUPLICATES = SummaryMetric(
    "heldout_duplicates/mergeable",
    "Duplicate pairs",
    f"One latent could do the work of both. {_HELDOUT}",
    "lower",
)
TWINS = SummaryMetric(
    "heldout_duplicates/twins", "  twins", f"Duplicates that write the same direction. {_HELDOUT}", "lower"
)
SPLITS = SummaryMetric(
    "heldout_duplicates/splits",
    "  splits",
    f"Duplicates that fire together and write different directions. {_HELDOUT}",
    "lower",
)
CORRELATED = SummaryMetric(
    "heldout_duplicates/correlated", "Correlated pairs", f"Above the threshold, but no duplicates. {_HELDOUT}"
)
UNDECIDED = SummaryMetric(
    "heldout_duplicates/undecided", "Undecided pairs", f"Above the threshold; the merge test does not tell. {_HELDOUT}"
)
DUPLICATE_SHARE = SummaryMetric(
    "heldout_duplicates/duplicate_share",
    "Live latents in a duplicate pair",
    _HELDOUT,
    "lower",
    share=True,
)
JUDGED = SummaryMetric(
    "heldout_duplicates/share_supported",
    "Live latents that were judged",
    f"Those that fire often enough for a verdict. {_HELDOUT}",
    share=True,
)
DISTINCT = SummaryMetric(
    "heldout_duplicates/distinct_latents",
    "Distinct latents",
    f"Live latents, each group of duplicates counted once. {_HELDOUT}",
    "higher",
)
DICTIONARY_SIZE = SummaryMetric(
    "heldout_duplicates/effective_dictionary_size",
    "Effective dictionary size",
    f"Live latents squared over the sum of squared correlations. {_HELDOUT}",
    "higher",
)
CANDIDATES = SummaryMetric(
    "duplicates/pairs",
    "Candidate pairs, in training",
    "Above the threshold on the stream of training tokens, while the weights changed.",
    "neither",
)
FLAGGED = SummaryMetric(
    "duplicates/flagged",
    "Flagged pairs, in training",
    "Candidates whose lower bound held in enough disjoint blocks of the training tokens: those that the penalty acts on first.",
    "neither",
)
TOKENS_PER_SECOND = SummaryMetric(
    "metrics/tokens_per_second",
    "Tokens per second",
    "Tokens trained on over the time that they took. Machines and their load differ: no verdict.",
    "neither",
    "rate",
)

SUMMARY_METRICS = (
    HELDOUT_FVU,
    LINEAR_BASELINE,
    MEAN_BASELINE,
    SINK_FVU,
    CE_RECOVERED,
    SET_CE_RECOVERED,
    TRAINING_FVU,
    L0,
    DEAD,
    DUPLICATES,
    TWINS,
    SPLITS,
    CORRELATED,
    UNDECIDED,
    DUPLICATE_SHARE,
    JUDGED,
    DISTINCT,
    DICTIONARY_SIZE,
    CANDIDATES,
    FLAGGED,
    TOKENS_PER_SECOND,
)
LOSSES = {
    "overall": "losses/overall_loss",
    "full width": "losses/mse_loss",
    "AuxK": "losses/auxiliary_reconstruction_loss",
    "diversity": "losses/diversity_penalty",
}
"""The parts of a loss that are drawn together: label and metric."""
