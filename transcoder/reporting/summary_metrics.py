"""The final figures that reports and comparisons show, each with what it means and which way is better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from transcoder.reporting.format import number, percent
from transcoder.reporting.runfolder import RunFolder


@dataclass(frozen=True)
class Figure:
    name: str
    label: str
    meaning: str
    better: Literal["lower", "higher", "neither"] = "neither"
    how: Literal["last", "tail_mean", "median"] = "last"
    """What of metrics.jsonl stands for the run's end where summary.json does not say, see `RunFolder.figure`."""
    share: bool = False

    def of(self, run: RunFolder) -> float | None:
        return run.figure(self.name, self.how)

    def text(self, value: float | None) -> str:
        return percent(value) if self.share else number(value)


HELDOUT_FVU = Figure(
    "evaluation/fvu", "Held-out FVU", "Fraction of variance unexplained on held-out tokens, sinks left out.", "lower"
)
MEAN_BASELINE = Figure(
    "evaluation/baseline_mean_fvu",
    "Mean of the target",
    "What predicting the training mean everywhere leaves unexplained.",
)
LINEAR_BASELINE = Figure(
    "evaluation/baseline_linear_fvu",
    "Linear map",
    "What the least-squares linear map from source to target leaves unexplained.",
)
SINK_FVU = Figure(
    "evaluation/sink_fvu", "FVU on sink tokens", "The tokens that training masks: reported apart, not optimised."
)
CE_RECOVERED = Figure(
    "evaluation/ce_recovered",
    "Cross-entropy recovered",
    "With the transcoder in the layer's place: 100 % costs the language model nothing, 0 % is leaving the layer out.",
    "higher",
    share=True,
)
TRAINING_FVU = Figure("metrics/fvu", "Training FVU", "Mean of the last ten logged batches.", "lower", "tail_mean")
L0 = Figure(
    "metrics/l0", "L0", "Latents active on a token, mean of the last ten logged batches.", "neither", "tail_mean"
)
DEAD = Figure(
    "sparsity/dead_share",
    "Dead latents",
    "Share that has not fired for transcoder.dead_after_tokens.",
    "lower",
    share=True,
)
PAIRS = Figure(
    "duplicates/pairs", "Candidate pairs", "Pairs above the correlation threshold, with enough support.", "lower"
)
FLAGGED = Figure(
    "duplicates/flagged", "Flagged pairs", "Candidates whose lower bound held in enough disjoint blocks.", "lower"
)
MERGEABLE = Figure(
    "duplicates/mergeable",
    "Mergeable pairs",
    "Candidates that fold into one latent, on held-out tokens, at a tenth or less of what the dropped one is worth.",
    "lower",
)
PAIRED_SHARE = Figure(
    "duplicates/share_of_live",
    "Live latents with a neighbour",
    "Share of live latents that are in a candidate pair.",
    "lower",
    share=True,
)
DICTIONARY_SIZE = Figure(
    "duplicates/effective_dictionary_size",
    "Effective dictionary size",
    "Live latents squared over the sum of squared correlations.",
    "higher",
)
HELDOUT_PAIRS = Figure(
    "heldout_duplicates/pairs",
    "Candidate pairs, held-out",
    "Counted after training on the held-out codes, in every run alike (transcoder validate).",
    "lower",
)
HELDOUT_MERGEABLE = Figure(
    "heldout_duplicates/mergeable",
    "Mergeable pairs, held-out",
    "Those of them that fold into one latent at a tenth or less of what the dropped one is worth.",
    "lower",
)
HELDOUT_PAIRED_SHARE = Figure(
    "heldout_duplicates/share_of_live",
    "Live latents with a neighbour, held-out",
    "Share of the latents live on held-out tokens that are in such a pair.",
    "lower",
    share=True,
)
HELDOUT_DICTIONARY_SIZE = Figure(
    "heldout_duplicates/effective_dictionary_size",
    "Effective dictionary size, held-out",
    "Live latents squared over the sum of squared correlations, on held-out tokens.",
    "higher",
)
TOKENS_PER_SECOND = Figure("metrics/tokens_per_second", "Tokens per second", "Median over the run.", "higher", "median")

FIGURES = (
    HELDOUT_FVU,
    LINEAR_BASELINE,
    MEAN_BASELINE,
    SINK_FVU,
    CE_RECOVERED,
    TRAINING_FVU,
    L0,
    DEAD,
    PAIRS,
    FLAGGED,
    MERGEABLE,
    PAIRED_SHARE,
    DICTIONARY_SIZE,
    HELDOUT_PAIRS,
    HELDOUT_MERGEABLE,
    HELDOUT_PAIRED_SHARE,
    HELDOUT_DICTIONARY_SIZE,
    TOKENS_PER_SECOND,
)
