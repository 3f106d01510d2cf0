"""Transcoders that SAELens trains: TopK, BatchTopK and Matryoshka, in its registry once this module is imported.

SAELens' trainer hands a training SAE one tensor a step. A transcoder needs two, so a row holds both: source [d_in] and target
[d_out] of one token, concatenated: [B, d_in + d_out]. `TranscoderTrainingRunner` is its runner with a store that reads two
hooks; `paired` makes such rows from anything else, for its `SAETrainer`.

    from transcoder.interop.saelens_training import MatryoshkaBatchTopKTranscoderConfig, TranscoderTrainingRunner

    sae = MatryoshkaBatchTopKTranscoderConfig(d_in=512, d_out=512, d_sae=8192, k=32, matryoshka_widths=[512, 2048, 8192])
    cfg = LanguageModelSAERunnerConfig(sae=sae, hook_name="blocks.0.ln2.hook_normalized", ...)
    TranscoderTrainingRunner(cfg, hook_name_out="blocks.0.hook_mlp_out").run()

What is saved for inference SAELens loads without this package: a `jumprelu_transcoder` (with `skip=True` a
`jumprelu_skip_transcoder`), or what `inference_architecture` names. Where that is another function than the trained one, a
runner that would save it refuses before it trains, unless the config says `allow_changed_function=True`; a conversion.json
next to the weights says what changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from transcoder.activations.batch import ActivationBatch
from transcoder.files import file_digest, replace_atomically
from transcoder.interop import saelens as files
from transcoder.interop.accelerate import accelerated_class, check_version, missing_parts_named
from transcoder.interop.accelerate import saelens as library
from transcoder.interop.accelerate.saelens import Matryoshka, Training
from transcoder.interop.conversion_record import RECORD_FILE, ChangedFunctionError, Conversion

check_version(__name__, library)
with missing_parts_named(__name__, library):
    from sae_lens import LanguageModelSAETrainingRunner, register_sae_training_class
    from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.matryoshka_batchtopk_sae import (
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
    )
    from sae_lens.saes.topk_sae import TopKSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.saes.transcoder import (
        JumpReLUSkipTranscoderConfig,
        JumpReLUTranscoderConfig,
        SkipTranscoderConfig,
        TranscoderConfig,
    )
    from sae_lens.training.activations_store import ActivationsStore

_WITHOUT_SKIP = {c.architecture(): c for c in (JumpReLUTranscoderConfig, TranscoderConfig)}
_WITH_SKIP = {c.architecture(): c for c in (JumpReLUSkipTranscoderConfig, SkipTranscoderConfig)}


@dataclass
class _Config:
    """What the three configurations share.

    Args:
        d_out: the target's width.
        skip: a linear map of the source in addition to the latents, W_skip [d_out, d_in], zeros at first.
        inference_architecture: what `save_inference_model` writes. None: `jumprelu_transcoder`, with a skip connection
            `jumprelu_skip_transcoder`. `transcoder` and `skip_transcoder` are plain ReLUs: thresholds go into the biases.
            `topk`, of TopK without a skip connection and with d_in = d_out: SAELens' TopK SAE, the same function.
        allow_changed_function: save what is another function than the trained one.
    """

    d_out: int = 0
    apply_b_dec_to_input: bool = False
    skip: bool = False
    inference_architecture: str | None = None
    allow_changed_function: bool = False

    def __post_init__(self: Any) -> None:
        name = type(self).__name__
        if self.d_out < 1:
            raise ValueError(f"{name}.d_out: expected the target's width, got {self.d_out}")
        needed = {"apply_b_dec_to_input": False, "normalize_activations": "none", "reshape_activations": "none"}
        for setting, wanted in needed.items():
            if getattr(self, setting) != wanted:
                raise ValueError(
                    f"{name}.{setting}: expected {wanted!r} for a transcoder, whose input and output differ, got "
                    f"{getattr(self, setting)!r}"
                )
        known = self._inference_classes()
        if self.inference_architecture not in (None, *known):
            raise ValueError(
                f"{name}.inference_architecture: expected {', '.join(known)} (skip is {self.skip}, d_in {self.d_in}, d_out "
                f"{self.d_out}) or None, got {self.inference_architecture!r}"
            )
        super().__post_init__()  # type: ignore[misc]

    def _inference_classes(self) -> dict[str, type]:
        return dict(_WITH_SKIP if self.skip else _WITHOUT_SKIP)

    def get_inference_config_class(self) -> type:
        known = self._inference_classes()
        return known[self.inference_architecture or next(iter(known))]


@dataclass
class TopKTranscoderConfig(_Config, TopKTrainingSAEConfig):
    @classmethod
    def architecture(cls) -> str:
        return "topk_transcoder"

    def _inference_classes(self) -> dict[str, type]:
        known = super()._inference_classes()
        return known if self.skip or self.d_in != self.d_out else {**known, "topk": TopKSAEConfig}


@dataclass
class BatchTopKTranscoderConfig(_Config, BatchTopKTrainingSAEConfig):
    @classmethod
    def architecture(cls) -> str:
        return "batchtopk_transcoder"


@dataclass
class MatryoshkaBatchTopKTranscoderConfig(_Config, MatryoshkaBatchTopKTrainingSAEConfig):
    @classmethod
    def architecture(cls) -> str:
        return "matryoshka_batchtopk_transcoder"


def inference_record(cfg: Any, path: str | Path = "") -> Conversion:
    """What saving a transcoder of this config for inference does to it.

    Raises:
        ChangedFunctionError (a ValueError): it would be another function, and the config does not allow that.
    """
    record = Conversion("export", "saelens", str(path), cfg.allow_changed_function, files.TESTED)
    name = cfg.get_inference_config_class().architecture()
    try:
        if isinstance(cfg, TopKTranscoderConfig) and name != "topk":
            record.change(
                f"SAELens' transcoders know thresholds only, and TopK keeps k = {cfg.k} latents a token whatever their values",
                "inference_architecture='topk' keeps it, as SAELens' SAE, where d_in equals d_out and skip is off.",
            )
        if name in ("transcoder", "skip_transcoder"):
            record.change(
                f"SAELens' {name} is a ReLU: it has no thresholds. They are subtracted from b_enc, so the same latents act, "
                "each by its threshold less"
            )
    except ChangedFunctionError as error:
        raise ChangedFunctionError(
            f"{type(cfg).__name__}: {error}. In the config; output_path=None in the runner's saves checkpoints only"
        ) from None
    if cfg.rescale_acts_by_decoder_norm:
        record.add("the decoder's norms were folded into W_enc, b_enc and W_dec", "rounding")
    if name != "topk" and not isinstance(cfg, TopKTranscoderConfig):
        record.add("the tracked threshold in the place of the batch's k, as SAELens saves its BatchTopK", "note")
    if getattr(cfg, "matryoshka_widths", None):
        record.add("SAELens' inference SAEs know no Matryoshka widths: kept in the metadata only", "note")
    record.add(f"architecture {name}", "layout")
    return record


class _Paired:
    """In front of an accelerated SAELens class: another width out than in, and rows that hold source and target."""

    __reduce_ex__ = nn.Module.__reduce_ex__

    def initialize_weights(self: Any) -> None:
        d_in, d_out, d_sae = self.cfg.d_in, self.cfg.d_out, self.cfg.d_sae
        placed = {"dtype": self.dtype, "device": self.device}
        self.b_dec = nn.Parameter(torch.zeros(d_out, **placed))
        self.b_enc = nn.Parameter(torch.zeros(d_sae, **placed))
        self.W_dec = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(d_sae, d_out, **placed)))
        rows = nn.init.kaiming_uniform_(torch.empty(d_sae, d_in, **placed))
        if self.cfg.decoder_init_norm is not None:
            with torch.no_grad():
                for matrix in (self.W_dec, rows):
                    matrix.mul_(self.cfg.decoder_init_norm / matrix.norm(dim=-1, keepdim=True))
        self.W_enc = nn.Parameter(rows.T.contiguous())
        if self.cfg.skip:
            self.W_skip = nn.Parameter(torch.zeros(d_out, d_in, **placed))

    def process_sae_in(self: Any, sae_in: Tensor) -> Any:
        return self.hook_sae_input(sae_in.to(self.dtype))

    def forward(self: Any, x: Tensor) -> Any:
        """y_hat [..., d_out] of the source x [..., d_in]."""
        if self.use_error_term:
            raise ValueError(
                f"{type(self).__name__}: use_error_term: the error of a transcoder is not x - y_hat; leave it off"
            )
        out = self.decode(self.encode(x))
        return self.hook_sae_output(out + self._skipped(x) if self.cfg.skip else out)

    def _skipped(self: Any, x: Tensor) -> Any:
        return x.to(self.dtype) @ self.W_skip.T

    def training_forward_pass(self: Any, step_input: Any) -> Any:
        """As the library's, with the loss against the target half of each row."""
        d_in, d_out = self.cfg.d_in, self.cfg.d_out
        rows = step_input.sae_in
        if rows.shape[-1] != d_in + d_out:
            raise ValueError(
                f"{type(self).__name__}: expected rows of source and target, {d_in} + {d_out} wide, got {rows.shape[-1]}; "
                "train with TranscoderTrainingRunner, or give SAETrainer the provider that `paired` makes"
            )
        source, target = rows[..., :d_in], rows[..., d_in:]
        skipped = self._skipped(source) if self.cfg.skip else None
        self.__dict__["_source"] = source
        try:
            # Latents and each of their prefixes answer for what the skip connection leaves.
            left = target if skipped is None else target - skipped
            output = super().training_forward_pass(replace(step_input, sae_in=left))  # type: ignore[misc]
        finally:
            self.__dict__["_source"] = None
        if skipped is not None:
            output.sae_in, output.sae_out = target, output.sae_out + skipped
        return output

    def encode_with_hidden_pre(self: Any, x: Tensor) -> Any:
        source = self.__dict__.get("_source")
        return super().encode_with_hidden_pre(x if source is None else source)  # type: ignore[misc]

    def save_inference_model(self: Any, path: str | Path) -> Any:
        """SAELens' files of the `inference_architecture`, and conversion.json.

        Raises:
            ChangedFunctionError (a ValueError): that is another function, and the config does not allow it. Nothing is written.
        """
        record = inference_record(self.cfg, path)
        paths = super().save_inference_model(path)  # type: ignore[misc]
        record.files = {written.name: file_digest(written).sha256 for written in map(Path, paths)}
        replace_atomically(Path(path) / RECORD_FILE, record.to_json())
        return paths

    def process_state_dict_for_saving_inference(self: Any, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving_inference(state_dict)  # type: ignore[misc]
        if "topk_threshold" in state_dict:
            state_dict["threshold"] = torch.ones_like(self.b_enc) * float(state_dict.pop("topk_threshold"))
        name = self.cfg.get_inference_config_class().architecture()
        if not name.startswith("jumprelu"):
            threshold = state_dict.pop("threshold")
            if name != "topk":
                state_dict["b_enc"] = state_dict["b_enc"] - threshold


class TopKTranscoder(_Paired, accelerated_class(TopKTrainingSAE, Training)):  # type: ignore[misc]
    """Keeps k latents a token. The smallest kept activation, averaged over tokens and tracked over steps, is the threshold that
    takes the place of k where it is saved as one of SAELens' transcoders."""

    topk_threshold: Tensor

    def __init__(self, cfg: TopKTranscoderConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        self.register_buffer("topk_threshold", torch.zeros((), dtype=torch.double, device=self.W_dec.device))

    def training_forward_pass(self, step_input: Any) -> Any:
        output = super().training_forward_pass(step_input)
        with torch.no_grad():
            acts = output.feature_acts
            kept = acts.kept.view(acts.shape[0], -1) if hasattr(acts, "kept") else acts
            least = torch.where(kept > 0, kept, torch.inf).amin(-1)
            least = least[least.isfinite()].double()
            if least.numel():
                # In fp64 again where loading made it the weights' type.
                before = self.topk_threshold.double()
                self.topk_threshold = before.lerp(least.mean(), 0.05 if before > 0 else 1.0)
        return output


class BatchTopKTranscoder(_Paired, accelerated_class(BatchTopKTrainingSAE, Training)):  # type: ignore[misc]
    """Keeps k latents a token on average of a batch; saved with its tracked threshold, as SAELens saves its own BatchTopK."""


class MatryoshkaBatchTopKTranscoder(_Paired, accelerated_class(MatryoshkaBatchTopKTrainingSAE, Matryoshka)):  # type: ignore[misc]
    """BatchTopK whose every prefix in `matryoshka_widths` reconstructs the target by itself."""


class PairedActivationsStore(ActivationsStore):
    """SAELens' store, reading two hooks in one pass: rows of source and target, shuffled together."""

    hook_name_out: str

    @classmethod
    def reading(cls, model: Any, cfg: Any, hook_name_out: str, dataset: Any = None) -> PairedActivationsStore:
        """From a runner's config: `cfg.hook_name` is the source, `hook_name_out` the target."""
        if cfg.use_cached_activations or cfg.hook_head_index is not None:
            raise ValueError("PairedActivationsStore: cached activations and hook_head_index know one hook only")
        store: PairedActivationsStore = cls.from_config(model, cfg, override_dataset=dataset)
        store.hook_name_out = hook_name_out
        store.d_in = cfg.sae.d_in + cfg.sae.d_out
        return store

    @torch.no_grad()
    def get_activations(self, batch_tokens: Tensor) -> Tensor:
        hooks = [self.hook_name, self.hook_name_out]
        with torch.autocast(batch_tokens.device.type, dtype=torch.bfloat16, enabled=self.autocast_lm):
            _, cache = self.model.run_with_cache(
                batch_tokens, names_filter=hooks, prepend_bos=False, **self.model_kwargs
            )
        parts = [cache[h][:, slice(*self.seqpos_slice)].flatten(2).float() for h in hooks]
        both = torch.cat(parts, dim=-1).to(self.device)
        if both.shape[-1] != self.d_in:
            raise ValueError(
                f"PairedActivationsStore: {hooks} are {[p.shape[-1] for p in parts]} wide; d_in + d_out is {self.d_in}"
            )
        return both


class TranscoderTrainingRunner(LanguageModelSAETrainingRunner):
    """SAELens' runner over two hooks. Its evaluator, which puts an SAE's output back at the hook that was read, is off."""

    def __init__(self, cfg: Any, hook_name_out: str, **overrides: Any) -> None:
        if cfg.output_path is not None and isinstance(cfg.sae, _Config):
            # Refused here, not after the training.
            inference_record(cfg.sae)
        super().__init__(cfg, **overrides)
        self.hook_name_out = hook_name_out
        self.activations_store: Any = PairedActivationsStore.reading(
            self.model, cfg, hook_name_out, overrides.get("override_dataset")
        )
        self.evaluator: Any = None

    def _set_sae_metadata(self) -> None:
        super()._set_sae_metadata()
        self.sae.cfg.metadata.hook_name_out = self.hook_name_out


def paired(provider: Iterable[Any], source: Any = 0, target: Any = 1) -> Iterator[Tensor]:
    """Rows for SAELens' SAETrainer, [B, d_in + d_out], from pairs, or from dicts by hook name (SAELens' multi-hook loader)."""
    for batch in provider:
        yield torch.cat([batch[source], batch[target]], dim=-1)


def activation_batches(store: Iterable[Tensor], d_in: int) -> Iterator[ActivationBatch]:
    """Batches for `train_transcoder(config, batches=...)` from a SAELens store: a `PairedActivationsStore`, or its own
    ActivationsStore, whose rows are then both source and target (d_in is the whole row). Tokens and positions, which such a
    store does not keep, are 0."""
    for rows in store:
        source, target = (rows, rows) if rows.shape[1] == d_in else (rows[:, :d_in], rows[:, d_in:])
        nothing = torch.zeros(rows.shape[0], dtype=torch.int64)
        yield ActivationBatch(source.contiguous(), target.contiguous(), nothing, nothing)


for _config, _class in (
    (TopKTranscoderConfig, TopKTranscoder),
    (BatchTopKTranscoderConfig, BatchTopKTranscoder),
    (MatryoshkaBatchTopKTranscoderConfig, MatryoshkaBatchTopKTranscoder),
):
    if _config.architecture() not in SAE_TRAINING_CLASS_REGISTRY:
        register_sae_training_class(_config.architecture(), _class, _config)
