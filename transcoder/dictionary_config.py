"""The settings of one dictionary, checked in one place for a run (`TranscoderSection`) and a model (`TranscoderConfig`).

Needs no torch: the command line reads it for `--help`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from transcoder.settings import Count, Positive, PositiveNumber, PositiveShare, Section, Weight, build

Activation = Literal["topk", "batch_topk", "jumprelu"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
Convention = Literal["mse", "saelens", "dictionary_learning", "fvu"]
CONVENTIONS: tuple[Convention, ...] = get_args(Convention)


@dataclass(frozen=True)
class JumpReLUSettings(Section, where="transcoder.jumprelu."):
    """Training of activation `jumprelu`; formulas and sources are in `transcoder.selection.JumpReLU`."""

    penalty: Literal["l0_target", "l0", "tanh"] = "l0_target"
    """Sparsity term of the loss, with L0 the mean number of active latents a token: `l0_target` is (L0 / k - 1)^2, which
    leads L0 to k; `l0` is L0 / k; `tanh` counts tanh(tanh_scale * activation) for each latent and shrinks activations too."""
    coefficient: Weight = 1.0
    """Weight of the penalty, relative to a reconstruction loss of convention `mse`."""
    warmup_steps: Count = 0
    """Steps in which the weight of the penalty rises linearly from 0."""
    bandwidth: PositiveNumber = 0.5
    """Width of the window around a threshold in which pre-activations move it; inputs have mean square 1. Time and memory of a
    step grow with the pre-activations in its lower half."""
    initial_threshold: Weight | None = None
    """null is the threshold that k of d_sae standard normal pre-activations exceed."""
    learning_rate_ratio: PositiveNumber | None = None
    """Learning rate of the thresholds as a multiple of the weights'; null is sqrt(d_in)."""
    tanh_scale: PositiveNumber = 4.0
    """Scale of the activations in penalty `tanh`."""


@dataclass(frozen=True)
class ParallelSection(Section, where="parallel."):
    """A run in several processes, which torchrun starts, see docs/scale.md."""

    streams: Positive | None = None
    """Streams of text that the batches are made of, each with its share of documents, of the batch and of the shuffle buffer; a
    multiple of the number of processes. null is 1 for one process and 8 under torchrun. Fixed for a run, which then trains on
    the same batches in any number of processes."""


@dataclass(frozen=True)
class DictionarySettings(Section):
    """Shape and training rules of a dictionary, without its input and output sizes. Errors name the field."""

    d_sae: Positive
    k: int
    """Active latents a token: exactly k for topk, k on average over a batch for batch_topk, the target of the mean for
    jumprelu (and the unit of its other penalties)."""
    activation: Activation
    """How latents are selected: the k largest of each token, the largest k * tokens of a batch, or by a trained threshold for
    each latent."""
    widths: Sequence[int] | None = None
    """Cumulative Matryoshka widths, strictly increasing, the last one d_sae; null trains the full width only."""
    skip: bool = False
    """Add a linear skip connection W_skip @ x."""
    prefix_weights: Sequence[float] | None = None
    """One weight a prefix; null weighs every prefix 1."""
    loss: Convention = "mse"
    """Convention of the reconstruction loss, see transcoder.losses."""
    aux_k: Count | None = None
    """Dead latents that AuxK may revive a token; null is d_in // 2 (at least 1), 0 switches AuxK off."""
    aux_coefficient: Weight = 1 / 32
    """Weight of the AuxK loss."""
    dead_after_tokens: Positive | None = None
    """A latent is dead when it has not fired on this many tokens. null is 10 million, and in a run at most a quarter of its
    tokens."""
    threshold_rate: PositiveShare = 0.05
    """Rate of the fp32 running mean of the smallest selected value (BatchTopK's threshold at inference). That minimum is
    taken over batch_size * k values and hardly varies, so a short memory costs no noise and keeps up with training."""
    jumprelu: JumpReLUSettings = field(default_factory=JumpReLUSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("k", 1 <= self.k <= self.d_sae, f"between 1 and d_sae = {self.d_sae}")
        w = self.widths
        if w is not None:
            increasing = len(w) > 0 and w[0] >= 1 and all(a < b for a, b in itertools.pairwise(w))
            self._require("widths", increasing, "cumulative, strictly increasing, positive widths")
            self._require("widths", w[-1] == self.d_sae, f"a last width of d_sae = {self.d_sae}")
        weights, prefixes = self.prefix_weights, 1 if w is None else len(w)
        if weights is not None:
            fits = len(weights) == prefixes and min(weights) >= 0 and sum(weights) > 0
            self._require("prefix_weights", fits, f"{prefixes} finite weights, none negative, not all 0")


@dataclass(frozen=True)
class _Sizes:
    """Input and output sizes of a dictionary. A separate base class, so that d_in and d_out come first."""

    d_in: Positive
    d_out: Positive


@dataclass(frozen=True)
class TranscoderConfig(DictionarySettings, _Sizes, where="TranscoderConfig."):
    """Shape and training rules of one transcoder: `TranscoderConfig(d_in, d_out, d_sae, k, ...)`. Errors name the field.

    `widths` and `prefix_weights` are filled in where they are None: [d_sae], and 1 for each width.
    """

    activation: Activation = "topk"
    dead_after_tokens: Positive = 10_000_000
    """A latent is dead when it has not fired on this many tokens."""
    latent_thresholds: bool = False
    """BatchTopK at inference uses one threshold per latent [d_sae], as imported JumpReLU dictionaries do."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation != "batch_topk":
            self._require("latent_thresholds", not self.latent_thresholds, "false, unless activation is 'batch_topk'")
        if self.widths is None:
            object.__setattr__(self, "widths", (self.d_sae,))
        if self.prefix_weights is None:
            object.__setattr__(self, "prefix_weights", (1.0,) * len(self.widths or ()))

    @property
    def aux_latents(self) -> int:
        """Dead latents that AuxK may use a token."""
        return max(1, self.d_in // 2) if self.aux_k is None else self.aux_k

    def to_dict(self) -> dict[str, Any]:
        """JSON values, without the settings of other activations, which earlier versions of the package do not know."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {key: value for key, value in values.items() if key != "jumprelu" or self.activation == key}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TranscoderConfig:
        missing = [name for name in ("d_in", "d_out", "d_sae", "k") if name not in values]
        if missing:
            raise ValueError(f"TranscoderConfig: expected {', '.join(missing)}, missing from {sorted(values)}")
        found: TranscoderConfig = build(cls, values, "TranscoderConfig")
        return found
