"""The settings of one dictionary, checked in one place for a run (`TranscoderSection`) and a model (`TranscoderConfig`).

Needs no torch: the command line reads it for `--help`.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from operator import attrgetter
from typing import Any, ClassVar, Literal, get_args

Activation = Literal["topk", "batch_topk", "jumprelu"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
Penalty = Literal["l0_target", "l0", "tanh"]
Convention = Literal["mse", "saelens", "dictionary_learning", "fvu"]
CONVENTIONS: tuple[Convention, ...] = get_args(Convention)


@dataclass(frozen=True)
class JumpReLUSettings:
    """Training of activation `jumprelu`; formulas and sources are in `transcoder.selection.JumpReLU`."""

    penalty: Penalty = "l0_target"
    """Sparsity term of the loss, with L0 the mean number of active latents a token: `l0_target` is (L0 / k - 1)^2, which
    leads L0 to k; `l0` is L0 / k; `tanh` counts tanh(tanh_scale * activation) for each latent and shrinks activations too."""
    coefficient: float = 1.0
    """Weight of the penalty, relative to a reconstruction loss of convention `mse`."""
    warmup_steps: int = 0
    """Steps in which the weight of the penalty rises linearly from 0."""
    bandwidth: float = 0.5
    """Width of the window around a threshold in which pre-activations move it; inputs have mean square 1. Time and memory of a
    step grow with the pre-activations in its lower half."""
    initial_threshold: float | None = None
    """null is the threshold that k of d_sae standard normal pre-activations exceed."""
    learning_rate_ratio: float | None = None
    """Learning rate of the thresholds as a multiple of the weights'; null is sqrt(d_in)."""
    tanh_scale: float = 4.0


@dataclass(frozen=True)
class DictionarySettings:
    """Shape and training rules of a dictionary, whatever it reads. Errors name the field."""

    d_sae: int
    k: int
    """Active latents a token: exactly k for topk, k on average over a batch for batch_topk, the target of the mean for
    jumprelu (and the unit of its other penalties)."""
    activation: Activation
    widths: Sequence[int] | None = None
    """Cumulative Matryoshka widths, strictly increasing, the last one d_sae; null trains the full width only."""
    skip: bool = False
    """Add a linear skip connection W_skip @ x."""
    prefix_weights: Sequence[float] | None = None
    """One weight a prefix; null weighs every prefix 1."""
    loss: Convention = "mse"
    """Convention of the reconstruction loss, see transcoder.losses."""
    aux_k: int | None = None
    """Dead latents that AuxK may revive a token; null is d_in // 2 (at least 1), 0 switches AuxK off."""
    aux_coefficient: float = 1 / 32
    dead_after_tokens: int = 10_000_000
    threshold_rate: float = 0.05
    """Rate of the fp32 running mean of the smallest selected value (BatchTopK's threshold at inference). That minimum is
    taken over batch_size * k values and hardly varies, so a short memory costs no noise and keeps up with training."""

    jumprelu: JumpReLUSettings = field(default_factory=JumpReLUSettings)

    where: ClassVar[str] = "DictionarySettings."
    """What stands before a field's name in errors."""
    error: ClassVar[type[ValueError]] = ValueError

    def __post_init__(self) -> None:
        for name in ("d_sae", "k", "dead_after_tokens"):
            self._check_type(name, int)
        for name in ("aux_coefficient", "threshold_rate"):
            self._check_type(name, float)
        self._check_type("skip", bool)
        self._require("d_sae", self.d_sae >= 1, "at least 1")
        self._require("k", 1 <= self.k <= self.d_sae, f"between 1 and d_sae = {self.d_sae}")
        self._require("activation", self.activation in ACTIVATIONS, f"one of {', '.join(map(repr, ACTIVATIONS))}")
        self._require("loss", self.loss in CONVENTIONS, f"one of {', '.join(CONVENTIONS)}")
        if self.widths is not None:
            widths = self._as_tuple("widths", int)
            increasing = len(widths) > 0 and widths[0] >= 1 and all(a < b for a, b in itertools.pairwise(widths))
            self._require("widths", increasing, "cumulative, strictly increasing, positive widths")
            self._require("widths", widths[-1] == self.d_sae, f"a last width of d_sae = {self.d_sae}")
        if self.prefix_weights is not None:
            weights = self._as_tuple("prefix_weights", float)
            prefixes = 1 if self.widths is None else len(self.widths)
            fits = len(weights) == prefixes and all(w >= 0 and math.isfinite(w) for w in weights) and sum(weights) > 0
            self._require("prefix_weights", fits, f"{prefixes} finite weights, none negative, not all 0")
        if self.aux_k is not None:
            self._check_type("aux_k", int)
            self._require("aux_k", self.aux_k >= 0, "null or at least 0")
        self._require("aux_coefficient", 0 <= self.aux_coefficient < math.inf, "finite, at least 0")
        self._require("dead_after_tokens", self.dead_after_tokens >= 1, "at least 1")
        self._require("threshold_rate", 0 < self.threshold_rate <= 1, "in (0, 1]")

        self._check_jumprelu()

    def _check_jumprelu(self) -> None:
        if not isinstance(self.jumprelu, JumpReLUSettings):
            raise TypeError(f"{self.where}jumprelu: expected JumpReLUSettings, got {self.jumprelu!r}")
        self._require(
            "jumprelu.penalty",
            self.jumprelu.penalty in get_args(Penalty),
            f"one of {', '.join(map(repr, get_args(Penalty)))}",
        )
        self._check_type("jumprelu.warmup_steps", int)
        self._require("jumprelu.warmup_steps", self.jumprelu.warmup_steps >= 0, "at least 0")
        for name, least, expected in (
            ("coefficient", 0, "finite, at least 0"),
            ("initial_threshold", 0, "null or finite, at least 0"),
            ("bandwidth", sys.float_info.min, "positive and finite"),
            ("learning_rate_ratio", sys.float_info.min, "null or positive and finite"),
            ("tanh_scale", sys.float_info.min, "positive and finite"),
        ):
            value = getattr(self.jumprelu, name)
            if value is not None or not expected.startswith("null"):
                self._check_type(f"jumprelu.{name}", float)
                self._require(f"jumprelu.{name}", least <= value < math.inf, expected)

    def _require(self, name: str, fits: bool, expected: str) -> None:
        if not fits:
            value = attrgetter(name)(self)
            shown = list(value) if isinstance(value, tuple) else value
            raise self.error(f"{self.where}{name}: expected {expected}, got {shown!r}")

    def _check_type(self, name: str, kind: type) -> None:
        self._check_value(name, attrgetter(name)(self), kind)

    def _check_value(self, name: str, value: object, kind: type) -> None:
        accepted = (int, float) if kind is float else kind
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            what = {int: "an int", float: "a number", bool: "True or False"}[kind]
            raise TypeError(f"{self.where}{name}: expected {what}, got {value!r}")

    def _as_tuple(self, name: str, kind: type) -> tuple[Any, ...]:
        """The list or tuple `name` as a tuple of `kind`, which the field holds from then on."""
        values = getattr(self, name)
        if not isinstance(values, (list, tuple)):
            raise TypeError(f"{self.where}{name}: expected a list or tuple, got {values!r}")
        for i, value in enumerate(values):
            self._check_value(f"{name}[{i}]", value, kind)
        object.__setattr__(self, name, tuple(kind(value) for value in values))
        return tuple(getattr(self, name))


@dataclass(frozen=True)
class _Sizes:
    """What a dictionary reads and writes. A base of its own, so that d_in and d_out come first."""

    d_in: int
    d_out: int


@dataclass(frozen=True)
class TranscoderConfig(DictionarySettings, _Sizes):
    """Shape and training rules of one transcoder: `TranscoderConfig(d_in, d_out, d_sae, k, ...)`. Errors name the field.

    `widths` and `prefix_weights` are filled in where they are None: [d_sae], and 1 for each width.
    """

    activation: Activation = "topk"
    latent_thresholds: bool = False
    """BatchTopK at inference compares each latent with a threshold of its own [d_sae]: JumpReLU, as imported ones have it."""

    where: ClassVar[str] = "TranscoderConfig."

    def __post_init__(self) -> None:
        for name in ("d_in", "d_out"):
            self._check_type(name, int)
            self._require(name, getattr(self, name) >= 1, "at least 1")
        super().__post_init__()
        self._check_type("latent_thresholds", bool)
        if self.latent_thresholds and self.activation != "batch_topk":
            raise ValueError(
                f"{self.where}latent_thresholds: expected activation 'batch_topk' with it, got {self.activation!r}"
            )
        if self.widths is None:
            object.__setattr__(self, "widths", (self.d_sae,))
        if self.prefix_weights is None:
            object.__setattr__(self, "prefix_weights", (1.0,) * len(self.widths or ()))

    @property
    def aux_latents(self) -> int:
        """Dead latents that AuxK may use a token."""
        return max(1, self.d_in // 2) if self.aux_k is None else self.aux_k

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it, without the settings of other activations, which earlier versions of the package do not know."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {key: value for key, value in values.items() if key != "jumprelu" or self.activation == key}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TranscoderConfig:
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"TranscoderConfig: unknown fields {unknown}; known: {sorted(known)}")
        missing = [name for name in ("d_in", "d_out", "d_sae", "k") if name not in values]
        if missing:
            raise ValueError(f"TranscoderConfig: expected {', '.join(missing)}, missing from {sorted(values)}")
        jumprelu = values.get("jumprelu", {})
        known = {f.name for f in fields(JumpReLUSettings)}
        if not isinstance(jumprelu, dict) or set(jumprelu) - known:
            raise ValueError(
                f"TranscoderConfig.jumprelu: expected an object with some of {sorted(known)}, got {jumprelu!r}"
            )
        return cls(**{**values, "jumprelu": JumpReLUSettings(**jumprelu)})
