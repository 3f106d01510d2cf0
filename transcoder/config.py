"""Every constant of a run, as frozen dataclasses. YAML <-> dataclass <-> flags.

The type of a field includes its bounds, which `transcoder.settings` checks, so every config object is valid; `--help` prints
the docstring under it.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from transcoder import settings
from transcoder.dictionary_config import Activation, DictionarySettings, ParallelSection, TranscoderConfig
from transcoder.layer_list import LayerHooks, PerLayerSection, layer_hooks, layer_values, parse_layers
from transcoder.settings import (
    ConfigError,
    Count,
    Fraction,
    InnerFraction,
    Positive,
    PositiveNumber,
    PositiveShare,
    Section,
    Share,
    Weight,
)
from transcoder.yaml_text import load_yaml, preset_names, read_yaml

BUFFER_TOKENS = 32768
"""Of a run of one layer where `activations.buffer_tokens` is null."""

__all__ = ["ConfigError", "RunConfig", "flags", "load_yaml", "parse_flag", "preset_names"]


@dataclass(frozen=True)
class ModelSection(Section, where="model."):
    """The language model whose layer is transcoded."""

    name: str = "demo"
    """`demo` (the model that ships with the package), a hub name, or a local Hugging Face folder."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the language model's weights and activations."""
    device: str = "auto"
    """`auto` takes CUDA if there is a GPU, else the CPU. The transcoder trains on the same device."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("name", bool(self.name), "a hub name, a folder or 'demo'")


@dataclass(frozen=True)
class ActivationsSection(Section, where="activations."):
    """Text -> tokens -> paired activations -> shuffled batches."""

    kind: Literal["model", "cached"] = "model"
    """`model` runs the language model during training; `cached` reads activation shards from `cached_path`."""
    cached_path: str | None = None
    """Folder of the activation shards, for kind `cached`."""
    source_hook: str = "blocks.2.hook_resid_mid"
    """Hook of TransformerLens whose activations the transcoder reads."""
    target_hook: str = "blocks.2.hook_mlp_out"
    """Hook whose activations the transcoder predicts."""
    layers: Any = None
    """Train a transcoder for each of these layers on the same passes, in run folders under layers/: `0-25`, `[2, 3]`, `all`, or
    [source hook, target hook] pairs. `{layer}`, or else the layer number in the hooks' names, is the place of the number."""
    cross_layer: bool = False
    """Train one cross-layer transcoder on `layers`: each latent reads one layer and writes into it and all later ones."""
    dataset: str = "stdlib"
    """`stdlib` (this Python's own standard library), a file or folder of text or rows, or a hub dataset's name."""
    dataset_config: str | None = None
    dataset_split: str = "train"
    text_column: str = "text"
    tokens_column: str | None = None
    """Read already-tokenised documents (lists of token ids) from this column instead of text."""
    heldout_fraction: Fraction = 0.02
    """Share of the documents that only evaluation sees, chosen by a stable hash of their place in the dataset."""
    sequence_length: Annotated[int, "[2, inf)"] = 128
    """Tokens a sequence."""
    keep_rows: bool = False
    """Keep each record as a sequence of its own, cut or padded to sequence_length (padding is left out), packing none."""
    prepend_bos: bool = True
    eos_as_bos: bool = False
    """Let EOS stand in for a BOS that the tokenizer does not have, as TransformerLens does."""
    sequences_per_forward: Positive = 32
    """Sequences in one forward pass of the language model."""
    buffer_tokens: Positive | None = None
    """Tokens in the shuffle buffer, on the device. null is 32768; of a layer set as many of these as a quarter of the free
    memory holds."""
    refill_fraction: PositiveShare = 0.5
    """The buffer is refilled when this share of it has been consumed; the rest stays and mixes with the new tokens."""
    prefetch: Count = 2
    """Forward passes of the language model that may run ahead of training; 0 runs them inside the training step. Beyond this
    number they run ahead until the buffer's next refill (refill_fraction * buffer_tokens rows) is ready on the device."""
    mask_bos: bool = True
    """Drop special tokens (BOS, EOS, PAD and the tokenizer's others) at every position."""
    mask_norm_multiple: Annotated[float, "(1, inf)"] | Literal["auto"] | None = "auto"
    """Drop tokens whose source norm exceeds this multiple of the median over non-pad tokens; null keeps them. `auto` finds
    where a group stands apart, on the first tokens (10 where none does); the run's config.yaml has the number."""
    mask_position_zero: bool = False
    """Drop the first token of each sequence."""
    allow_changed_data: bool = False
    """Let a run resume at its place in text or a cache that changed since it was started; refused otherwise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "layers", parse_layers(self.layers))
        if self.layers is None and self.buffer_tokens is None:
            object.__setattr__(self, "buffer_tokens", BUFFER_TOKENS)
        if self.kind == "cached":
            self._require("cached_path", bool(self.cached_path), "a folder of shards when kind is 'cached'")

    @property
    def pairs(self) -> list[LayerHooks]:
        """The hooks of each layer, see `layer_hooks`."""
        return layer_hooks(self.layers, self.source_hook, self.target_hook)


@dataclass(frozen=True)
class TranscoderSection(DictionarySettings, where="transcoder."):
    """The dictionary. d_in and d_out come from the hooks."""

    d_sae: Positive = 2048
    """Latents in the dictionary."""
    k: int = 16
    activation: Activation = "batch_topk"
    normalize: Literal["none", "rms", "standardize"] = "standardize"
    """Source and target each by its own statistics: scaled to mean square 1, `standardize` also subtracts the mean."""
    normalization_tokens: Annotated[int, "[2, inf)"] = 16384
    """Tokens that these statistics are taken from, before the first step."""

    def config(self, d_in: int, d_out: int) -> TranscoderConfig:
        """The config of a transcoder of these settings."""
        given = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(DictionarySettings))
        return TranscoderConfig(d_in, d_out, **{name: value for name, value in given if value is not None})


@dataclass(frozen=True)
class TrainingSection(Section, where="training."):
    """The optimizer, its schedule, and what is evaluated."""

    steps: Positive = 1000
    """Optimizer steps of the run. A run that is resumed may be given more, even after its end."""
    init_from: str | None = None
    """Begin from the weights of a run folder, a checkpoint, or a saved or imported transcoder of this shape."""
    batch_size: Positive = 1024
    """Tokens an optimizer step sees in one micro-batch."""
    accumulation: Positive = 1
    """Micro-batches summed into one optimizer step."""
    lr: PositiveNumber | None = None
    """Learning rate; null is 2e-4 / sqrt(d_sae / 2^14)."""
    warmup_steps: Count | None = None
    """Steps in which the learning rate rises linearly to lr. null is 100, at most a tenth of the run."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after warmup."""
    min_lr_ratio: Share = 0.01
    """Lowest learning rate of the schedule as a share of lr, reached at the last step."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.99)
    """Decay rates of Adam's two moments."""
    eps: PositiveNumber = 1e-8
    """Adam's epsilon."""
    gradient_clip: PositiveNumber | None = 1.0
    """Largest norm of the whole gradient; null does not clip."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the matrix products. Weights, moments and statistics are fp32 in either case."""
    seed: Annotated[int, "[0, 2^63)"] = 0
    evaluation_every: Count = 0
    """Steps between evaluations on held-out tokens; 0 evaluates at the end only."""
    evaluation_tokens: Positive = 16384
    """Held-out tokens of an evaluation."""
    evaluation_ce_tokens: Count = 8192
    """Held-out tokens for the cross-entropy with the transcoder in place of the layer, at the end; 0 skips it."""
    similarity_tokens: Count = 4096
    """Held-out tokens on which prefixes are compared by CKA at the end (similarity.json). Their codes are saved for `transcoder
    compare` (heldout_codes.safetensors, 8 bytes an active latent). 0 skips both."""
    dead_refresh_steps: Positive = 25
    """Steps between reads of the list of dead latents, for AuxK."""
    max_bad_steps: Count = 10
    """A step whose loss or gradients are NaN or Inf changes nothing and is recorded with its batch. More such steps than this
    stop the run with a diagnosis and its state saved; a resumed run may be given more. 0 stops at the first."""


@dataclass(frozen=True)
class RegularizerSection(Section, where="antidup.regularizer."):
    """Weights are relative to a reconstruction loss of mean square (convention `mse`, target of mean square 1)."""

    enabled: bool = True
    correlation_weight: Weight = 0.005
    """Weight of the pair penalty: mean relu(c_ij - margin)^2 over the monitor's flagged and candidate pairs."""
    correlation_margin: Fraction = 0.3
    """Cosine of the activations of two latents over a batch, up to which a pair costs nothing."""
    adaptive: bool = True
    """Adapt the weight of the pair penalty: while more than `target_rate` of live latents are in pairs it grows, up to
    correlation_weight_max; otherwise it falls back to correlation_weight."""
    target_rate: Weight = 0.002
    """Share of live latents that may be in pairs before the adaptive weight grows."""
    adaptive_step: PositiveNumber | None = None
    """Speed of the adaptive weight. null moves it from one bound to the other in a tenth of the run when the rate is off by
    the target or more. A number is the change of the weight's exponent per step and unit of rate, for any length of the run;
    the lower bound is 0 then."""
    correlation_weight_max: float = 0.05
    """Upper bound of the adaptive weight; at least correlation_weight."""
    max_pairs: Positive = 4096
    """Most pairs that the pair penalty acts on in a step."""
    orthogonality_weight: Weight = 0.0
    """Weight of the decoder penalty: mean relu(max_j cos_ij - tau)^2 over the rows of a chunk. Off by default: at 0.01 it
    changed neither candidate nor mergeable pairs on planted data or on a language model (docs/anti-duplication.md), and costs
    3.5 to 4 % of a step."""
    orthogonality_threshold: Fraction = 0.3
    """tau of the decoder penalty."""
    orthogonality_chunk: Positive = 1024
    """Rows compared with the whole decoder at a time, drawn without replacement until every row has been drawn."""
    orthogonality_every: Positive = 10
    """Steps between decoder penalties."""
    all_pairs_weight: Weight = 0.0
    """Weight of sum r_ij^2 over all pairs, computed from the tokens' Gram matrix. Off by default: its noise floor is
    1 / (B - 1) a pair."""
    position_entropy_weight: Weight = 0.0
    """Weight of relu(floor - H_i), which pushes latents off single positions. Off by default: real positional latents exist."""
    position_entropy_floor: Fraction = 0.3
    """Floor of that entropy, in units of log(bins)."""
    sink_mass_weight: Weight = 0.0
    """Weight of relu(b_i - allowed)^2, where b_i is the share of latent i's activation on special tokens. Off by default:
    activations.mask_bos removes these tokens altogether."""
    sink_mass_allowed: Fraction = 0.1
    """Share of a latent's activation on special tokens that costs nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = self.correlation_weight_max >= self.correlation_weight
        self._require("correlation_weight_max", fits, f"at least correlation_weight = {self.correlation_weight}")


@dataclass(frozen=True)
class PositionsSection(Section, where="antidup.positions."):
    """Positions drawn evenly over a sequence, sinks kept rare: those that antidup.samples looks at or, with `train`, those
    that train."""

    enabled: bool = True
    train: bool = False
    """Draw the training tokens themselves, with importance weights that keep the objective's expectation. The language model
    then runs 1 / keep_fraction tokens for each one that trains, which took 1.6 times as long on the demo. Off, every token
    trains, and the draw chooses which tokens of a batch antidup.samples looks at.
    A run of an earlier version, which always drew its training tokens, goes on so when it is resumed."""
    bins: Positive = 10
    """Equal ranges of positions that a sequence is divided into."""
    min_samples_per_bin: Count = 2
    """Fewest tokens drawn from each bin: of a batch, or with `train` of a sequence."""
    keep_fraction: PositiveShare = 0.5
    """Share of the positions that is drawn."""
    bos_penalty: Share = 0.3
    """Factor on the drawing probability of special tokens that are not masked."""
    max_bos_fraction: Share = 0.2
    """Largest share of special tokens among the drawn ones of a batch, or with `train` of a sequence."""


@dataclass(frozen=True)
class MonitorSection(Section, where="antidup.monitor."):
    """Correlation of latents over the token stream: candidate pairs, flagged pairs, reports."""

    enabled: bool = True
    correlation_threshold: InnerFraction = 0.8
    """A pair is a candidate when the lower bound of its correlation in a block is above this."""
    release_threshold: float = 0.7
    """A flagged pair is released when the upper bound of its correlation in a block falls below this."""
    min_support: Positive = 100
    """Fewest tokens on which at least one latent of a pair fires."""
    min_sequences: Annotated[int, "[1, 1000]"] = 30
    """Fewest distinct sequences among these tokens; at most 1000 (their number is estimated, up to 1420)."""
    block_tokens: Positive | None = None
    """Tokens a block, each new evidence for a flag. null is 4 million, at most what gives a flag by half of the run."""
    blocks_to_flag: Positive = 3
    """Blocks in which a pair must be above the threshold to be flagged."""
    blocks_remembered: int = 4
    """Number of latest blocks among which these are counted; at least blocks_to_flag."""
    halflife_tokens: Positive | None = None
    """Half-life in tokens of the live view, which forgets exponentially; null shows the last full block and the current one."""
    sketch_dim: Annotated[int, "[8, inf)"] | None = None
    """Width of the correlation sketch; null is exact up to d_sae = 32768 and 128 beyond."""
    update_every: Positive = 1
    """Steps between updates."""
    correlation_save_frequency: Positive = 100
    """Steps between reports into anti_duplication_logs/."""
    max_reported_pairs: Positive = 1000
    """Most pairs in a report."""
    merge_test_tokens: Count = 8192
    """Held-out tokens on which each report tests whether a pair can be merged into one latent at no cost; 0 tests nothing."""
    merge_share_to_act: Weight | None = 0.3
    """A pair is not penalised when merging it costs more than this share of what removing the latent costs: such a pair is
    correlated, but no duplicate. null penalises every candidate."""
    act_on_untested: bool = False
    """Whether a pair without a verdict is penalised. A latent that fires on too few of merge_test_tokens is tested on training
    tokens, before the step learns from them, from the report that finds the pair on: a verdict needs ten firings."""

    def __post_init__(self) -> None:
        super().__post_init__()
        high, blocks = self.correlation_threshold, self.blocks_to_flag
        fits = 0 < self.release_threshold <= high
        self._require("release_threshold", fits, f"in (0, correlation_threshold = {high}]")
        self._require("blocks_remembered", self.blocks_remembered >= blocks, f"at least blocks_to_flag = {blocks}")


@dataclass(frozen=True)
class SamplesSection(Section, where="antidup.samples."):
    """Contexts in which each latent fires, kept for the report."""

    enabled: bool = True
    collect_every: Positive = 25
    """Steps between collections."""
    top_per_latent: Positive = 10
    """Contexts of the largest activations."""
    stratified_per_latent: Count = 10
    """Contexts drawn evenly over positions."""
    context_tokens: Positive = 20
    """Tokens kept up to and including the one that fires; a few after it are kept too."""
    min_activation: Weight = 0.05
    """Smaller activations are not collected."""
    position_bins: Positive = 10
    """Equal ranges of positions for the stratified contexts."""
    min_per_bin: Count = 2
    """Stratified contexts kept from each bin, where stratified_per_latent leaves fewer."""
    max_sink_fraction: Share = 0.2
    """Largest share of contexts whose firing token is a special token."""
    max_latents: Positive = 4096
    """Latents followed, evenly spread over the dictionary: this bounds memory."""
    forget_after: PositiveShare = 0.2
    """Share of the run's steps after which a sample is dropped: the weights that gave it are gone."""
    save_frequency: Positive = 500
    """Steps between writes into activation_samples/."""


@dataclass(frozen=True)
class RecycleSection(Section, where="antidup.recycle."):
    """Merge each flagged pair that passes the merge test into one latent, and reset the other as a dead latent, which AuxK
    then trains. This changes what is trained, so it is off by default."""

    enabled: bool = False
    every: Positive = 500
    """Steps between rounds; a round follows the correlation report of its step."""
    max_per_round: Positive = 64
    """Most latents reset in a round."""
    until: InnerFraction = 0.8
    """No round after this share of the steps: a reset latent needs the remaining steps to train."""


@dataclass(frozen=True)
class AntidupSection(Section, where="antidup."):
    """Parts that keep latents from duplicating each other."""

    regularizer: RegularizerSection = field(default_factory=RegularizerSection)
    positions: PositionsSection = field(default_factory=PositionsSection)
    monitor: MonitorSection = field(default_factory=MonitorSection)
    samples: SamplesSection = field(default_factory=SamplesSection)
    recycle: RecycleSection = field(default_factory=RecycleSection)
    verify_at_step: Positive = 100
    """By this step (or the last one, if sooner) each enabled part must have been called, had an effect and written its files;
    otherwise the run stops."""

    @property
    def regularizer_acts(self) -> bool:
        """Whether the regularizer has a term: the pair penalty needs the monitor, which finds the pairs."""
        others = (f.name for f in dataclasses.fields(self.regularizer) if f.name.endswith("_weight"))
        return self.regularizer.enabled and (
            self.monitor.enabled
            or any(getattr(self.regularizer, name) > 0 for name in others if name != "correlation_weight")
        )

    @property
    def positions_act(self) -> bool:
        """Whether the position sampler has something to choose: training tokens, or what samples are collected from."""
        return self.positions.enabled and (self.positions.train or self.samples.enabled)


@dataclass(frozen=True)
class CheckpointSection(Section, where="checkpoint."):
    """When the state is saved, and which checkpoints are kept."""

    every: Positive = 500
    """Steps between checkpoints."""
    keep_last: Positive = 2
    """Newest checkpoints that are kept."""
    keep_best: bool = True
    """Keep the checkpoint of the lowest held-out FVU (needs training.evaluation_every)."""
    keep_every: Positive | None = None
    """Keep every checkpoint whose step is a multiple of this."""
    second_location: str | None = None
    """Another folder, which takes the last state when the run folder cannot."""
    asynchronous: bool = True
    """Write during training: a step waits for a copy of the state in memory, not for the disk. The copy takes as much host
    memory as the state."""
    reserve: bool = True
    """Hold disk space for the last state, so that weights, moments and the position in the data still fit on a full disk."""


@dataclass(frozen=True)
class LoggingSection(Section, where="logging."):
    """Metrics, and where they are shown."""

    every: Positive = 10
    """Steps between reads of the metrics from the device."""
    progress: bool = True
    """Show the progress of the run on the terminal."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Send metrics to Weights & Biases; `offline` keeps them in the run folder."""
    wandb_project: str = "transcoder"
    wandb_upload_checkpoints: bool = False
    tensorboard: bool = False
    max_megabytes: Positive = 1024
    """A larger metrics.jsonl is thinned: every second line of metrics in its older half is dropped; events stay."""
    report: bool = True
    """Write report.html, in a separate process, when the run ends; `transcoder report RUN` writes it at any time."""
    report_latents: Count = 4096
    """Latents shown with their contexts in report.html, which stays below 10 MB in any case."""
    report_tokens: Count = 400_000
    """Tokens, training and held-out, that the final weights are run on after training for contexts, histograms, densities and
    duplicates; at most a quarter of those trained on. 0 runs none."""


@dataclass(frozen=True)
class RunConfig(Section):
    """One run. `RunConfig.load("demo")`, `RunConfig.load("my.yaml")`, `RunConfig.from_dict({...})`."""

    name: str = "run"
    """Name of the run. Its folder is runs/<name> unless --out says otherwise."""
    model: ModelSection = field(default_factory=ModelSection)
    activations: ActivationsSection = field(default_factory=ActivationsSection)
    transcoder: TranscoderSection = field(default_factory=TranscoderSection)
    training: TrainingSection = field(default_factory=TrainingSection)
    antidup: AntidupSection = field(default_factory=AntidupSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    logging: LoggingSection = field(default_factory=LoggingSection)
    per_layer: PerLayerSection = field(default_factory=PerLayerSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)

    def __post_init__(self) -> None:
        super().__post_init__()
        safe = bool(self.name) and self.name not in (".", "..") and all(c.isalnum() or c in "._-" for c in self.name)
        self._require("name", safe, "letters, digits, '.', '_' and '-' (it becomes a folder)")
        batch, buffer = self.training.batch_size, self.activations.buffer_tokens
        if self.activations.kind == "model" and buffer is not None and buffer < batch:
            raise settings.refusal("activations.buffer_tokens", f"at least training.batch_size = {batch}", buffer)
        layer_values(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """Build from nested mappings. Unknown keys and wrong types raise `ConfigError` with the nearest known name."""
        return typing.cast(RunConfig, settings.build(cls, values))

    @classmethod
    def load(cls, source: str | Path, overrides: Mapping[str, Any] | None = None) -> RunConfig:
        """Read a YAML file or a preset by name, then apply dotted overrides such as {"training.steps": 100}."""
        values = load_yaml(source)
        for dotted, value in (overrides or {}).items():
            settings.set_dotted(values, dotted, value)
        return cls.from_dict(values)

    def replace(self, overrides: Mapping[str, Any]) -> RunConfig:
        """A copy with dotted overrides such as {"training.steps": 100} applied."""
        values = self.to_dict()
        for dotted, value in overrides.items():
            settings.set_dotted(values, dotted, value)
        return RunConfig.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings: what YAML and JSON hold."""
        return dataclasses.asdict(
            self, dict_factory=lambda pairs: {k: list(v) if isinstance(v, tuple) else v for k, v in pairs}
        )

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def flags() -> list[tuple[str, Any]]:
    """Every leaf field as (dotted name, type), in order: what the command line offers."""
    return settings.flags(RunConfig)


def parse_flag(dotted: str, text: str | None) -> Any:
    """The value that `--dotted text` stands for: text where the field is text ('null' where it may be null, quotes taken
    off), else by YAML's rules ('null', 'true', '1e-3', '[1, 2]'). `text` is None if no value followed the flag: ConfigError."""
    known = dict(flags())
    if dotted not in known:
        raise ConfigError(f"unknown setting --{dotted}{settings.nearest(dotted, known)}")
    if text is None:
        raise ConfigError(f"--{dotted}: expected a value after it")
    kind = known[dotted]
    if str in (kind, *typing.get_args(kind)) and not (kind is not str and text == "null"):
        quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
        return text[1:-1] if quoted else text
    try:
        value = read_yaml(text) if text.strip() else text
    except ValueError as error:
        raise ConfigError(f"{dotted}: cannot read {settings.short(text)}: {error}") from error
    return settings.convert(kind, value, dotted)
