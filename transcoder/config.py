"""Every constant of a run, as frozen dataclasses. YAML <-> dataclass <-> flags.

A run is described by one `RunConfig`; the sections mirror the rooms that read them. Unknown keys are refused with the
nearest known name; values are checked when the dataclass is made, so a config that exists is a config that can run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml

from transcoder.dictionary_config import Activation, DictionarySettings, TranscoderConfig

FLOAT_DTYPES = ("float32", "bfloat16", "float16")


class ConfigError(ValueError):
    """A configuration that cannot be run. The message names the field, what was expected and what came."""


def _require(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise ConfigError(f"{name}: expected {expected}, got {got!r}")


@dataclass(frozen=True)
class ModelSection:
    """The language model whose layer is transcoded."""

    name: str = "demo"
    """`demo` (the model that ships with the package), a hub name, or a local Hugging Face folder."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "auto"
    """`auto` takes CUDA where there is one; the transcoder trains on the same device."""

    def __post_init__(self) -> None:
        _require(bool(self.name), "model.name", "a hub name, a folder or 'demo'", self.name)


@dataclass(frozen=True)
class ActivationsSection:
    """Text -> tokens -> paired activations -> shuffled batches."""

    kind: Literal["model", "cached"] = "model"
    """`model` runs the language model beside training; `cached` reads activation shards from `cached_path`."""
    cached_path: str | None = None
    source_hook: str = "blocks.2.hook_resid_mid"
    target_hook: str = "blocks.2.hook_mlp_out"
    dataset: str = "stdlib"
    """`stdlib` (this Python's own standard library), a text/JSONL/Parquet file or folder, or a hub dataset's name."""
    dataset_config: str | None = None
    dataset_split: str = "train"
    text_column: str = "text"
    tokens_column: str | None = None
    """Set it to read already-tokenised documents (lists of token ids) from this column instead of text."""
    heldout_fraction: float = 0.02
    """Share of documents (chosen by a stable hash of their place in the stream) that only evaluation sees."""
    sequence_length: int = 128
    prepend_bos: bool = True
    sequences_per_forward: int = 32
    buffer_tokens: int = 32768
    """Tokens in the shuffle buffer, on the device."""
    refill_fraction: float = 0.5
    """The buffer is refilled when this share of it has been consumed; the rest stays and mixes with the new."""
    prefetch: int = 2
    """Forward passes of the language model that may run ahead of training; 0 runs them inline. More than that run ahead
    until the rows of the shuffle buffer's next refill are made, so that a refill finds them waiting: the device holds
    at most that many rows (refill_fraction * buffer_tokens, in whole batches) and one pass beside the buffer."""
    mask_bos: bool = True
    """Drop special tokens (BOS, EOS, PAD and the tokenizer's others) wherever they stand."""
    mask_norm_multiple: float | None = 10.0
    """Drop tokens whose source norm exceeds this multiple of the median over non-pad tokens; null switches it off."""
    mask_position_zero: bool = False
    allow_changed_data: bool = False
    """Let a run resume although its text or its cache changed since it was started (refused otherwise): it goes on at the
    saved place of what is there now."""

    def __post_init__(self) -> None:
        n = "activations."
        _require(self.kind in ("model", "cached"), n + "kind", "'model' or 'cached'", self.kind)
        if self.kind == "cached":
            _require(
                bool(self.cached_path),
                n + "cached_path",
                "a folder of shards when kind is 'cached'",
                self.cached_path,
            )
        _require(self.sequence_length >= 2, n + "sequence_length", "at least 2", self.sequence_length)
        _require(
            self.sequences_per_forward >= 1,
            n + "sequences_per_forward",
            "at least 1",
            self.sequences_per_forward,
        )
        _require(self.buffer_tokens >= 1, n + "buffer_tokens", "at least 1", self.buffer_tokens)
        _require(0 < self.refill_fraction <= 1, n + "refill_fraction", "in (0, 1]", self.refill_fraction)
        _require(0 <= self.heldout_fraction < 1, n + "heldout_fraction", "in [0, 1)", self.heldout_fraction)
        _require(self.prefetch >= 0, n + "prefetch", "at least 0", self.prefetch)
        if self.mask_norm_multiple is not None:
            _require(
                self.mask_norm_multiple > 1,
                n + "mask_norm_multiple",
                "above 1 or null",
                self.mask_norm_multiple,
            )


@dataclass(frozen=True)
class TranscoderSection(DictionarySettings):
    """The dictionary. d_in and d_out come from the hooks."""

    d_sae: int = 2048
    k: int = 16
    activation: Activation = "batch_topk"
    widths: tuple[int, ...] | None = None
    prefix_weights: tuple[float, ...] | None = None
    normalize: Literal["none", "rms", "standardize"] = "standardize"
    """Source and target each by its own statistics: scaled to mean square 1, `standardize` also subtracts the mean."""
    normalization_tokens: int = 16384

    where: ClassVar[str] = "transcoder."
    error: ClassVar[type[ValueError]] = ConfigError

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("normalization_tokens", self.normalization_tokens >= 2, "at least 2")

    def config(self, d_in: int, d_out: int) -> TranscoderConfig:
        """The config of a transcoder of these settings."""
        shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(DictionarySettings)}
        return TranscoderConfig(d_in, d_out, **shared)


@dataclass(frozen=True)
class TrainingSection:
    steps: int = 1000
    batch_size: int = 1024
    """Tokens an optimizer step sees in one micro-batch."""
    accumulation: int = 1
    """Micro-batches summed into one optimizer step."""
    lr: float | None = None
    """null is 2e-4 / sqrt(d_sae / 2^14)."""
    warmup_steps: int = 100
    schedule: Literal["cosine", "constant"] = "cosine"
    min_lr_ratio: float = 0.01
    """The floor of the schedule as a share of lr; the last step runs at it."""
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    gradient_clip: float | None = 1.0
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the matrix products; masters, moments and statistics are fp32 whatever this says."""
    seed: int = 0
    evaluation_every: int = 0
    """Steps between evaluations on held-out tokens; 0 evaluates at the end only."""
    evaluation_tokens: int = 16384
    evaluation_ce_tokens: int = 8192
    """Held-out tokens on which, at the end, the transcoder stands in for the layer and the language model's cross-entropy is
    taken; 0 leaves it out."""
    similarity_tokens: int = 4096
    """Held-out tokens on which, at the end, prefixes are compared by CKA (similarity.json), and whose codes the run keeps
    (heldout_codes.safetensors, 8 bytes an active latent) so that `transcoder compare` can compare runs; 0 does neither."""
    dead_refresh_steps: int = 25
    """The list of dead latents is read by the host this often: the only transfer of AuxK, outside the step."""
    max_bad_steps: int = 10
    """A step whose loss or gradients are NaN or Inf changes nothing and is recorded with its batch. More of them than this
    in the whole run stop it with a diagnosis, its state saved; a resumed run may be given more. 0 stops at the first."""

    def __post_init__(self) -> None:
        n = "training."
        _require(self.steps >= 1, n + "steps", "at least 1", self.steps)
        _require(self.batch_size >= 1, n + "batch_size", "at least 1", self.batch_size)
        _require(self.accumulation >= 1, n + "accumulation", "at least 1", self.accumulation)
        _require(self.lr is None or (self.lr > 0 and math.isfinite(self.lr)), n + "lr", "positive or null", self.lr)
        _require(self.warmup_steps >= 0, n + "warmup_steps", "at least 0", self.warmup_steps)
        _require(0 <= self.min_lr_ratio <= 1, n + "min_lr_ratio", "in [0, 1]", self.min_lr_ratio)
        ok = len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas)
        _require(ok, n + "betas", "two numbers in [0, 1)", self.betas)
        _require(self.eps > 0, n + "eps", "positive", self.eps)
        _require(
            self.gradient_clip is None or self.gradient_clip > 0,
            n + "gradient_clip",
            "positive or null",
            self.gradient_clip,
        )
        _require(self.evaluation_every >= 0, n + "evaluation_every", "at least 0", self.evaluation_every)
        _require(self.evaluation_tokens >= 1, n + "evaluation_tokens", "at least 1", self.evaluation_tokens)
        _require(self.evaluation_ce_tokens >= 0, n + "evaluation_ce_tokens", "at least 0", self.evaluation_ce_tokens)
        _require(self.similarity_tokens >= 0, n + "similarity_tokens", "at least 0", self.similarity_tokens)
        _require(self.dead_refresh_steps >= 1, n + "dead_refresh_steps", "at least 1", self.dead_refresh_steps)
        _require(self.max_bad_steps >= 0, n + "max_bad_steps", "at least 0", self.max_bad_steps)
        _require(0 <= self.seed < 2**63, n + "seed", "in [0, 2^63)", self.seed)


@dataclass(frozen=True)
class RegularizerSection:
    """Weights are relative to a reconstruction loss of mean square (convention `mse`, target of mean square 1)."""

    enabled: bool = True
    correlation_weight: float = 0.005
    """Pair-targeted penalty: mean relu(c_ij - margin)^2 over the monitor's flagged and candidate pairs."""
    correlation_margin: float = 0.3
    adaptive: bool = True
    """Bounded dual control: while more than `target_rate` of live latents are paired the weight grows, up to
    correlation_weight_max; below, it falls back to correlation_weight."""
    target_rate: float = 0.002
    adaptive_step: float | None = None
    """null takes the weight from one bound to the other in a tenth of the run, when the rate is off by the target or more. A
    number is the exponent a step and unit of rate, whatever the run's length; the lower bound is 0 then."""
    correlation_weight_max: float = 0.05
    max_pairs: int = 4096
    orthogonality_weight: float = 0.01
    """Chunked hinged max-cosine of the decoder: mean relu(max_j cos_ij - tau)^2."""
    orthogonality_threshold: float = 0.3
    orthogonality_chunk: int = 1024
    """Rows compared against the whole decoder at a time, drawn without replacement until every row was seen."""
    orthogonality_every: int = 10
    all_pairs_weight: float = 0.0
    """sum r_ij^2 over all pairs by the token Gram; its noise floor is 1 / (B - 1) a pair: off by default."""
    position_entropy_weight: float = 0.0
    """relu(floor - H_i): pushes latents off single positions. Off by default: real positional latents exist."""
    position_entropy_floor: float = 0.3
    """In units of log(bins)."""
    sink_mass_weight: float = 0.0
    """relu(b_i - allowed)^2, b_i the share of a latent's activation that falls on special tokens. Off by default: masking
    (activations.mask_bos) does what this cannot, and leaves it nothing to do."""
    sink_mass_allowed: float = 0.1

    def __post_init__(self) -> None:
        n = "antidup.regularizer."
        for name in (
            "correlation_weight",
            "orthogonality_weight",
            "all_pairs_weight",
            "position_entropy_weight",
            "sink_mass_weight",
        ):
            value = getattr(self, name)
            _require(value >= 0 and math.isfinite(value), n + name, "finite, at least 0", value)
        for name in ("correlation_margin", "orthogonality_threshold", "position_entropy_floor", "sink_mass_allowed"):
            _require(0 <= getattr(self, name) < 1, n + name, "in [0, 1)", getattr(self, name))
        _require(
            self.correlation_weight_max >= self.correlation_weight,
            n + "correlation_weight_max",
            f"at least correlation_weight = {self.correlation_weight}",
            self.correlation_weight_max,
        )
        for name in ("orthogonality_chunk", "orthogonality_every", "max_pairs"):
            _require(getattr(self, name) >= 1, n + name, "at least 1", getattr(self, name))
        _require(self.target_rate >= 0, n + "target_rate", "at least 0", self.target_rate)
        ok = self.adaptive_step is None or self.adaptive_step > 0
        _require(ok, n + "adaptive_step", "positive or null", self.adaptive_step)


@dataclass(frozen=True)
class PositionsSection:
    """Position-stratified choice of training tokens, with importance weights that keep the objective's expectation."""

    enabled: bool = True
    bins: int = 10
    min_samples_per_bin: int = 2
    keep_fraction: float = 0.5
    """Share of a sequence's positions that is drawn."""
    bos_penalty: float = 0.3
    """Factor on the drawing probability of special tokens, where they are not masked already."""
    max_bos_fraction: float = 0.2

    def __post_init__(self) -> None:
        n = "antidup.positions."
        _require(self.bins >= 1, n + "bins", "at least 1", self.bins)
        _require(self.min_samples_per_bin >= 0, n + "min_samples_per_bin", "at least 0", self.min_samples_per_bin)
        _require(0 < self.keep_fraction <= 1, n + "keep_fraction", "in (0, 1]", self.keep_fraction)
        _require(0 <= self.bos_penalty <= 1, n + "bos_penalty", "in [0, 1]", self.bos_penalty)
        _require(0 <= self.max_bos_fraction <= 1, n + "max_bos_fraction", "in [0, 1]", self.max_bos_fraction)


@dataclass(frozen=True)
class MonitorSection:
    enabled: bool = True
    correlation_threshold: float = 0.8
    release_threshold: float = 0.7
    min_support: int = 100
    """Tokens on which at least one of the pair fires."""
    min_sequences: int = 30
    """Distinct sequences among them; at most 1000 (they are estimated, up to 1420)."""
    block_tokens: int = 4_000_000
    """Tumbling block: flags rest on disjoint evidence."""
    blocks_to_flag: int = 3
    blocks_remembered: int = 4
    halflife_tokens: int | None = None
    """Exponential forgetting of the live view, in tokens; null shows the last full block and the one in progress."""
    sketch_dim: int | None = None
    """null is exact up to d_sae = 32768 and 128 beyond."""
    update_every: int = 1
    correlation_save_frequency: int = 100
    """Steps between reports into anti_duplication_logs/."""
    max_reported_pairs: int = 1000
    merge_test_tokens: int = 8192
    """Held-out tokens on which each report tests whether folding a pair into one latent is free; 0 tests nothing."""
    merge_share_to_act: float | None = 0.3
    """A pair is left alone when folding it costs more than this share of what leaving the latent out costs: it is correlated,
    but no duplicate. null acts on every candidate."""
    act_on_untested: bool = False
    """Whether a pair without a verdict is penalised. A latent that fires on too few of merge_test_tokens is tested on training
    tokens, before the step learns from them, from the report on that finds the pair: a verdict needs ten firings."""

    def __post_init__(self) -> None:
        n = "antidup.monitor."
        _require(
            0 < self.correlation_threshold < 1,
            n + "correlation_threshold",
            "in (0, 1)",
            self.correlation_threshold,
        )
        _require(
            0 < self.release_threshold <= self.correlation_threshold,
            n + "release_threshold",
            f"in (0, correlation_threshold = {self.correlation_threshold}]",
            self.release_threshold,
        )
        _require(self.merge_test_tokens >= 0, n + "merge_test_tokens", "at least 0", self.merge_test_tokens)
        _require(
            self.merge_share_to_act is None or self.merge_share_to_act >= 0,
            n + "merge_share_to_act",
            "at least 0 or null",
            self.merge_share_to_act,
        )
        for name in ("min_support", "min_sequences", "blocks_to_flag", "update_every", "max_reported_pairs"):
            _require(getattr(self, name) >= 1, n + name, "at least 1", getattr(self, name))
        _require(self.min_sequences <= 1000, n + "min_sequences", "at most 1000", self.min_sequences)
        _require(self.block_tokens >= 1, n + "block_tokens", "at least 1", self.block_tokens)
        _require(
            self.blocks_remembered >= self.blocks_to_flag,
            n + "blocks_remembered",
            f"at least blocks_to_flag = {self.blocks_to_flag}",
            self.blocks_remembered,
        )
        _require(
            self.halflife_tokens is None or self.halflife_tokens >= 1,
            n + "halflife_tokens",
            "positive or null",
            self.halflife_tokens,
        )
        _require(
            self.sketch_dim is None or self.sketch_dim >= 8,
            n + "sketch_dim",
            "at least 8 or null",
            self.sketch_dim,
        )
        _require(
            self.correlation_save_frequency >= 1,
            n + "correlation_save_frequency",
            "at least 1",
            self.correlation_save_frequency,
        )


@dataclass(frozen=True)
class SamplesSection:
    enabled: bool = True
    collect_every: int = 25
    top_per_latent: int = 10
    stratified_per_latent: int = 10
    context_tokens: int = 20
    """Tokens kept before and including the one that fires, and a few after it."""
    min_activation: float = 0.05
    position_bins: int = 10
    min_per_bin: int = 2
    max_sink_fraction: float = 0.2
    max_latents: int = 4096
    """Latents followed (evenly spread over the dictionary): bounds memory."""
    save_frequency: int = 500

    def __post_init__(self) -> None:
        n = "antidup.samples."
        for name in (
            "collect_every",
            "top_per_latent",
            "context_tokens",
            "position_bins",
            "max_latents",
            "save_frequency",
        ):
            _require(getattr(self, name) >= 1, n + name, "at least 1", getattr(self, name))
        _require(
            self.stratified_per_latent >= 0,
            n + "stratified_per_latent",
            "at least 0",
            self.stratified_per_latent,
        )
        _require(self.min_activation >= 0, n + "min_activation", "at least 0", self.min_activation)
        _require(self.min_per_bin >= 0, n + "min_per_bin", "at least 0", self.min_per_bin)
        _require(0 <= self.max_sink_fraction <= 1, n + "max_sink_fraction", "in [0, 1]", self.max_sink_fraction)


@dataclass(frozen=True)
class RecycleSection:
    """Fold flagged pairs that the merge test passes into one latent, and begin the freed one anew as a dead latent, which
    AuxK then trains. Changes what is trained, so it is off unless asked for."""

    enabled: bool = False
    every: int = 500
    """Steps between rounds; a round follows the correlation report of its step."""
    max_per_round: int = 64
    until: float = 0.8
    """No round after this share of the steps: a latent begun anew needs the rest to become one."""

    def __post_init__(self) -> None:
        n = "antidup.recycle."
        _require(self.every >= 1, n + "every", "at least 1", self.every)
        _require(self.max_per_round >= 1, n + "max_per_round", "at least 1", self.max_per_round)
        _require(0 < self.until < 1, n + "until", "in (0, 1)", self.until)


@dataclass(frozen=True)
class AntidupSection:
    regularizer: RegularizerSection = field(default_factory=RegularizerSection)
    positions: PositionsSection = field(default_factory=PositionsSection)
    monitor: MonitorSection = field(default_factory=MonitorSection)
    samples: SamplesSection = field(default_factory=SamplesSection)
    recycle: RecycleSection = field(default_factory=RecycleSection)
    verify_at_step: int = 100
    """By this step (or the last one, if sooner) each enabled part must have calls, an effect and files, or the run stops."""

    def __post_init__(self) -> None:
        _require(self.verify_at_step >= 1, "antidup.verify_at_step", "at least 1", self.verify_at_step)


@dataclass(frozen=True)
class CheckpointSection:
    every: int = 500
    keep_last: int = 2
    keep_best: bool = True
    """Keep the checkpoint of the lowest held-out FVU (needs training.evaluation_every)."""
    keep_every: int | None = None
    """Keep every checkpoint whose step is a multiple of this."""
    second_location: str | None = None
    """A second folder that the last state is written to when the run's own cannot take it."""
    asynchronous: bool = True
    """Write beside training: a step waits for a copy of the state in memory, not for the disk. Takes one more state in host
    memory."""
    reserve: bool = True
    """Hold disk space for the last state: weights, moments and the place in the data still fit when the disk is full."""

    def __post_init__(self) -> None:
        n = "checkpoint."
        _require(self.every >= 1, n + "every", "at least 1", self.every)
        _require(self.keep_last >= 1, n + "keep_last", "at least 1", self.keep_last)
        _require(
            self.keep_every is None or self.keep_every >= 1,
            n + "keep_every",
            "positive or null",
            self.keep_every,
        )


@dataclass(frozen=True)
class LoggingSection:
    every: int = 10
    """Steps between reads of the metrics from the device."""
    progress: bool = True
    wandb: Literal["off", "offline", "online"] = "off"
    wandb_project: str = "transcoder"
    wandb_upload_checkpoints: bool = False
    tensorboard: bool = False
    max_megabytes: int = 1024
    """metrics.jsonl beyond this is thinned: every second line of figures of its older half goes, events stay."""
    report: bool = True
    """Write report.html, in a process of its own, when the run ends; `transcoder report RUN` can do it any time."""
    report_latents: int = 4096
    """Latents shown with their contexts in report.html, which stays below 10 MB whatever this says."""

    def __post_init__(self) -> None:
        _require(self.every >= 1, "logging.every", "at least 1", self.every)
        _require(
            self.wandb in ("off", "offline", "online"),
            "logging.wandb",
            "'off', 'offline' or 'online'",
            self.wandb,
        )
        _require(self.max_megabytes >= 1, "logging.max_megabytes", "at least 1", self.max_megabytes)
        _require(self.report_latents >= 0, "logging.report_latents", "at least 0", self.report_latents)


@dataclass(frozen=True)
class RunConfig:
    """One run. `RunConfig.load("demo")`, `RunConfig.load("my.yaml")`, `RunConfig.from_dict({...})`."""

    name: str = "run"
    model: ModelSection = field(default_factory=ModelSection)
    activations: ActivationsSection = field(default_factory=ActivationsSection)
    transcoder: TranscoderSection = field(default_factory=TranscoderSection)
    training: TrainingSection = field(default_factory=TrainingSection)
    antidup: AntidupSection = field(default_factory=AntidupSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    logging: LoggingSection = field(default_factory=LoggingSection)

    def __post_init__(self) -> None:
        safe = bool(self.name) and self.name not in (".", "..") and all(c.isalnum() or c in "._-" for c in self.name)
        _require(safe, "name", "letters, digits, '.', '_' and '-' (it becomes a folder)", self.name)
        if self.activations.kind == "model":
            wanted, room = self.training.batch_size, self.activations.buffer_tokens
            _require(room >= wanted, "activations.buffer_tokens", f"at least training.batch_size = {wanted}", room)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """Build from nested mappings. Unknown keys and wrong types raise `ConfigError` with the nearest known name."""
        return _build(cls, values, "")

    @classmethod
    def load(cls, source: str | Path, overrides: Mapping[str, Any] | None = None) -> RunConfig:
        """Read a YAML file or a preset by name, then apply dotted overrides such as {"training.steps": 100}."""
        values = load_yaml(source)
        for dotted, value in (overrides or {}).items():
            _set_dotted(values, dotted, value)
        return cls.from_dict(values)

    def replace(self, overrides: Mapping[str, Any]) -> RunConfig:
        """A copy with dotted overrides such as {"training.steps": 100} applied."""
        values = self.to_dict()
        for dotted, value in overrides.items():
            _set_dotted(values, dotted, value)
        return RunConfig.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings: what YAML and JSON hold."""
        return typing.cast(dict[str, Any], _plain(dataclasses.asdict(self)))

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def preset_names() -> list[str]:
    return sorted(path.stem for path in (Path(__file__).parent / "presets").glob("*.yaml"))


def load_yaml(source: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, or in the preset of that name (a file of the same name wins if it has a suffix)."""
    path = Path(source)
    preset = Path(__file__).parent / "presets" / f"{source}.yaml"
    if isinstance(source, str) and source in preset_names():
        path = preset
    elif not path.is_file():
        raise ConfigError(
            f"config {str(source)!r}: no such file, and no preset of that name; presets: {preset_names()}"
        )
    try:
        values = _read_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"config {path}: not valid YAML: {error}") from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"config {path}: expected a mapping of sections, got {type(values).__name__}")
    return values


def flags(section: type = RunConfig, prefix: str = "") -> list[tuple[str, Any]]:
    """Every leaf field as (dotted name, type), in order: what the command line offers."""
    found: list[tuple[str, Any]] = []
    hints = typing.get_type_hints(section)
    for f in dataclasses.fields(section):
        kind = hints[f.name]
        if dataclasses.is_dataclass(kind):
            found.extend(flags(typing.cast(type, kind), f"{prefix}{f.name}."))
        else:
            found.append((prefix + f.name, kind))
    return found


def parse_flag(dotted: str, text: str) -> Any:
    """The value that `--dotted text` stands for: text where the field is text ('null' where it may be null, quotes taken
    off), else by YAML's rules ('null', 'true', '1e-3', '[1, 2]')."""
    known = dict(flags())
    if dotted not in known:
        raise ConfigError(f"unknown setting --{dotted}{_nearest(dotted, known)}")
    kind = known[dotted]
    if str in (kind, *typing.get_args(kind)) and not (kind is not str and text == "null"):
        quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
        return text[1:-1] if quoted else text
    try:
        value = _read_yaml(text) if text.strip() else text
    except ValueError as error:
        raise ConfigError(f"{dotted}: cannot read {_short(text)}: {error}") from error
    return _coerce(kind, value, dotted)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without dates: no setting is one, and a name such as 2026-01-31 is text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if not tag.endswith(":timestamp")]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _read_yaml(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError) as error:
        # Its constructors raise all of these, at `!!bool x` or `!!timestamp x` for two.
        raise ValueError(str(error) or type(error).__name__) from error


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 200 else f"{shown[:200]}..."


def _nearest(name: str, known: typing.Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if not close:
        # A user who remembers the field but not its section is helped by matching the last part alone.
        last = name.rsplit(".", 1)[-1]
        by_last = {k.rsplit(".", 1)[-1]: k for k in known}
        close = [by_last[m] for m in difflib.get_close_matches(last, list(by_last), n=1, cutoff=0.6)]
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def _set_dotted(values: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, last = dotted.split(".")
    place = values
    for section in sections:
        inner = place.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{dotted}: {section!r} is not a section")
        place = inner
    place[last] = value


def _build(cls: type, values: Any, prefix: str) -> Any:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{prefix.rstrip('.') or 'config'}: expected a mapping, got {values!r}")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    kwargs: dict[str, Any] = {}
    for key, value in values.items():
        if key not in names:
            every = [n for n, _ in flags(cls, prefix)] if prefix == "" else [prefix + n for n in names]
            raise ConfigError(f"unknown key {prefix + str(key)!r}{_nearest(prefix + str(key), [*every, *names])}")
        kind = hints[key]
        if dataclasses.is_dataclass(kind):
            kwargs[key] = _build(typing.cast(type, kind), value if value is not None else {}, f"{prefix}{key}.")
        else:
            kwargs[key] = _coerce(kind, value, prefix + key)
    return cls(**kwargs)


def _coerce(kind: Any, value: Any, name: str) -> Any:
    """`value` as `kind`, or a ConfigError. Accepts what YAML makes of numbers ('3e-4' is a string to YAML 1.1)."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (inner,) = (a for a in args if a is not type(None))
        return _coerce(inner, value, name)
    if origin is Literal:
        # YAML 1.1 reads a bare `off` as false.
        if value is False and "off" in args:
            value = "off"
        if value not in args:
            raise ConfigError(f"{name}: expected one of {', '.join(map(repr, args))}, got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise ConfigError(f"{name}: expected a list, got {value!r}")
        inner = args[0]
        if len(args) == 2 and args[1] is not Ellipsis and len(value) != 2:
            raise ConfigError(f"{name}: expected 2 values, got {list(value)!r}")
        return tuple(_coerce(inner, v, f"{name}[{i}]") for i, v in enumerate(value))
    if kind is bool:
        if not isinstance(value, bool):
            raise ConfigError(f"{name}: expected true or false, got {value!r}")
        return value
    if kind is int:
        if isinstance(value, str):
            # '1e4' is text to YAML 1.1.
            value = _number(value)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigError(f"{name}: expected a whole number, got {value!r}")
        return value
    if kind is float:
        value = _number(value)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ConfigError(f"{name}: expected a number, got {value!r}")
        if not abs(value) <= sys.float_info.max:
            raise ConfigError(f"{name}: expected a finite number, got {_short(value)}")
        return float(value)
    if kind is str:
        if not isinstance(value, str):
            raise ConfigError(f"{name}: expected text, got {value!r}; put it in quotes")
        return value
    raise TypeError(f"config field {name} has a type that no reader handles: {kind}")


def _number(value: Any) -> Any:
    """A float where `value` is text that stands for one, else `value`."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return value
